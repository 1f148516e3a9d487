"""Training spread over a Ray cluster: the only room that knows Ray."""

import os

# Ray reads this once, when it is imported. A cluster that is started in this process then listens
# on loopback alone; one that is joined, or that `ray start` makes, is not touched by it.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
