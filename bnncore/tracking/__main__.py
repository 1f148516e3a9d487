"""``python -m bnncore.tracking``."""

import sys

from bnncore.tracking import main

sys.exit(main())
