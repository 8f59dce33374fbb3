"""``python -m fq`` is ``fq``."""

from .cli import script

script()
