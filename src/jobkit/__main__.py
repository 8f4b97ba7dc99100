"""``python -m jobkit``, the same as ``jobkit``."""

import sys

from jobkit.cli import main

sys.exit(main())
