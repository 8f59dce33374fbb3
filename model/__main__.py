"""``python -m model`` in a checkout is ``fq`` of these sources, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fq.cli import script

script()
