"""The numeric contract of the norm and the roundings in readable numpy.

The kernels must equal these functions bit for bit, NaN payloads aside. Nothing here is fast.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ._kernels import default_fpu
from .formats import Format, get_format

Floats = npt.NDArray[np.float32]


@default_fpu()
def sum_of_squares(x: Floats) -> npt.NDArray[np.float64]:
    """(..., n) float32 -> (...) float64: squares rounded to float32, added in index order."""
    squares = (x * x).astype(np.float64)
    return np.cumsum(squares, axis=-1)[..., -1]  # np.sum adds pairwise; a running sum cannot


@default_fpu()
def rms_norm_f32(
    x: Floats,
    *,
    eps: float = 1e-5,
    weight: Floats | None = None,
    quant: str | Format | None = None,
    point: str = "raw",
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
) -> Floats:
    """Root-mean-square norm of each row of x, (..., n) float32 with n > 0; a new array.

    weight is (n,) float32. The arguments mean what those of fq_kernels.rms_norm_f32 mean.
    """
    n = x.shape[-1]
    with np.errstate(all="ignore"):
        mean = (sum_of_squares(x) / n).astype(np.float32)  # divided in double, rounded once
        scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
        y = (x * scale[..., np.newaxis]).reshape(-1, n)
        if weight is not None and point == "weighted":
            y = y * weight
        if quant is not None:
            begin, end = (0, len(y)) if quant_rows is None else quant_rows
            begin, end = max(begin, 0), max(end, 0)
            y[begin:end] = round_trip(y[begin:end], quant, first_index=(first_row + begin) * n)
        if weight is not None and point == "raw":
            y = y * weight
    return y.reshape(x.shape)


@default_fpu()
def round_trip(x: Floats, quant: str | Format, *, first_index: int = 0) -> Floats:
    """Each element of x, (...) float32, rounded to ``quant`` and widened again.

    first_index is what stochastic rounding counts the first element as. Formats that have no
    kernel are their own reference: x is rounded as rows of its last axis.
    """
    fmt = get_format(quant)
    if not fmt.kernel_rule:
        return fmt.quantise(x.reshape(-1, x.shape[-1])).values.reshape(x.shape)
    if fmt.name == "f16":
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(np.float16).astype(np.float32)
    return bf16_to_float(float_to_bf16(x, rounding=fmt.rounding, seed=fmt.seed, first_index=first_index))


def bf16_to_float(bits: npt.NDArray[np.uint16]) -> Floats:
    """(...) uint16 bf16 codes -> float32: the upper half of the bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(
    x: Floats, *, rounding: str = "nearest-even", seed: int = 0, first_index: int = 0
) -> npt.NDArray[np.uint16]:
    """(...) float32 -> bf16 codes, uint16.

    first_index is what stochastic rounding counts the first element as.
    """
    u = np.ascontiguousarray(x).view(np.uint32)
    magnitude = u & 0x7FFFFFFF
    upper, lower, sign = u >> 16, u & 0xFFFF, (u >> 16) & 0x8000
    # One step up in the upper half is one step away from zero, from the largest finite
    # number to infinity included.
    if rounding in ("nearest-even", "nearest-even-ftz"):
        odd = (upper & 1) == 1
        code = upper + ((lower > 0x8000) | ((lower == 0x8000) & odd))
        if rounding == "nearest-even-ftz":
            code = np.where(magnitude < 0x00800000, sign, code)
    elif rounding == "truncate":
        code = upper
    elif rounding == "nearest-away":
        code = upper + (lower >= 0x8000)
    elif rounding == "stochastic":
        code = upper + (lower + random_16(seed, first_index, x.shape) > 0xFFFF)
    else:
        raise ValueError(f"unknown rounding {rounding!r}")
    code = np.where(magnitude == 0x7F800000, upper, code)
    code = np.where(magnitude > 0x7F800000, upper | 64, code)
    return code.astype(np.uint16)


def random_16(seed: int, first_index: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """Numbers in [0, 2**16), a function of seed and element index (C order) alone: SplitMix64."""
    size = int(np.prod(shape))
    index = np.arange(size, dtype=np.uint64) + np.uint64((first_index + 1) % 2**64)
    start = _mix(np.array([seed], np.uint64))
    numbers = _mix(start + index * np.uint64(0x9E3779B97F4A7C15))
    return (numbers >> np.uint64(48)).astype(np.uint32).reshape(shape)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
