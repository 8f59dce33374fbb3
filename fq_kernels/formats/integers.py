"""int8 and int4 with a float32 scale per row, per group or per tensor."""

from __future__ import annotations

import numpy as np

from .arrays import Floats, Rounded, Spacing
from .blocks import (
    SMALLEST_NORMAL,
    below_largest,
    between_extremes,
    finite_or_nan,
    in_blocks,
    largest_magnitude,
    out_of_blocks,
    reduce_blocks,
    spacing_out_of_blocks,
)
from .format import Family, Format

LARGEST = np.finfo(np.float32).max


def symmetric(blocks: Floats, top: int) -> Floats:
    """Codes -top ... top: x / scale, rounded to even; scale = largest |x| / top. All in float32."""
    scale = _symmetric_scale(largest_magnitude(blocks), top)
    codes = np.rint(blocks / scale)
    codes += 0.0  # an integer has no -0
    codes *= scale
    return codes


def _symmetric_scale(largest: Floats, top: int) -> Floats:
    # a subnormal scale would have few bits of its own, or be 0
    return np.maximum(largest / np.float32(top), SMALLEST_NORMAL)


def asymmetric(blocks: Floats, top: int) -> Floats:
    """Codes 0 ... top: x / scale, rounded to even, + zero point, which is a code itself.

    scale = (highest - lowest) / top with 0 counted among the values, so that 0 has a code.
    """
    low, _, scale = _range(blocks, top)
    zero_point = np.rint(-low / scale)
    codes = np.rint(blocks / scale)
    codes += zero_point
    np.clip(codes, 0, top, out=codes)
    codes -= zero_point
    codes *= scale
    return codes


def _range(blocks: Floats, top: int) -> tuple[Floats, Floats, Floats]:
    """Lowest and highest value of each block, 0 among them, and its asymmetric scale."""
    low = np.minimum(reduce_blocks(np.minimum, blocks), 0)
    high = np.maximum(reduce_blocks(np.maximum, blocks), 0)
    width = high.astype(np.float64) - low  # may be beyond float32
    return low, high, np.maximum(finite_or_nan((width / top).astype(np.float32)), SMALLEST_NORMAL)


def _blocks(x: Floats, fmt: Format) -> Floats:
    if "tensor" in fmt.settings:
        return x.reshape(1, -1)
    if group := fmt.number("group"):
        return in_blocks(x, min(group, x.shape[1]))
    return x


def _family(bits: int) -> Family:
    def quantise(x: Floats, fmt: Format) -> Rounded:
        blocks = _blocks(x, fmt)
        if "asymmetric" in fmt.settings:
            values = asymmetric(blocks, 2**bits - 1)
        else:
            values = symmetric(blocks, 2 ** (bits - 1) - 1)
        # code times scale may be one step beyond float32's largest number
        np.clip(values, -LARGEST, LARGEST, out=values)
        return out_of_blocks(values, *x.shape) if blocks is not x else values, None

    def spacing(x: Floats, fmt: Format) -> Spacing:
        blocks = _blocks(x, fmt)
        if "asymmetric" in fmt.settings:
            low, high, scale = _range(blocks, 2**bits - 1)
            return spacing_out_of_blocks(between_extremes(blocks, low, high, scale), *x.shape)
        largest = largest_magnitude(blocks)
        scale = _symmetric_scale(largest, 2 ** (bits - 1) - 1)
        return spacing_out_of_blocks(below_largest(blocks, largest, scale), *x.shape)

    def bits_per_value(fmt: Format) -> float:
        group = fmt.number("group")
        shared = 32 + (bits if "asymmetric" in fmt.settings else 0)
        return bits + shared / group if group else bits

    return Family(
        f"int{bits}",
        quantise,
        choices=(("symmetric", "asymmetric"), ("row", "tensor", "group=")),
        bits=bits_per_value,
        block="a row, the tensor, or G",
        spacing=spacing,
        note="float32 scale; the bits count a group's scale and zero point, not a row's or tensor's",
    )


FAMILIES = (_family(8), _family(4))
