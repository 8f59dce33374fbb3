"""ggml's block formats, quantised and dequantised as ggml-quants.c does it, bit for bit.

Each function takes (k, size) blocks and returns what ggml's quantize_row_*_ref followed by
dequantize_row_* gives. What ggml leaves undefined: a block with a NaN or an infinity is NaN
here; where a scale's inverse overflows (a largest value below 1e-37) the codes are 0, which
is what x86 makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Floats, Rounded, Spacing
from .blocks import (
    below_largest,
    between_extremes,
    finite_or_nan,
    in_blocks,
    largest_magnitude,
    mask_out_of_blocks,
    out_of_blocks,
    reduce_blocks,
    signed_largest,
    spacing_out_of_blocks,
)
from .format import Family, Format
from .kernels import (
    AROUND_ZERO,
    BLOCKS,
    FROM_MINIMUM,
    IQ4_NL,
    Q8_0,
    Q8_0_NEAREST_EVEN,
    Q8_K,
    BlockRule,
    Kernel,
)

HALF = np.float32(0.5)
# The largest float32 below a half: trunc(|x| + this) is roundf(|x|) for every |x| < 2**22;
# with a half itself the float before a half would come out as 1.
BELOW_HALF = np.nextafter(HALF, np.float32(0))

IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# Twice the middles between neighbours; they are integers, so the place of x among the middles
# is that of floor(2 x), which indexes a table.
_MIDDLES = (IQ4_NL_VALUES[:-1] + IQ4_NL_VALUES[1:]).astype(int)
_NEAREST = IQ4_NL_VALUES[np.searchsorted(_MIDDLES, np.arange(-256, 256), side="right")]


def _half(d: Floats) -> Floats:
    """The scale as it is stored, in IEEE half precision."""
    return d.astype(np.float16).astype(np.float32)


def _times_inverse(blocks: Floats, d: Floats) -> Floats:
    """blocks * (1 / d) with 1 / 0 = 0, and 0 where 1 / d overflows."""
    inverse: Floats = np.float32(1) / d
    inverse[np.isinf(inverse)] = 0
    scaled: Floats = blocks * inverse
    return scaled


def q8_0(blocks: Floats, rounding: str = "nearest-away") -> Rounded:
    """nearest-away is the reference; nearest-even is what ggml's x86 code does, inverse scale included."""
    largest = largest_magnitude(blocks)
    d = largest / np.float32(127)
    if rounding == "nearest-even":
        inverse = np.float32(127) / largest
        inverse[np.isinf(inverse)] = 0
        q = blocks * inverse
        np.rint(q, out=q)
    else:
        q = _times_inverse(blocks, d)
        q += np.copysign(BELOW_HALF, q)
        np.trunc(q, out=q)
    q += 0.0  # codes are integers: no -0
    q *= _half(d)
    return q, None


def q8_k(blocks: Floats) -> Rounded:
    largest = signed_largest(blocks)
    inverse = np.float32(-127) / largest
    d = np.where(largest == 0, np.float32(0), np.float32(1) / inverse)
    inverse[np.isinf(inverse)] = 0
    q = blocks * inverse
    np.rint(q, out=q)
    q += 0.0
    q *= d
    return q, None


def _around_zero(blocks: Floats, bits: int) -> Rounded:
    """The element of largest magnitude gets the lowest code, whatever its sign."""
    low, n_codes = -(2 ** (bits - 1)), 2**bits
    d = signed_largest(blocks) / np.float32(low)
    q = _times_inverse(blocks, d)
    q += np.float32(0.5 - low)
    np.trunc(q, out=q)
    clipped = q >= n_codes
    np.minimum(q, n_codes - 1, out=q)
    q += np.float32(low)
    q *= _half(d)
    return q, clipped


def _from_minimum(blocks: Floats, bits: int) -> Rounded:
    """d * q + m from the smallest value up."""
    top = np.float32(2**bits - 1)
    m = finite_or_nan(reduce_blocks(np.minimum, blocks))
    highest = finite_or_nan(reduce_blocks(np.maximum, blocks))
    d = (highest - m) / top
    q = _times_inverse(blocks - m, d)
    q += HALF
    np.trunc(q, out=q)
    np.minimum(q, top, out=q)
    q *= _half(d)
    q += _half(m)
    return q, None


def iq4_nl(blocks: Floats) -> Rounded:
    """Codes nearest under the scale that maps the largest element to -127, then the best scale for them."""
    largest = signed_largest(blocks)
    scaled = blocks * (np.float32(1) / (largest / IQ4_NL_VALUES[0]))
    place = np.floor(scaled * 2) + 256
    q = _NEAREST.take(place.astype(np.int32), mode="clip")
    # sums in ggml's order: element after element, in float32
    weighted = (blocks * blocks) * q
    sum_qx: Floats = np.add.accumulate(weighted * blocks, axis=1)[:, -1:]
    sum_q2: Floats = np.add.accumulate(weighted * q, axis=1)[:, -1:]
    d = _half(sum_qx / sum_q2)
    q *= d
    q[np.abs(largest[:, 0]) < np.float32(1e-15)] = 0
    return q, None


