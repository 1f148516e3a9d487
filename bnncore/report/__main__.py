"""``python -m bnncore.report``."""

import sys

from bnncore.report import main

sys.exit(main())
