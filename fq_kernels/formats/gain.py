"""A control: every value times 1 + 2^-7, which shows what a change of a site's scale alone costs."""

from __future__ import annotations

import numpy as np

from .arrays import Floats, Rounded
from .format import Family, Format

GAIN = "gain"
BY = 2.0**-7


def _quantise(x: Floats, _: Format) -> Rounded:
    return x * np.float32(1 + BY), None


FAMILY = Family(GAIN, _quantise, bits=32, note="every value times 1 + 2^-7")
