"""The numeric contract of the norm and the roundings in readable numpy.

The kernels must equal these functions bit for bit, NaN payloads aside. Nothing here is fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ._kernels import default_fpu
from .formats import Format, get_format
from .formats.kernels import NarrowRule
from .formats.narrow_floats import ROUNDINGS
from .units import NormUnit

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
        y: Floats = (x * scale[..., np.newaxis]).reshape(-1, n)
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
def rms_norm_unit(
    x: Floats,
    unit: str | NormUnit,
    *,
    eps: float = 1e-5,
    weight: Floats | None = None,
    first_row: int = 0,
) -> Floats:
    """Root-mean-square norm of each row of x, (..., n) float32 with n > 0, by a unit; a new array.

    The arguments mean what those of fq_kernels.rms_norm_unit mean.
    """
    unit = NormUnit.parse(unit) if isinstance(unit, str) else unit
    n = x.shape[-1]
    rows = np.ascontiguousarray(x.reshape(-1, n))
    numbers = [first_row + row for row in range(len(rows))]

    def rounded(step: str, values: Floats, firsts: list[int], stage: int = 0) -> Floats:
        """values (rows, m), of which row r's count from firsts[r] on for random numbers."""
        fmt = unit.formats.get(step)
        if fmt is None:
            return values
        if not fmt.seeded:
            return round_trip(values, fmt)
        fmt = fmt.with_seed((fmt.seed + stage) % 2**64)
        return np.stack(
            [round_trip(row, fmt, first_index=first) for row, first in zip(values, firsts, strict=True)]
        )

    outer = "acc" if unit.sum_order.outer is None else "order"

    def add(a: Floats, b: Floats, i: int, stage: int) -> Floats:
        step = outer if stage and unit.sum_order.kind == "chunk" else "acc"
        return rounded(step, a + b, [number * n + i for number in numbers], stage)

    starts = [number * n for number in numbers]
    f32 = np.float32
    with np.errstate(all="ignore"):
        a = rounded("x", rows, starts)
        squares = rounded("square", a * a, starts)
        if unit.sums_in_double:
            total = np.cumsum(squares.astype(np.float64), axis=1)[:, -1:]
            mean = (total / n).astype(f32)
        else:
            mean = _sum_in_order(squares, unit, add) / f32(n)
        mean = rounded("mean", mean, numbers)
        if unit.eps_outside:
            root = f32(1) / (np.sqrt(mean) + f32(eps))
        else:
            mean = rounded("mean", mean + f32(eps), numbers, 1)
            root = np.array([[inverse_root(v, unit)] for v in mean[:, 0]], f32).reshape(-1, 1)
        scale = rounded("rsqrt", root, numbers)
        y = rounded("raw", a * scale, starts)
        if weight is not None:
            y = y * _gains(weight, unit)
        y = rounded("out", y, starts)
    return y.reshape(x.shape)


def _gains(weight: Floats, unit: NormUnit) -> Floats:
    stored = unit.formats.get("weight")
    if not unit.gain_rule.one_plus:
        gains = weight if stored is None else round_trip(weight, stored)
    else:
        w = weight - np.float32(1)
        gains = np.float32(1) + (w if stored is None else round_trip(w, stored))
    fmt = unit.gain_rule.format
    return gains if fmt is None else round_trip(gains, fmt)


Add = Callable[[Floats, Floats, int, int], Floats]


