"""``python -m bnncore.storage``."""

import sys

from bnncore.storage import main

sys.exit(main())
