"""int8 and int4 with a float32 scale per row, per group or per tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Floats, Rounded, Spacing
from .blocks import (
    ROTATIONS,
    SMALLEST_NORMAL,
    below_largest,
    between_extremes,
    check_rotation,
    finite_or_nan,
    largest_magnitude,
    out_of_blocks,
    reduce_blocks,
    spacing_out_of_blocks,
    under_one_scale,
    with_rotation,
    within_float,
)
from .format import Family, Format
from .kernels import BLOCKS, BY_OTHERS, BY_TENSOR, INT, ZERO_POINT, BlockRule, Kernel


def symmetric(blocks: Floats, top: int) -> Floats:
    """Codes -top ... top: x / scale, rounded to even; scale = largest |x| / top. All in float32."""
    scale = _symmetric_scale(largest_magnitude(blocks), top)
    codes: Floats = np.rint(blocks / scale)
    codes += 0.0  # an integer has no -0
    codes *= scale
    return codes


def _symmetric_scale(largest: Floats, top: int) -> Floats:
    # a subnormal scale would have few bits of its own, or be 0
    scale: Floats = np.maximum(largest / np.float32(top), SMALLEST_NORMAL)
    return scale


def asymmetric(blocks: Floats, top: int) -> Floats:
    """Codes 0 ... top: x / scale, rounded to even, + zero point, which is a code itself.

    scale = (highest - lowest) / top with 0 counted among the values, so that 0 has a code.
    """
    scale, zero_point = _asymmetric_scale(*_range(blocks), top)
    codes: Floats = np.rint(blocks / scale)
    codes += zero_point
    np.clip(codes, 0, top, out=codes)
    codes -= zero_point
    codes *= scale
    return codes


def under_static_scale(x: Floats, scales: Floats, top: int) -> Rounded:
    """Codes -top ... top: x / scale, cut to them."""
    codes = np.rint(np.clip(x / scales, -top - 1, top + 1))
    clipped = np.abs(codes) > top
    np.clip(codes, -top, top, out=codes)
    codes += 0.0  # an integer has no -0
    codes *= scales
    return within_float(codes), clipped


def _check(fmt: Format) -> None:
    check_rotation(fmt)
    fmt.check_static_scale()


def _range(blocks: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest value of each block, 0 among them."""
    low = np.minimum(reduce_blocks(np.minimum, blocks), 0)
    return low, np.maximum(reduce_blocks(np.maximum, blocks), 0)


def _asymmetric_scale(low: Floats, high: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and zero point."""
    width = high.astype(np.float64) - low  # may be beyond float32
    scale = np.maximum(finite_or_nan((width / top).astype(np.float32)), SMALLEST_NORMAL)
    return scale, np.rint(-low / scale) + np.float32(0)


def _family(bits: int) -> Family:
    largest_code = 2 ** (bits - 1) - 1

    def quantise(x: Floats, fmt: Format) -> Rounded:
        if fmt.static_scale:
            return under_static_scale(x, fmt.scales_for(x.shape[1]), largest_code)
        blocks = under_one_scale(x, fmt)
        if "asymmetric" in fmt.settings:
            values = asymmetric(blocks, 2**bits - 1)
        else:
            values = symmetric(blocks, 2 ** (bits - 1) - 1)
        within_float(values)
        return out_of_blocks(values, *x.shape) if blocks is not x else values, None

    def spacing(x: Floats, fmt: Format) -> Spacing:
        if fmt.static_scale:
            return Spacing(np.broadcast_to(fmt.scales_for(x.shape[1]), x.shape))
        blocks = under_one_scale(x, fmt)
        if "asymmetric" in fmt.settings:
            low, high = _range(blocks)
            scale, _ = _asymmetric_scale(low, high, 2**bits - 1)
            return spacing_out_of_blocks(between_extremes(blocks, low, high, scale), *x.shape)
        largest = largest_magnitude(blocks)
        scale = _symmetric_scale(largest, 2 ** (bits - 1) - 1)
        return spacing_out_of_blocks(below_largest(blocks, largest, scale), *x.shape)

    def bits_per_value(fmt: Format) -> float:
        group = fmt.number("group")
        shared = 32 + (bits if "asymmetric" in fmt.settings else 0)
        return bits + shared / group if group else bits

    def rule(fmt: Format, **given: Any) -> Kernel:
        if fmt.scales:
            blocks = BlockRule(INT, top=largest_code, given=BY_OTHERS, scales=fmt.static_scales)
            return Kernel(BLOCKS, blocks=blocks)
        asymmetric = "asymmetric" in fmt.settings
        return Kernel(
            BLOCKS,
            blocks=BlockRule(
                ZERO_POINT if asymmetric else INT,
                size=fmt.number("group"),
                hadamard=fmt.number("had"),
                top=2**bits - 1 if asymmetric else 2 ** (bits - 1) - 1,
                **given,
            ),
        )

    def tensor_kernel(fmt: Format, lowest: np.float32, highest: np.float32) -> Kernel:
        ends = np.array([[lowest, highest]], np.float32)
        if "asymmetric" in fmt.settings:
            scale, zero_point = _asymmetric_scale(*_range(ends), 2**bits - 1)
            return rule(fmt, given=BY_TENSOR, scale=scale.item(), zero=zero_point.item())
        scale = _symmetric_scale(largest_magnitude(ends), 2 ** (bits - 1) - 1)
        return rule(fmt, given=BY_TENSOR, scale=scale.item())

    return Family(
        f"int{bits}",
        with_rotation(quantise),
        kernel=rule,
        tensor_kernel=tensor_kernel,
        choices=(("symmetric", "asymmetric"), ("row", "tensor", "group="), ROTATIONS),
        check=_check,
        static_top=largest_code,
        bits=bits_per_value,
        block="a row, the tensor, or G",
        spacing=spacing,
        note="float32 scale; the bits count a group's scale and zero point, not a row's or tensor's",
    )


FAMILIES = (_family(8), _family(4))