def _sum_in_order(q: Floats, unit: NormUnit, add: Add) -> Floats:
    """q (rows, n) -> (rows, 1) float32. add(a, b, i, stage) adds two columns, or several, and rounds."""
    n = q.shape[1]
    order = unit.sum_order
    zero = np.zeros((len(q), 1), np.float32)

    def in_order(begin: int, end: int) -> Floats:
        total = zero
        for i in range(begin, end):
            total = add(total, q[:, i : i + 1], i, 0)
        return total

    if order.kind == "lanes":
        lanes = np.zeros((len(q), order.n), np.float32)
        for i in range(0, n, order.n):
            some = q[:, i : i + order.n]
            m = some.shape[1]
            lanes[:, :m] = add(lanes[:, :m], some, i, 0)
        stage = 1
        while (half := lanes.shape[1] // 2) > 0:
            lanes = add(lanes[:, :half], lanes[:, half:], 0, stage)
            stage += 1
        return lanes
    if order.kind == "tree":
        if n == 1:
            return add(zero, q, 0, 0)
        stage = 1
        while q.shape[1] > 1:
            pairs = q.shape[1] // 2 * 2
            q = np.concatenate([add(q[:, 0:pairs:2], q[:, 1:pairs:2], 0, stage), q[:, pairs:]], axis=1)
            stage += 1
        return q
    if order.kind == "chunk":
        total = zero
        for number, begin in enumerate(range(0, n, order.n)):
            total = add(total, in_order(begin, min(begin + order.n, n)), number, 1)
        return total
    if order.kind == "torch":
        return _sum_as_torch(q, add)
    return in_order(0, n)


def _sum_as_torch(q: Floats, add: Add) -> Floats:
    """Its sum on x86: blocks of 32 in lanes, in four levels, each handed on when it has had 16."""
    rows, n = q.shape
    levels = [np.zeros((rows, 32), np.float32) for _ in range(4)]
    blocks = n // 32
    for block in range(blocks):
        levels[0] = add(levels[0], q[:, 32 * block : 32 * block + 32], 32 * block, 0)
        for level in (1, 2, 3):
            if (block + 1) % 16**level:
                break
            levels[level] = add(levels[level], levels[level - 1], (block + 1) // 16 * 32, level)
            levels[level - 1] = np.zeros_like(levels[0])
    lanes = levels[0]
    for level in (1, 2, 3):
        lanes = add(lanes, levels[level], 32 * level, 4)
    eights = n // 8 * 8
    first = lanes[:, :8]
    for i in range(32 * blocks, eights, 8):
        first = add(first, q[:, i : i + 8], i, 0)
    for i in (8, 16, 24):
        first = add(first, lanes[:, i : i + 8], i, 5)
    total = np.zeros((rows, 1), np.float32)
    for i in range(eights, n):
        total = add(total, q[:, i : i + 1], i, 0)
    for j in range(8):
        total = add(total, first[:, j : j + 1], j, 6)
    return total


def inverse_root(v: np.float32, unit: NormUnit) -> np.float32:
    """1 / sqrt(v) as the unit computes it, before it is rounded to a format."""
    f32 = np.float32
    root = unit.inverse_root
    y: np.float32
    if not (root.table_bits or root.newton) or not 0 < v < np.inf:
        exact: np.float32 = f32(1) / np.sqrt(v)
        return exact
    if root.table_bits:
        f, exponent = math.frexp(float(v))
        f, exponent = 2 * f, exponent - 1  # 1 <= f < 2
        if exponent % 2:
            f, exponent = 2 * f, exponent - 1
        octave = 2.0 if f >= 2 else 1.0
        width = octave / 2 ** (root.table_bits - 1)
        a = math.floor(f / width) * width
        b = a + width
        if root.linear:
            y0, y1 = f32(1 / math.sqrt(a)), f32(1 / math.sqrt(b))
            y = y0 + f32((f - a) / (b - a)) * (y1 - y0)
        else:
            y = f32(2 / (math.sqrt(a) + math.sqrt(b)))
        y = y * f32(2.0 ** (-exponent // 2))
    else:
        y = (np.uint32(0x5F3759DF) - (v.view(np.uint32) >> np.uint32(1))).view(f32)
    half = f32(0.5) * v
    for _ in range(root.newton):
        y = y * (f32(1.5) - (half * y) * y)
    return y


@default_fpu()
def round_trip(x: Floats, quant: str | Format, *, first_index: int = 0) -> Floats:
    """Each element of x, (...) float32, rounded to ``quant`` and widened again.

    first_index is what stochastic rounding counts the first element as. Those whose
    elements share a scale, and those without a kernel, are their own reference: x is rounded as rows of its
    last axis.
    """
    fmt = get_format(quant)
    if fmt.kernel.quant == 0 or fmt.kernel.blocks is not None:
        return fmt.quantise(x.reshape(-1, x.shape[-1])).values.reshape(x.shape)
    if fmt.kernel.narrow is not None:
        return narrow_float(x, fmt.kernel.narrow, seed=fmt.seed, first_index=first_index)
    return bf16_to_float(float_to_bf16(x, rounding=fmt.rounding, seed=fmt.seed, first_index=first_index))


def bf16_to_float(bits: npt.NDArray[np.uint16]) -> Floats:
    """(...) uint16 bf16 codes -> float32: the upper half of the bits."""
    wide: npt.NDArray[np.uint32] = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


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


@default_fpu()
def narrow_float(x: Floats, rule: NarrowRule, *, seed: int = 0, first_index: int = 0) -> Floats:
    """(...) float32 rounded as src/rounding/narrow.h says, in float64, where each step is exact."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        magnitude = np.abs(x.astype(np.float64))
    finite = np.isfinite(magnitude)
    size = np.where(finite, magnitude, 0)
    down = np.signbit(x)
    # the numbers around x are `step` apart
    emin = max(rule.min_exponent - 127, -126)
    exponent = np.maximum(np.frexp(size)[1] - 1, emin)
    step = np.ldexp(1.0, exponent - (23 - rule.shift))
    below = np.floor(size / step)
    part = size / step - below  # of a step, above the number below
    odd = below % 2 == 1
    rounding = ROUNDINGS[rule.rounding]
    if rounding == "nearest-even":
        away = (part > 0.5) | ((part == 0.5) & odd)
    elif rounding == "nearest-away":
        away = part >= 0.5
    elif rounding == "truncate":
        away = np.zeros(x.shape, np.bool_)
    elif rounding == "up":
        away = (part > 0) & ~down
    elif rounding == "down":
        away = (part > 0) & down
    elif rounding == "odd":
        away = (part > 0) & ~odd
    else:
        seen = np.floor(np.ldexp(part, 31))
        drawn = random_bits(seed, first_index, x.shape, rule.random_bits).astype(np.float64)
        away = seen + np.ldexp(drawn, 31 - rule.random_bits) >= 2.0**31
    result = (below + away) * step
    number = {name: float(np.uint32(getattr(rule, name)).view(np.float32)) for name in rule._fields}
    result[result < number["flush"]] = 0
    beyond = result > number["largest"]
    everywhere = np.ones(x.shape, np.bool_)
    inward = {"truncate": everywhere, "odd": everywhere, "up": down, "down": ~down}.get(rounding, ~everywhere)
    result = np.where(beyond, np.where(inward, number["largest"], number["overflow"]), result)
    result = np.where(np.isinf(magnitude), number["overflow"], result)
    result = np.where(np.isnan(magnitude), np.nan, result)
    negative = down & ~((result == 0) & bool(rule.one_zero))
    return np.copysign(result, np.where(negative, -1.0, 1.0)).astype(np.float32)


def random_16(seed: int, first_index: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """Numbers in [0, 2**16), a function of seed and element index (C order) alone: SplitMix64."""
    return random_bits(seed, first_index, shape, 16)


def random_bits(seed: int, first_index: int, shape: tuple[int, ...], n: int) -> npt.NDArray[np.uint32]:
    """As random_16, in [0, 2**n)."""
    size = int(np.prod(shape))
    index = np.arange(size, dtype=np.uint64) + np.uint64((first_index + 1) % 2**64)
    start = _mix(np.array([seed], np.uint64))
    numbers = _mix(start + index * np.uint64(0x9E3779B97F4A7C15))
    upper: npt.NDArray[np.uint64] = numbers >> np.uint64(64 - n)
    return upper.astype(np.uint32).reshape(shape)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
