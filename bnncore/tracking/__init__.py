"""MLflow tracking that cannot stop, slow or lose a training run.

The stages of one pipeline run are separate processes that log into one parent run, with one child
run a model. The process that trains never imports MLflow, whose import and retries draw from
Python's global random state at moments that no seed fixes: it keeps a file a run that says what the
run shall be (`runs`), and a background process brings the store to that (`sync`). Only a process
can be ended when a call hangs, and it may be killed at any moment: runs are found by their tags,
and what the store has is not sent again. So a server that is away, slow or hanging costs nothing
but the wait in `Tracker.finish`.
"""

from bnncore.tracking.runs import METRICS, NOWHERE, ModelRun, Tracker, commit, resolve_uri
from bnncore.tracking.sync import merge, sync
from bnncore.tracking.ui import compare_path

__all__ = [
    "METRICS",
    "NOWHERE",
    "ModelRun",
    "Tracker",
    "commit",
    "compare_path",
    "merge",
    "resolve_uri",
    "sync",
]
