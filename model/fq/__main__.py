"""``python -m fq`` is ``fq``."""

import sys

from .cli import main

sys.exit(main())