def _parts_of_largest(parts: int) -> Callable[[Floats], Spacing]:
    def spacing(blocks: Floats) -> Spacing:
        largest = largest_magnitude(blocks)
        return below_largest(blocks, largest, largest / np.float32(parts))

    return spacing


def _parts_of_range(parts: int) -> Callable[[Floats], Spacing]:
    def spacing(blocks: Floats) -> Spacing:
        low, high = (finite_or_nan(reduce_blocks(op, blocks)) for op in (np.minimum, np.maximum))
        return between_extremes(blocks, low, high, (high - low) / np.float32(parts))

    return spacing


def _iq4_nl_spacing(blocks: Floats) -> Spacing:
    """By the scale that the codes are found with; the one that is kept follows the codes."""
    largest = signed_largest(blocks)
    d = largest / IQ4_NL_VALUES[0]
    above = np.clip(np.searchsorted(IQ4_NL_VALUES, blocks / d), 1, len(IQ4_NL_VALUES) - 1)
    step = (IQ4_NL_VALUES[above] - IQ4_NL_VALUES[above - 1]) * np.abs(d)
    return below_largest(blocks, np.abs(largest), step)


def _family(
    name: str,
    fn: Callable[..., Rounded],
    bits: float,
    roundings: str | tuple[str, ...],
    rule: int | dict[str, int],
    spacing: Callable[[Floats], Spacing],
    note: str,
    size: int = 32,
    top: float = 0,
    idempotent: bool = True,
) -> Family:
    several = isinstance(roundings, tuple)

    def quantise(x: Floats, fmt: Format) -> Rounded:
        blocks = in_blocks(x, size)
        values, clipped = fn(blocks, fmt.rounding) if several else fn(blocks)
        return out_of_blocks(values, *x.shape), mask_out_of_blocks(clipped, *x.shape)

    def kernel(fmt: Format) -> Kernel:
        number = rule[fmt.rounding] if isinstance(rule, dict) else rule
        return Kernel(BLOCKS, blocks=BlockRule(number, size=size, top=top))

    return Family(
        name,
        quantise,
        kernel=kernel,
        roundings=roundings if isinstance(roundings, tuple) else (roundings,),
        bits=bits,
        block=str(size),
        idempotent=idempotent,
        spacing=lambda x, fmt: spacing_out_of_blocks(spacing(in_blocks(x, size)), *x.shape),
        note=note,
    )


_ROUNDINGS = ("nearest-away", "nearest-even")
_Q8_0 = dict(zip(_ROUNDINGS, (Q8_0, Q8_0_NEAREST_EVEN), strict=True))
_EIGHT = _parts_of_largest(127)

# Bits: the block_* structures of ggml-common.h, in bits, by their 32 or 256 values.
FAMILIES = (
    _family(
        "q8_0", q8_0, 8.5, _ROUNDINGS, _Q8_0, _EIGHT, "half-precision scale; nearest-even is ggml's x86 code"
    ),
    _family("q8_1", q8_0, 9.0, _ROUNDINGS, _Q8_0, _EIGHT, "q8_0's values; a block also stores their sum"),
    _family(
        "q8_k",
        q8_k,
        9.125,
        "nearest-even",
        Q8_K,
        _EIGHT,
        "float32 scale; stores sums of 16 values",
        256,
        idempotent=False,
    ),
    _family(
        "q4_0",
        lambda b: _around_zero(b, 4),
        4.5,
        "nearest-up",
        AROUND_ZERO,
        _parts_of_largest(8),
        "codes -8 to 7",
        top=16,
    ),
    _family(
        "q4_1",
        lambda b: _from_minimum(b, 4),
        5.0,
        "nearest-up",
        FROM_MINIMUM,
        _parts_of_range(15),
        "scale and minimum; 0 has no code of its own",
        top=15,
        idempotent=False,
    ),
    _family(
        "q5_0",
        lambda b: _around_zero(b, 5),
        5.5,
        "nearest-up",
        AROUND_ZERO,
        _parts_of_largest(16),
        "codes -16 to 15",
        top=32,
    ),
    _family(
        "q5_1",
        lambda b: _from_minimum(b, 5),
        6.0,
        "nearest-up",
        FROM_MINIMUM,
        _parts_of_range(31),
        "scale and minimum; 0 has no code of its own",
        top=31,
        idempotent=False,
    ),
    _family(
        "iq4_nl",
        iq4_nl,
        4.5,
        "nearest-up",
        IQ4_NL,
        _iq4_nl_spacing,
        "16 values of a fixed table, 0 not among them; no importance matrix",
        idempotent=False,
    ),
)
