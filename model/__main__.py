"""``python -m model`` is ``fq``."""

import sys

from .cli import main

sys.exit(main())
