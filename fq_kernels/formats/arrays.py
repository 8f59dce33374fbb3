"""What a function that rounds takes and gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
# values, and which elements were cut to the format's range (None: none was)
Rounded = tuple[Floats, Mask | None]


class Spacing(NamedTuple):
    """Where a neighbour of x (rows, n) may lie, so that it is rounded as x is: what dither needs.

    step       (rows, n): how far apart the format's values lie around each element; 0 for one
               that must stay, since it makes its block's scale
    low, high  (rows, n): bounds outside which it would make another scale; None: there is none
    """

    step: Floats
    low: Floats | None = None
    high: Floats | None = None
