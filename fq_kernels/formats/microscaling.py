"""Blocks of narrow elements under a narrow scale: OCP MX, and NVIDIA's nvfp4.

Sources: OCP Microscaling Formats (MX) 1.0, sections 5 and 6.3; NVIDIA, Pretraining LLMs with
NVFP4 (2025), appendix on quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import Floats, Mask, Rounded, Spacing
from .blocks import (
    LARGEST,
    ROTATIONS,
    SMALLEST_NORMAL,
    below_largest,
    check_rotation,
    finite_or_nan,
    in_blocks,
    largest_magnitude,
    mask_out_of_blocks,
    out_of_blocks,
    reduce_blocks,
    spacing_out_of_blocks,
    with_rotation,
    within_float,
)
from .format import NEAREST_EVEN, Family, Format
from .kernels import BLOCKS, BY_OTHERS, BY_TENSOR, MX, MX_INT, NVFP4, BlockRule, Kernel
from .narrow_floats import E2M1, E2M3, E3M2, E4M3FN, E5M2, NarrowFloat


class Int8Element:
    """MX's INT8: two's complement with 6 fraction bits; -2 is not used, so that the range is symmetric."""

    emax = 0
    m = 6
    largest = 127 / 64

    def step(self, x: Floats) -> Floats:
        return np.full(x.shape, 1 / 64, np.float32)

    def quantise(self, x: Floats) -> Rounded:
        codes = np.rint(x * np.float32(64))
        clipped = np.abs(codes) > 127
        np.clip(codes, -127, 127, out=codes)
        codes += 0.0  # an integer has no -0
        codes *= np.float32(1 / 64)
        return codes, clipped


_ONE_BINADE = (1 << 23) - 1


def _size_of(fmt: Format) -> int:
    return fmt.number("block") or 32


def _check_block(fmt: Format) -> None:
    if not 16 <= _size_of(fmt) <= 256:
        raise ValueError(f"block={_size_of(fmt)} of format {fmt.name} must be from 16 to 256")
    check_rotation(fmt)


def _mx(
    name: str, element: NarrowFloat | Int8Element, bits: int, note: str, aliases: tuple[str, ...] = ()
) -> Family:
    # of a largest magnitude m * 2**e, 1 <= m < 2: whether the scale's exponent is one more than floor's
    rounds_up: dict[str, Callable[[Floats], Mask]] = {
        "floor": lambda m: np.zeros(m.shape, np.bool_),
        "rceil": lambda m: m > element.largest / 2.0**element.emax,
        "even": lambda m: m >= 2 - 2.0 ** -(element.m + 1),
        "ceil": lambda m: m > 1,
    }

    def scale_of(largest: Floats, fmt: Format) -> Floats:
        # E8M0: a power of two from 2**-127 to 2**127, or NaN
        half, exponent = np.frexp(largest)
        exponent = exponent - 1 + rounds_up[fmt.settings[0]](2 * half)
        scale: Floats = np.ldexp(np.float32(1), np.clip(exponent - element.emax, -127, 127))
        scale[np.isnan(largest)] = np.nan
        return scale

    def carry(fmt: Format) -> int:
        """What, added to the bits of a largest magnitude, carries where ``rounds_up`` says so."""
        return {
            "floor": 0,
            "rceil": _ONE_BINADE - (int(np.float32(element.largest).view(np.uint32)) & _ONE_BINADE),
            "even": 1 << (22 - element.m),
            "ceil": _ONE_BINADE,
        }[fmt.settings[0]]

    def kernel(fmt: Format) -> Kernel:
        narrow = element.rule(NEAREST_EVEN) if isinstance(element, NarrowFloat) else None
        return Kernel(
            BLOCKS,
            narrow,
            BlockRule(
                MX if narrow else MX_INT,
                size=_size_of(fmt),
                hadamard=fmt.number("had"),
                emax=element.emax,
                carry=carry(fmt),
            ),
        )

    def quantise(x: Floats, fmt: Format) -> Rounded:
        blocks = in_blocks(x, _size_of(fmt))
        scale = scale_of(largest_magnitude(blocks), fmt)
        values, clipped = element.quantise(blocks * (np.float32(1) / scale))
        values *= scale
        return out_of_blocks(within_float(values), *x.shape), mask_out_of_blocks(clipped, *x.shape)

    def spacing(x: Floats, fmt: Format) -> Spacing:
        """The largest magnitude is free where it makes the same scale."""
        blocks = in_blocks(x, _size_of(fmt))
        largest = largest_magnitude(blocks)
        scale = scale_of(largest, fmt)
        step = np.where(largest > 0, element.step(blocks * (np.float32(1) / scale)) * scale, np.float32(0))
        add = carry(fmt)
        first = ((largest.view(np.int32) + np.int64(add)) >> 23 << 23) - add
        last = np.minimum(first + _ONE_BINADE, LARGEST.view(np.int32))
        bottom = np.maximum(first, 0).astype(np.int32).view(np.float32)
        top = last.astype(np.int32).view(np.float32)
        low = np.where(blocks == largest, bottom, -top)
        high = np.where(blocks == -largest, -bottom, top)
        return spacing_out_of_blocks(Spacing(step, low, high), *x.shape)

    return Family(
        name,
        with_rotation(quantise),
        kernel=kernel,
        choices=(tuple(rounds_up), ("block=32", "block="), ROTATIONS),
        check=_check_block,
        bits=lambda fmt: bits + 8 / _size_of(fmt),
        block="32, or N",
        idempotent=True,
        aliases=aliases,
        spacing=spacing,
        note=note,
    )


class _Nvfp4:
    """Blocks of 16 elements under a scale in e4m3, and an outer one for a row or the tensor, or a static one.

    four-over-six: a block's largest magnitude may become the element 4 as well as 6, where that makes a
    smaller squared error (Cook et al. 2025, arXiv 2512.02010); the outer scale leaves room for scales half as
    large again.
    """

    @staticmethod
    def outer_top(fmt: Format) -> float:
        """What the outer scale maps its largest magnitude to: the largest element times the largest scale."""
        return 6.0 * (256 if "four-over-six" in fmt.settings else E4M3FN.largest)

    def outer_scale(self, largest: Floats, fmt: Format) -> Floats:
        """largest (k,), of each row or of the tensor."""
        scale: Floats = np.maximum(finite_or_nan(largest) / np.float32(self.outer_top(fmt)), SMALLEST_NORMAL)
        return scale

    def scales(self, blocks: Floats, rows: int, fmt: Format) -> tuple[Floats, Floats]:
        """What each block's own scale should be, and the outer one: (k, 1)."""
        largest = reduce_blocks(np.maximum, np.abs(blocks))
        if fmt.static_scale:
            outer = fmt.scales_for(1)
        else:
            each = largest.max() if "tensor" in fmt.settings else largest.reshape(rows, -1).max(axis=1)
            outer = self.outer_scale(np.atleast_1d(each), fmt)
        outer = np.repeat(outer, len(blocks) // len(outer))[:, np.newaxis]
        return finite_or_nan(largest) / np.float32(6) / outer, outer

    @staticmethod
    def under(own: Floats, outer: Floats, blocks: Floats) -> tuple[Floats, Mask]:
        scale = own * outer
        scale[scale == 0] = np.inf  # a block too small for its scale: zeros
        elements = blocks / scale
        values, _ = E2M1.quantise(elements)
        values *= own
        values *= outer
        return within_float(values), E2M1.overflows(elements)

    def quantise(self, x: Floats, fmt: Format) -> Rounded:
        blocks = in_blocks(x, 16)
        wanted, outer = self.scales(blocks, len(x), fmt)
        values, clipped = self.under(E4M3FN.quantise(wanted)[0], outer, blocks)
        if "four-over-six" in fmt.settings:
            four, clipped_by_four = self.under(E4M3FN.quantise(wanted * np.float32(1.5))[0], outer, blocks)
            better = _squared_error(four, blocks) < _squared_error(values, blocks)
            values = np.where(better, four, values)
            clipped = np.where(better, clipped_by_four, clipped)
        return out_of_blocks(values, *x.shape), mask_out_of_blocks(clipped, *x.shape)

    def spacing(self, x: Floats, fmt: Format) -> Spacing:
        """By the scale that maps the largest magnitude to 6."""
        blocks = in_blocks(x, 16)
        wanted, outer = self.scales(blocks, len(x), fmt)
        scale = E4M3FN.quantise(wanted)[0] * outer
        step = np.where(scale > 0, E2M1.step(blocks / scale) * scale, np.float32(0))
        return spacing_out_of_blocks(below_largest(blocks, largest_magnitude(blocks), step), *x.shape)

    def kernel(self, fmt: Format, **given: Any) -> Kernel:
        if fmt.scales:
            given = {"given": BY_OTHERS, "scales": fmt.static_scales}
        return Kernel(
            BLOCKS,
            E2M1.rule(NEAREST_EVEN),
            BlockRule(
                NVFP4,
                size=16,
                hadamard=fmt.number("had"),
                outer_top=self.outer_top(fmt),
                four="four-over-six" in fmt.settings,
                **given,
            ),
        )

    def tensor_kernel(self, fmt: Format, lowest: np.float32, highest: np.float32) -> Kernel:
        largest = np.abs(np.array([lowest, highest], np.float32)).max(keepdims=True)
        return self.kernel(fmt, given=BY_TENSOR, scale=self.outer_scale(largest, fmt).item())


def _squared_error(values: Floats, blocks: Floats) -> Floats:
    """Of each block, (k, 16) -> (k, 1), added in halves."""
    errors = values - blocks
    errors *= errors
    while (half := errors.shape[1] // 2) > 0:
        errors = errors[:, :half] + errors[:, half:]
    return errors


def _check_nvfp4(fmt: Format) -> None:
    fmt.check_static_scale("four-over-six")
    if fmt.dither and "four-over-six" in fmt.options:  # a block's scale hangs on all of its elements
        raise ValueError(f"format {fmt.name} has no dither beside four-over-six")
    check_rotation(fmt)


_NVFP4 = _Nvfp4()

FAMILIES = (
    _mx("mxfp8_e4m3", E4M3FN, 8, "OCP MX: fp8_e4m3fn elements, E8M0 scale", ("mxfp8",)),
    _mx("mxfp8_e5m2", E5M2, 8, "OCP MX: fp8_e5m2 elements, E8M0 scale"),
    _mx("mxfp6_e2m3", E2M3, 6, "OCP MX: fp6_e2m3 elements, E8M0 scale", ("mxfp6",)),
    _mx("mxfp6_e3m2", E3M2, 6, "OCP MX: fp6_e3m2 elements, E8M0 scale"),
    _mx("mxfp4", E2M1, 4, "OCP MX: fp4_e2m1 elements, E8M0 scale"),
    _mx("mxint8", Int8Element(), 8, "OCP MX: codes -127 to 127 / 64, E8M0 scale"),
    Family(
        "nvfp4",
        with_rotation(_NVFP4.quantise),
        kernel=_NVFP4.kernel,
        tensor_kernel=_NVFP4.tensor_kernel,
        choices=(("tensor", "row"), ("six", "four-over-six"), ROTATIONS),
        check=_check_nvfp4,
        bits=4.5,
        block="16",
        spacing=_NVFP4.spacing,
        static_top=_NVFP4.outer_top,
        static_channels=False,
        note="fp4_e2m1 elements, fp8_e4m3fn scale, and a float32 scale that the bits leave out",
    ),
)
