"""``python -m bnncore.paper``."""

import sys

from bnncore.paper import main

sys.exit(main())
