"""Subtractive dither: a rounding's errors, fallen anew for each seed.

What rounds is a neighbour y of x, at most half a step away: the result is x + (Q(y) - y). The
error is thus one that the format makes, of the size that it makes around x, but another for each
seed. Random numbers are functions of the seed, a row's bits and the element's index, so that a
row gets the same wherever, in whatever company and on whatever thread it comes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arrays import Floats, Mask, Rounded, Spacing

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def dithered(
    x: Floats, quantise: Callable[[Floats], Rounded], spacing: Callable[[Floats], Spacing], seed: int
) -> Rounded:
    """x (rows, n) rounded by ``quantise`` with dither from ``seed``.

    An element that is cut to the range, itself or its neighbour, is rounded without dither.
    """
    rounded, cut = quantise(x)
    step, low, high = spacing(x)
    wide = x.astype(np.float64)
    y = wide + (uniform(x, seed) - 0.5) * step
    if low is not None and high is not None:
        # on an even grid a whole step changes no error
        y = np.where(y > high, y - step, np.where(y < low, y + step, y))
        y = np.where((y >= low) & (y <= high), y, wide)
    neighbour = y.astype(np.float32)
    values, cut_too = quantise(neighbour)
    out = (wide + (values.astype(np.float64) - neighbour)).astype(np.float32)
    clipped: Mask | None = None
    for mask in (cut, cut_too):
        if mask is not None:
            clipped = mask if clipped is None else clipped | mask
    as_it_is = ~np.isfinite(out) | ~np.isfinite(rounded)
    if clipped is not None:
        as_it_is |= clipped
    out[as_it_is] = rounded[as_it_is]
    return out, clipped


def uniform(x: Floats, seed: int) -> npt.NDArray[np.float64]:
    """For each element of x (rows, n) a number in [0, 1)."""
    numbers: npt.NDArray[np.uint64] = random_bits(x, seed) >> np.uint64(11)
    return numbers.astype(np.float64) * 2.0**-53


def random_bits(x: Floats, seed: int) -> npt.NDArray[np.uint64]:
    """64 bits for each element of x (rows, n), C-contiguous rows: SplitMix64 from seed and row."""
    rows = np.array([zlib.crc32(row) for row in x.view(np.uint8)], np.uint64)
    start = _mix(_mix(np.array([seed], np.uint64)) ^ rows)[:, np.newaxis]
    steps: npt.NDArray[np.uint64] = np.arange(1, x.shape[1] + 1, dtype=np.uint64) * _GOLDEN
    return _mix(start + steps)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
