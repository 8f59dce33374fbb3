"""Element formats of 8 bits that are no exponent and mantissa of fixed widths behind a sign.

Sources: Luo et al. 2024, "Ascend HiFloat8 Format for Deep Learning" (hif8); OCP MX 1.0, 5.4.1 (e8m0).
"""

from __future__ import annotations

import numpy as np

from .arrays import Floats, Rounded, Spacing
from .format import NEAREST_EVEN, Family, Format
from .narrow_floats import SATURATE

# ---------------------------------------------------------------- HiFloat8

_HIF8_LARGEST = 2.0**15  # the code above it is infinity's
_HIF8_NORMAL = 2.0**-15
_HIF8_SMALLEST = 2.0**-22


def _hif8_mantissa_bits(exponent: np.ndarray) -> np.ndarray:
    """What a sign, the prefix that says how long the exponent is, and the exponent leave of 8 bits."""
    bits: np.ndarray = 3 - np.searchsorted([4, 8, 16], np.abs(exponent), side="right").astype(np.int32)
    return bits


def _hif8_exponent(x: Floats) -> np.ndarray:
    return (x.view(np.int32) >> 23 & 0xFF) - 127


def _hif8(x: Floats, fmt: Format) -> Rounded:
    """To nearest, ties away from zero, as its authors round; there is no -0."""
    size = np.abs(x)
    dropped = 23 - _hif8_mantissa_bits(_hif8_exponent(x))
    half = np.left_shift(1, dropped - 1, dtype=np.int32)
    values = (size.view(np.int32) + half >> dropped << dropped).view(np.float32)
    values = np.maximum(values, np.float32(_HIF8_SMALLEST))
    values[size < _HIF8_SMALLEST / 2] = 0
    beyond = values > _HIF8_LARGEST
    values[beyond] = _HIF8_LARGEST if "saturate" in fmt.settings else np.inf
    values = np.where(np.signbit(x) & (values != 0), -values, values)
    return np.where(np.isnan(x), x, values), beyond if "saturate" in fmt.settings else None


def _hif8_spacing(x: Floats, fmt: Format) -> Spacing:
    exponent = np.maximum(_hif8_exponent(x), -22)
    return Spacing(np.ldexp(np.float32(1), exponent - _hif8_mantissa_bits(exponent)))


# ---------------------------------------------------------------- E8M0

_E8M0_EXPONENT = 127  # of the largest number, and with a minus of the smallest


def _e8m0(x: Floats, fmt: Format) -> Rounded:
    """Powers of two alone: it has neither sign nor zero. Negative numbers become NaN."""
    half, exponent = np.frexp(x)  # half in [1/2, 1)
    exponent -= 1
    if fmt.rounding == "up":
        more = half > 0.5
    elif fmt.rounding == "truncate":
        more = np.zeros(x.shape, bool)
    else:  # of a tie to the even code
        tie = exponent % 2 == 0 if fmt.rounding == NEAREST_EVEN else True
        more = (half > 0.75) | (half == 0.75) & tie
    exponent += more
    below = (x < 2.0**-_E8M0_EXPONENT) & (x >= 0)
    beyond = (exponent > _E8M0_EXPONENT) | np.isposinf(x)
    values = np.ldexp(np.float32(1), np.clip(exponent, -_E8M0_EXPONENT, _E8M0_EXPONENT))
    values[below] = 2.0**-_E8M0_EXPONENT
    values[beyond] = np.nan if "no-saturate" in fmt.settings else 2.0**_E8M0_EXPONENT
    values[~(x >= 0)] = np.nan
    return values, below | beyond & (values == values)


FAMILIES = (
    Family(
        "hif8",
        _hif8,
        roundings=("nearest-away",),
        choices=(tuple(reversed(SATURATE)),),
        bits=8,
        largest=_HIF8_LARGEST,
        smallest_normal=_HIF8_NORMAL,
        smallest_subnormal=_HIF8_SMALLEST,
        idempotent=True,
        spacing=_hif8_spacing,
        note="HiFloat8: 3 bits of mantissa around 1, fewer towards the range's ends; overflow to infinity",
    ),
    Family(
        "e8m0",
        _e8m0,
        roundings=(NEAREST_EVEN, "nearest-away", "truncate", "up"),
        choices=(SATURATE,),
        bits=8,
        largest=2.0**_E8M0_EXPONENT,
        smallest_normal=2.0**-_E8M0_EXPONENT,
        smallest_subnormal=2.0**-_E8M0_EXPONENT,
        idempotent=True,
        note="the scale of OCP MX: powers of two, no sign, no zero; a negative number becomes NaN",
    ),
)
