"""Blocks of narrow elements under a narrow scale: OCP MX, and NVIDIA's nvfp4.

Sources: OCP Microscaling Formats (MX) 1.0, sections 5 and 6.3; NVIDIA, Pretraining LLMs with
NVFP4 (2025), appendix on quantisation.
"""

from __future__ import annotations

import numpy as np

from .arrays import Floats, Rounded, Spacing
from .blocks import (
    SMALLEST_NORMAL,
    below_largest,
    finite_or_nan,
    in_blocks,
    largest_magnitude,
    mask_out_of_blocks,
    out_of_blocks,
    reduce_blocks,
    spacing_out_of_blocks,
)
from .format import Family, Format
from .narrow_floats import E2M1, E2M3, E3M2, E4M3FN, E5M2, NarrowFloat


class Int8Element:
    """MX's INT8: two's complement with 6 fraction bits; -2 is not used, so that the range is symmetric."""

    emax = 0

    def step(self, x: Floats) -> Floats:
        return np.full(x.shape, 1 / 64, np.float32)

    def quantise(self, x: Floats) -> Rounded:
        codes = np.rint(x * np.float32(64))
        clipped = np.abs(codes) > 127
        np.clip(codes, -127, 127, out=codes)
        codes += 0.0  # an integer has no -0
        codes *= np.float32(1 / 64)
        return codes, clipped


def _mx(
    name: str, element: NarrowFloat | Int8Element, bits: int, note: str, aliases: tuple[str, ...] = ()
) -> Family:
    def scale_of(largest: Floats) -> Floats:
        # E8M0: a power of two from 2**-127 to 2**127, or NaN
        exponent = np.clip(np.frexp(largest)[1] - 1 - element.emax, -127, 127)
        scale = np.ldexp(np.float32(1), exponent)
        scale[np.isnan(largest)] = np.nan
        return scale

    def quantise(x: Floats, fmt: Format) -> Rounded:
        blocks = in_blocks(x, 32)
        scale = scale_of(largest_magnitude(blocks))
        values, clipped = element.quantise(blocks * (np.float32(1) / scale))
        values *= scale
        return out_of_blocks(values, *x.shape), mask_out_of_blocks(clipped, *x.shape)

    def spacing(x: Floats, fmt: Format) -> Spacing:
        """The largest magnitude keeps its exponent, and is free within it."""
        blocks = in_blocks(x, 32)
        largest = largest_magnitude(blocks)
        scale = scale_of(largest)
        step = np.where(largest > 0, element.step(blocks * (np.float32(1) / scale)) * scale, np.float32(0))
        bottom = np.ldexp(np.float32(1), np.frexp(largest)[1] - 1)
        below_top = np.nextafter(bottom * 2, np.float32(0))
        low = np.where(blocks == largest, bottom, -below_top)
        high = np.where(blocks == -largest, -bottom, below_top)
        return spacing_out_of_blocks(Spacing(step, low, high), *x.shape)

    return Family(
        name,
        quantise,
        bits=bits + 8 / 32,
        block="32",
        idempotent=True,
        aliases=aliases,
        spacing=spacing,
        note=note,
    )


def _nvfp4_scales(blocks: Floats, largest: Floats, rows: int, fmt: Format) -> tuple[Floats, Floats]:
    """Each block's own scale, and the outer one: (k, 1)."""
    outer = largest.max() if "tensor" in fmt.settings else largest.reshape(rows, -1).max(axis=1)
    # so that the largest block's scale comes out as e4m3's largest number
    outer_scale = np.maximum(finite_or_nan(np.atleast_1d(outer)) / np.float32(6 * 448), SMALLEST_NORMAL)
    outer_scale = np.repeat(outer_scale, len(blocks) // len(outer_scale))[:, np.newaxis]
    block_scale, _ = E4M3FN.quantise(largest / np.float32(6) / outer_scale)
    return block_scale, outer_scale


def _nvfp4(x: Floats, fmt: Format) -> Rounded:
    blocks = in_blocks(x, 16)
    largest = reduce_blocks(np.maximum, np.abs(blocks))
    block_scale, outer_scale = _nvfp4_scales(blocks, largest, len(x), fmt)
    scale = block_scale * outer_scale
    scale[scale == 0] = np.inf  # a block too small for its scale: zeros
    values, clipped = E2M1.quantise(blocks / scale)
    values *= block_scale
    values *= outer_scale
    return out_of_blocks(values, *x.shape), mask_out_of_blocks(clipped, *x.shape)


def _nvfp4_spacing(x: Floats, fmt: Format) -> Spacing:
    blocks = in_blocks(x, 16)
    largest = reduce_blocks(np.maximum, np.abs(blocks))
    block_scale, outer_scale = _nvfp4_scales(blocks, largest, len(x), fmt)
    scale = block_scale * outer_scale
    step = np.where(scale > 0, E2M1.step(blocks / scale) * scale, np.float32(0))
    return spacing_out_of_blocks(below_largest(blocks, largest, step), *x.shape)


FAMILIES = (
    _mx("mxfp8_e4m3", E4M3FN, 8, "OCP MX: fp8_e4m3fn elements, E8M0 scale", ("mxfp8",)),
    _mx("mxfp8_e5m2", E5M2, 8, "OCP MX: fp8_e5m2 elements, E8M0 scale"),
    _mx("mxfp6_e2m3", E2M3, 6, "OCP MX: fp6_e2m3 elements, E8M0 scale", ("mxfp6",)),
    _mx("mxfp6_e3m2", E3M2, 6, "OCP MX: fp6_e3m2 elements, E8M0 scale"),
    _mx("mxfp4", E2M1, 4, "OCP MX: fp4_e2m1 elements, E8M0 scale"),
    _mx("mxint8", Int8Element(), 8, "OCP MX: codes -127 to 127 / 64, E8M0 scale"),
    Family(
        "nvfp4",
        _nvfp4,
        choices=(("tensor", "row"),),
        bits=4.5,
        block="16",
        spacing=_nvfp4_spacing,
        note="fp4_e2m1 elements, fp8_e4m3fn scale, and a float32 scale that the bits leave out",
    ),
)
