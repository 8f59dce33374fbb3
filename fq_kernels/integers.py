"""int8 and int4 with a float32 scale per row, per group or per tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .blocks import (
    SMALLEST_NORMAL,
    finite_or_nan,
    in_blocks,
    largest_magnitude,
    out_of_blocks,
    reduce_blocks,
)
from .format_family import Family, Floats, Rounded

if TYPE_CHECKING:
    from .formats import Format

LARGEST = np.finfo(np.float32).max


def symmetric(blocks: Floats, top: int) -> Floats:
    """Codes -top ... top: x / scale, rounded to even; scale = largest |x| / top. All in float32."""
    # a subnormal scale would have few bits of its own, or be 0
    scale = np.maximum(largest_magnitude(blocks) / np.float32(top), SMALLEST_NORMAL)
    codes = np.rint(blocks / scale)
    codes += 0.0  # an integer has no -0
    codes *= scale
    return codes


def asymmetric(blocks: Floats, top: int) -> Floats:
    """Codes 0 ... top: x / scale, rounded to even, + zero point, which is a code itself.

    scale = (highest - lowest) / top with 0 counted among the values, so that 0 has a code.
    """
    low = np.minimum(reduce_blocks(np.minimum, blocks), 0)
    high = np.maximum(reduce_blocks(np.maximum, blocks), 0)
    width = high.astype(np.float64) - low  # may be beyond float32
    scale = np.maximum(finite_or_nan((width / top).astype(np.float32)), SMALLEST_NORMAL)
    zero_point = np.rint(-low / scale)
    codes = np.rint(blocks / scale)
    codes += zero_point
    np.clip(codes, 0, top, out=codes)
    codes -= zero_point
    codes *= scale
    return codes


def _family(bits: int) -> Family:
    def quantise(x: Floats, fmt: Format) -> Rounded:
        blocks = x
        if "tensor" in fmt.settings:
            blocks = x.reshape(1, -1)
        elif group := fmt.number("group"):
            blocks = in_blocks(x, min(group, x.shape[1]))
        if "asymmetric" in fmt.settings:
            values = asymmetric(blocks, 2**bits - 1)
        else:
            values = symmetric(blocks, 2 ** (bits - 1) - 1)
        # code times scale may be one step beyond float32's largest number
        np.clip(values, -LARGEST, LARGEST, out=values)
        return out_of_blocks(values, *x.shape) if blocks is not x else values, None

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
        note="float32 scale; the bits count a group's scale and zero point, not a row's or tensor's",
    )


FAMILIES = (_family(8), _family(4))
