"""rms_norm_f32: ggml's bits for every input, on every instruction set, at any thread count."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from collections.abc import Callable
from itertools import pairwise

import ggml_oracle
import numpy as np
import pytest
from float_environments import (
    FTZ_AND_DAZ,
    LIBM,
    MXCSR_CONTROL,
    ROUNDING_MODES,
    X86_64_GLIBC,
    float_environment,
    foreign_environment,
)
from format_specs import TO_INFINITY
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    assert_row_stats,
    assert_same_bits,
    epsilons,
    float_arrays,
    layouts,
    make_row,
    seeds,
    shapes,
    widths,
)

import fq_kernels
from fq_kernels import Executor, reference, rms_norm_f32
from fq_kernels._kernels import N_STATS
from fq_kernels.rules import RowStat

# those that keep infinities; others are in test_narrow_floats.py
FORMATS = [f"{name},seed=7" if "stochastic" in name else name for name in TO_INFINITY]
# of those without a kernel: by element, by block, by row; test_formats_in_norms.py has all of them
BY_FUNCTION = ["mxfp6", "q8_0", "int8:asymmetric"]
SWAPPED = np.dtype("f4").newbyteorder()
SENTINEL = np.float32(-12345.678)


def rows_of(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def ggml(x: np.ndarray, eps: float, weight: np.ndarray | None = None) -> np.ndarray:
    return ggml_oracle.rms_norm(rows_of(x), eps, weight).reshape(x.shape)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ggml's bits


@given(x=float_arrays(), eps=epsilons)
def test_equals_ggml(isa, x, eps):
    assert_same_bits(rms_norm_f32(x, eps=eps), ggml(x, eps))


@given(data=st.data(), x=float_arrays(), eps=epsilons)
def test_equals_ggml_with_a_weight(isa, data, x, eps):
    n = x.shape[-1]
    weight = data.draw(float_arrays(st.just((n,))))
    assert_same_bits(rms_norm_f32(x, eps=eps, weight=weight), ggml(x, eps, weight))


@given(data=st.data(), x=float_arrays(), eps=epsilons)
def test_layout_of_input_and_output_does_not_matter(isa, data, x, eps):
    expected = ggml(x, eps)
    _, strided = data.draw(layouts(x.ndim)).place(x)
    memory, out = data.draw(layouts(x.ndim)).place(np.full_like(x, SENTINEL))
    before = memory.copy()
    assert rms_norm_f32(strided, eps=eps, out=out) is out
    assert_same_bits(out, expected)
    assert_same_bits(strided, x)
    out[...] = SENTINEL
    assert memory.tobytes() == before.tobytes(), "written beside the rows"
    assert rms_norm_f32(strided, eps=eps, out=strided) is strided
    assert_same_bits(strided, expected)


@given(data=st.data(), x=float_arrays(), eps=epsilons, point=st.sampled_from(["raw", "weighted"]))
@pytest.mark.parametrize("quant", [None, *FORMATS, *BY_FUNCTION])
def test_equals_the_reference(data, quant, x, eps, point):
    weight = data.draw(st.none() | float_arrays(st.just((x.shape[-1],))))
    options = {"eps": eps, "weight": weight, "quant": quant, "point": point}
    expected = reference.rms_norm_f32(x, **options)
    assert_same_bits(rms_norm_f32(x, **options), expected)
    inplace = x.copy()
    rms_norm_f32(inplace, **options, out=inplace)
    assert_same_bits(inplace, expected)


@pytest.mark.parametrize("point", ["raw", "weighted"])
@pytest.mark.parametrize("quant", [*FORMATS, *BY_FUNCTION])
def test_rounding_is_the_same_on_every_instruction_set(isa, quant, point):
    x, weight = normal(9, 576), normal(576, seed=1)
    x[1, 3], x[2, 570], x[5] = np.inf, np.nan, 0
    options = {"weight": weight, "quant": quant, "point": point, "first_row": 3}
    assert_same_bits(rms_norm_f32(x, **options), reference.rms_norm_f32(x, **options))


def test_the_two_points_are_the_compositions():
    x, weight = normal(5, 65), normal(65, seed=1)
    raw = rms_norm_f32(x)
    rounded_raw = rms_norm_f32(x, weight=weight, quant="bf16", point="raw")
    rounded_weighted = rms_norm_f32(x, weight=weight, quant="bf16", point="weighted")
    assert_same_bits(rounded_raw, fq_kernels.bf16_round_trip(raw) * weight)
    assert_same_bits(rounded_weighted, fq_kernels.bf16_round_trip(raw * weight))
    assert (rounded_raw != rounded_weighted).any()


def rows_whose_order_shows(n: int) -> np.ndarray:
    """(200, n) float32, n a power of two: rows whose mean square is another float if summed otherwise.

    The first three squares add up to the middle between two floats. The others are less than
    half a unit of that double each: a running sum loses them one by one and stays in the
    middle, any sum that gathers some of them first does not.
    """
    rng = np.random.default_rng(n)
    x = np.full((200, n), 2.0**-27, np.float32)
    x[:, 0] = rng.uniform(2**0.5 + 1e-3, 2, 200)  # squares from 2 to 4, two floats 2**-22 apart
    x[:, 1:3] = 2.0**-12
    return x


def sum_in_lanes(x: np.ndarray, lanes: int) -> np.ndarray:
    """Rows normalised with the sum of squares in ``lanes`` partial sums: fast and wrong."""
    squares = (x * x).astype(np.float64).reshape(len(x), -1, lanes)
    mean = (np.cumsum(squares, axis=1)[:, -1].sum(axis=1) / x.shape[1]).astype(np.float32)
    return x * (np.float32(1) / np.sqrt(mean))[:, np.newaxis]


@pytest.mark.parametrize("n", [64, 512, 1024, 2048])
def test_sums_whose_order_shows(isa, n):
    x = rows_whose_order_shows(n)
    expected = ggml(x, 0.0)
    for lanes in (2, 4, 8, 16, 32, 64):
        wrong = (sum_in_lanes(x, lanes) != expected).any(axis=1)
        assert wrong.sum() > 5, "these rows do not tell sums apart"
    assert_same_bits(rms_norm_f32(x, eps=0), expected)
    assert_same_bits(rms_norm_f32(x, eps=0, quant="f16"), reference.round_trip(expected, "f16"))


def summed_in_order(x):
    stats = np.empty((len(x), N_STATS))
    rms_norm_f32(x, row_stats=stats)
    return stats[:, RowStat.SUMMED_IN_ORDER]


def test_memory_of_others_is_taken():
    # whose buffers write the dtype as "<f"
    memory = (ctypes.c_float * 130)()
    x = np.ctypeslib.as_array(memory).reshape(2, 65)
    x[:] = normal(2, 65)
    assert_same_bits(rms_norm_f32(x, out=x), ggml(normal(2, 65), 1e-5))


def test_which_rows_are_summed_in_order(isa):
    ordinary, hard = normal(2000, 2048), rows_whose_order_shows(2048)
    if isa == "scalar":
        assert summed_in_order(ordinary).all()
        return
    # each row's interval is 2^-27 of the distance between two floats, or less
    assert summed_in_order(ordinary).sum() <= 1
    assert summed_in_order(hard).mean() > 0.5
    broken = normal(6, 2048)
    broken[:, 7] = [np.nan, -np.nan, np.inf, -np.inf, 3e38, 2e19]
    broken[4:, 8:1000] = broken[4:, 7:8]  # the products, or their sum's mean, overflow
    assert list(summed_in_order(broken)) == [1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("offset", [0, 1, 15])
@pytest.mark.parametrize("n", [1, 33, 576, 4097])
@pytest.mark.parametrize("options", [{}, {"quant": "bf16"}, {"quant": "bf16", "point": "weighted"}], ids=str)
def test_outputs_too_large_for_the_cache(isa, offset, n, options):
    rows = (1 << 19) // n + 3
    x = normal(rows, n)
    x[3, 0], x[5, -1] = np.nan, np.inf
    weight = normal(n, seed=1)
    memory = np.full(rows * n + 64, 7.0, np.float32)
    out = memory[offset : offset + rows * n].reshape(rows, n)
    rms_norm_f32(x, weight=weight, out=out, **options)
    small = [rms_norm_f32(part, weight=weight, **options) for part in np.array_split(x, 4)]
    assert_same_bits(out, np.concatenate(small))
    assert (memory[:offset] == 7.0).all() and (memory[offset + rows * n :] == 7.0).all()


@pytest.mark.parametrize(
    "eps", [0.0, 1e-45, 1e-40, 1e-5, 3e38, math.inf, 0, 2, np.float32(1e-6), np.float64(1e-6)]
)
def test_eps(isa, eps):
    rng = np.random.default_rng(2)
    kinds = ["normal", "zero", "subnormal", "subnormal squares", "huge", "infinite"]
    x = np.array([make_row(kind, 65, rng) for kind in kinds], np.float32)
    assert_same_bits(rms_norm_f32(x, eps=eps), ggml(x, float(eps)))


# Threads


@pytest.fixture(scope="module")
def executors():
    opened = [Executor(threads) for threads in (1, 2, 3, 7, 16)]
    yield opened
    for one in opened:
        one.close()


@pytest.mark.threads
@pytest.mark.parametrize("shape", [(300, 513), (40000, 3), (2, 20000), (7, 5, 9, 576)])
def test_thread_count_does_not_matter(isa, executors, shape):
    x = normal(*shape)
    rows_of(x)[1] *= np.float32(1e30)
    weight = normal(shape[-1], seed=1)
    plain = ggml(x, 1e-5, weight)
    options = {"weight": weight, "quant": "bf16:stochastic,seed=3", "point": "weighted"}
    rounded = rms_norm_f32(x, **options)
    stats = np.empty((rows_of(x).shape[0], N_STATS))
    rms_norm_f32(x, **options, row_stats=stats)
    for executor in executors:
        assert_same_bits(rms_norm_f32(x, weight=weight, executor=executor), plain)
        inplace, got = x.copy(), np.full_like(stats, np.nan)
        rms_norm_f32(inplace, **options, out=inplace, row_stats=got, executor=executor)
        assert_same_bits(inplace, rounded)
        assert got.tobytes() == stats.tobytes()


@pytest.mark.parametrize("least", [-40, -60], ids=["all near 1", "down to 2^-60"])
def test_ties_and_their_neighbours_in_the_norm(isa, least):
    # where mean + eps is 1 the norm returns x itself, and so can be given any value to round
    upper = np.arange(127 + least, 127, dtype=np.uint32)[:, None] << 7 | np.arange(128, dtype=np.uint32)
    upper = np.concatenate([upper.ravel(), upper.ravel() | 0x8000])
    lower = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF], np.uint32)
    x = np.random.default_rng(0).permutation((upper[:, None] << 16 | lower).ravel()).view(np.float32)
    for rows in np.split(x, 16):
        mean = np.float32(np.square(rows).astype(np.float64).sum() / len(rows))
        eps = np.float32(1) - mean
        assert mean + eps == 1
        # three rows, so that the first reading of one is that of the row before it too
        three = np.tile(rows, (3, 1))
        for point in ("raw", "weighted"):
            weight = np.ones(len(rows), np.float32)
            got = rms_norm_f32(three, eps=eps, weight=weight, quant="bf16", point=point)
            assert_same_bits(got, fq_kernels.bf16_round_trip(three))


@pytest.mark.parametrize("n", [8, 33, 96])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000])
def test_a_weight_that_is_not_finite_gives_nan_or_infinity(isa, n, bits):
    """Rounding in integers would carry a NaN's bits into the sign."""
    x, weight = normal(3, n), np.ones(n, np.float32)
    weight[n // 2] = np.uint32(bits).view(np.float32)
    for point in ("raw", "weighted"):
        got = rms_norm_f32(x, weight=weight, quant="bf16", point=point)[:, n // 2]
        assert np.isnan(got).all() if bits != 0x7F800000 else np.isinf(got).all()


# Which rows are rounded, and what stochastic rounding counts


@pytest.mark.parametrize("point", ["raw", "weighted"])
@pytest.mark.parametrize("n", [64, 65])
def test_the_first_rounded_row_after_others_may_be_of_any_kind(isa, n, point):
    """A row's kind is found out as the row before it is written, which here is not rounded."""
    rows = [normal(n), np.float32(1e-39) * normal(n), np.float32(1e30) * normal(n)]
    rows[1][0] = 1
    x, weight = np.stack(rows), np.full(n, 2.0**-9, np.float32)
    options = {"eps": 0.0, "weight": weight, "quant": "bf16", "point": point}
    got = rms_norm_f32(x, **options, quant_rows=(1, 3))
    for i in (1, 2):
        assert_same_bits(got[i : i + 1], rms_norm_f32(x[i : i + 1], **options))
        fq_kernels.force_isa("scalar")
        assert_same_bits(got[i : i + 1], rms_norm_f32(x[i : i + 1], **options))
        fq_kernels.force_isa(isa)


@pytest.mark.parametrize("rows", [(0, 0), (0, 1), (2, 4), (3, 6), (5, 99), (4, 2), (-3, 2)])
def test_quant_rows(rows):
    x = normal(2, 3, 65)
    plain, rounded = rows_of(rms_norm_f32(x)), rows_of(rms_norm_f32(x, quant="bf16:truncate"))
    assert (plain != rounded).any(axis=1).all()
    stats = np.full((6, N_STATS), np.nan)
    got = rows_of(rms_norm_f32(x, quant="bf16:truncate", quant_rows=rows, row_stats=stats))
    for i in range(6):
        inside = rows[0] <= i < rows[1]
        assert_same_bits(got[i], rounded[i] if inside else plain[i])
        assert stats[i, : RowStat.SUMMED_IN_ORDER].any() == inside


@pytest.mark.threads
@given(x=float_arrays(shapes(max_dims=3)), seed=seeds, rows=st.tuples(st.integers(-1, 4), st.integers(0, 5)))
@pytest.mark.parametrize("first", [None, "bf16", "int8:group=8"])
@pytest.mark.parametrize("then", ["f16", "bf16:stochastic,seed=5", "mxint8"])
def test_rounded_at_both_points(executor, first, then, x, seed, rows):
    weight = np.random.default_rng(seed).standard_normal(x.shape[-1]).astype(np.float32)
    options = {"weight": weight, "quant": first, "quant_rows": rows, "first_row": 3}
    expected = rms_norm_f32(x, **options)
    fq_kernels.round_trip(expected, then, out=expected, quant_rows=rows, first_row=3)
    assert_same_bits(rms_norm_f32(x, **options, result_quant=then, executor=executor), expected)


first_rows = st.sampled_from([0, 5, 2**40, 2**64 - 20])


@pytest.mark.threads
@given(cuts=st.sets(st.integers(1, 19)), n=widths, seed=seeds, first=first_rows)
def test_stochastic_does_not_see_how_rows_are_split_between_calls(executor, cuts, n, seed, first):
    x = np.random.default_rng(seed).standard_normal((20, n)).astype(np.float32)
    quant = f"bf16:stochastic,seed={seed}"
    whole = rms_norm_f32(x, quant=quant, first_row=first)
    bounds = [0, *sorted(cuts), 20]
    for begin, end in pairwise(bounds):
        part = rms_norm_f32(x[begin:end], quant=quant, first_row=first + begin, executor=executor)
        assert_same_bits(part, whole[begin:end])


def test_stochastic_rows_draw_numbers_of_their_own():
    x = np.tile(normal(1, 512), (4, 1))
    y = rms_norm_f32(x, quant="bf16:stochastic")
    assert len({row.tobytes() for row in y}) == 4
    assert rms_norm_f32(x, quant="bf16:stochastic", first_row=1)[:3].tobytes() == y[1:].tobytes()


# Row statistics


@given(x=float_arrays(shapes(max_dims=3)), data=st.data(), point=st.sampled_from(["raw", "weighted"]))
@pytest.mark.parametrize("quant", FORMATS)
def test_row_stats(quant, x, data, point):
    n = x.shape[-1]
    weight = data.draw(st.none() | float_arrays(st.just((n,)), ("normal", "zero", "any exponent")))
    stats = np.full((rows_of(x).shape[0], N_STATS), np.nan)
    rms_norm_f32(x, weight=weight, quant=quant, point=point, row_stats=stats)
    before = reference.rms_norm_f32(x, weight=weight if point == "weighted" else None)
    after = reference.round_trip(before, quant)
    assert_row_stats(stats, rows_of(before), rows_of(after))


def test_row_stats_are_zero_where_nothing_is_rounded():
    stats = np.full((3, N_STATS), np.nan)
    rms_norm_f32(normal(3, 65), row_stats=stats)
    assert not stats[:, : RowStat.SUMMED_IN_ORDER].any()


# Errors: they name the argument, and nothing is written


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def misaligned(*shape: int) -> np.ndarray:
    raw = np.zeros(4 * math.prod(shape) + 1, np.uint8)
    return raw[1:].view(np.float32).reshape(shape)


def stride_zero() -> np.ndarray:
    return np.lib.stride_tricks.as_strided(normal(8), (4, 8), (0, 4))


def sharing(offset: int, pitch: int = 8) -> dict:
    """x and out, both (4, 8), in one memory, out ``offset`` floats further on."""
    memory = normal(200)
    x = np.lib.stride_tricks.as_strided(memory[64:], (4, 8), (4 * pitch, 4))
    return {"x": x, "out": np.lib.stride_tricks.as_strided(memory[64 + offset :], (4, 8), (4 * pitch, 4))}


def backwards(x: np.ndarray) -> dict:
    return {"x": x, "out": x[::-1]}


def out_over(name: str) -> dict:
    memory = normal(4 * N_STATS * 2 + 32)
    if name == "weight":
        return {"out": memory[:32].reshape(4, 8), "weight": memory[31:39]}
    stats = memory[: 4 * N_STATS * 2].view(np.float64).reshape(4, N_STATS)
    return {"out": memory[78:110].reshape(4, 8), "quant": "bf16", "row_stats": stats}


def stats_over_x() -> dict:
    memory = normal(4 * N_STATS * 2)
    return {"x": memory[:32].reshape(4, 8), "row_stats": memory.view(np.float64).reshape(4, N_STATS)}


def stats_over_weight() -> dict:
    memory = normal(4 * N_STATS * 2)
    return {"weight": memory[:8], "row_stats": memory.view(np.float64).reshape(4, N_STATS)}


# id -> (exception, what the message says, arguments beside x, which is (4, 8), and out)
ERRORS = {
    "x float64": (TypeError, "x must .*float32.*float64", lambda: {"x": np.zeros((4, 8))}),
    "x int16": (TypeError, "x must .*float32.*int16", lambda: {"x": np.zeros((4, 8), np.int16)}),
    "x int32": (TypeError, "x must .*float32.*int32", lambda: {"x": np.zeros((4, 8), np.int32)}),
    "x foreign byte order": (TypeError, "x must .*float32.*f4", lambda: {"x": normal(4, 8).astype(SWAPPED)}),
    "x list": (TypeError, "x must .*list", lambda: {"x": [[0.0] * 8] * 4}),
    "x none": (TypeError, "x must ", lambda: {"x": None}),
    "x 0-d": (ValueError, "x must .*axis", lambda: {"x": np.array(1, np.float32), "out": None}),
    "x last axis strided": (ValueError, "axis of x ", lambda: {"x": normal(4, 16)[:, ::2]}),
    "x last axis backwards": (ValueError, "axis of x ", lambda: {"x": normal(4, 8)[:, ::-1]}),
    "x transposed": (ValueError, "axis of x ", lambda: {"x": normal(8, 4).T}),
    "x misaligned": (ValueError, "x is not aligned", lambda: {"x": misaligned(4, 8)}),
    "out float64": (TypeError, "out must .*float32.*float64", lambda: {"out": np.ones((4, 8))}),
    "out int16": (TypeError, "out must .*float32.*int16", lambda: {"out": np.ones((4, 8), np.int16)}),
    "out list": (TypeError, "out must .*list", lambda: {"out": [[0.0] * 8] * 4}),
    "out shape": (ValueError, "out has shape", lambda: {"out": normal(8, 4)}),
    "out one axis more": (ValueError, "out has shape", lambda: {"out": normal(1, 4, 8)}),
    "out last axis strided": (ValueError, "axis of out ", lambda: {"out": normal(4, 16)[:, ::2]}),
    "out read-only": (ValueError, "out is read-only", lambda: {"out": read_only(normal(4, 8))}),
    "out misaligned": (ValueError, "out is not aligned", lambda: {"out": misaligned(4, 8)}),
    "out stride zero": (ValueError, "out .*share", lambda: {"out": stride_zero()}),
    "out is x, stride zero": (ValueError, "out .*share", lambda: dict.fromkeys(("x", "out"), stride_zero())),
    "out one element on": (ValueError, "out overlaps x", lambda: sharing(1)),
    "out one element back": (ValueError, "out overlaps x", lambda: sharing(-1)),
    "out one row on": (ValueError, "out overlaps x", lambda: sharing(8)),
    "out one row back": (ValueError, "out overlaps x", lambda: sharing(-8)),
    "out rows interleaved, one short": (ValueError, "out overlaps x", lambda: sharing(7, pitch=16)),
    "out is x backwards": (ValueError, "out overlaps x", lambda: backwards(normal(4, 8))),
    "out over weight": (ValueError, "out overlaps weight", lambda: out_over("weight")),
    "out over row_stats": (ValueError, "out overlaps row_stats", lambda: out_over("row_stats")),
    "row_stats over x": (ValueError, "row_stats overlaps x", stats_over_x),
    "eps negative": (ValueError, "eps must ", lambda: {"eps": -1e-9}),
    "eps nan": (ValueError, "eps must ", lambda: {"eps": math.nan}),
    "eps none": (TypeError, "eps must ", lambda: {"eps": None}),
    "eps text": (TypeError, "eps must ", lambda: {"eps": "1e-5"}),
    "eps too large": (ValueError, "eps is too large", lambda: {"eps": 10**400}),
    "weight short": (ValueError, "weight has shape", lambda: {"weight": normal(7)}),
    "weight long": (ValueError, "weight has shape", lambda: {"weight": normal(9)}),
    "weight 2-d": (ValueError, "weight has shape", lambda: {"weight": normal(1, 8)}),
    "weight float64": (TypeError, "weight must ", lambda: {"weight": np.ones(8)}),
    "weight list": (TypeError, "weight must ", lambda: {"weight": [1.0] * 8}),
    "weight strided": (ValueError, "axis of weight ", lambda: {"weight": normal(16)[::2]}),
    "quant unknown": (ValueError, "unknown format .*bf17.*bf16", lambda: {"quant": "bf17"}),
    "quant number": (TypeError, "format", lambda: {"quant": 16}),
    "point unknown": (ValueError, "point must ", lambda: {"point": "after"}),
    "point none": (ValueError, "point must ", lambda: {"point": None}),
    "quant_rows number": (ValueError, "quant_rows must ", lambda: {"quant_rows": 3}),
    "quant_rows three": (ValueError, "quant_rows must ", lambda: {"quant_rows": (0, 1, 2)}),
    "quant_rows text": (ValueError, "quant_rows must ", lambda: {"quant_rows": ("a", "b")}),
    "first_row negative": (ValueError, "first_row must ", lambda: {"first_row": -1}),
    "first_row text": (ValueError, "first_row must ", lambda: {"first_row": "a"}),
    "row_stats float32": (TypeError, "row_stats must ", lambda: {"row_stats": normal(4, N_STATS)}),
    "row_stats short": (ValueError, "row_stats must ", lambda: {"row_stats": np.zeros((3, N_STATS))}),
    "row_stats narrow": (ValueError, "row_stats must ", lambda: {"row_stats": np.zeros((4, 8))}),
    "row_stats strided": (ValueError, "row_stats must ", lambda: {"row_stats": np.zeros((8, N_STATS))[::2]}),
    "weight over row_stats": (ValueError, "row_stats overlaps weight", stats_over_weight),
    "executor number": (TypeError, "executor must ", lambda: {"executor": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_write_nothing(case):
    error, message, make = ERRORS[case]
    arguments = {
        "x": normal(4, 8),
        "out": np.full((4, 8), SENTINEL),
        "row_stats": np.full((4, N_STATS), -1.5),
        "quant": "bf16",
        **make(),
    }
    arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
    before = [a.copy() for a in arrays]
    with pytest.raises(error, match=message):
        rms_norm_f32(arguments.pop("x"), **arguments)
    for array, old in zip(arrays, before, strict=True):
        assert array.tobytes() == old.tobytes()


@pytest.mark.threads
def test_a_closed_executor_writes_nothing():
    executor = Executor(2)
    executor.close()
    out = np.full((4, 8), SENTINEL)
    with pytest.raises(RuntimeError, match="closed"):
        rms_norm_f32(normal(4, 8), out=out, executor=executor)
    assert (out == SENTINEL).all()


# Accepted


def test_rows_in_one_memory_that_do_not_overlap():
    memory = normal(8, 65)
    x, out = memory[::2], memory[1::2]
    expected = rms_norm_f32(x.copy())
    assert_same_bits(rms_norm_f32(x, out=out), expected)
    both = sharing(8, pitch=16)
    expected = rms_norm_f32(both["x"].copy())
    assert_same_bits(rms_norm_f32(both["x"], out=both["out"]), expected)


def test_out_as_another_view_of_x_is_in_place():
    x = normal(4, 65)
    expected = rms_norm_f32(x)
    rms_norm_f32(x, out=x[:])
    assert_same_bits(x, expected)


def test_inputs_may_be_read_only_and_have_stride_zero():
    row = read_only(normal(1, 65))
    expected = rms_norm_f32(row)
    assert_same_bits(rms_norm_f32(np.broadcast_to(row, (3, 4, 65))), np.broadcast_to(expected, (3, 4, 65)))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (3, 0, 8), (0, 0)])
def test_empty(executor, shape):
    x = np.empty(shape, np.float32)
    stats = np.full((math.prod(shape[:-1]), N_STATS), np.nan)
    weight = np.ones(shape[-1], np.float32)
    y = rms_norm_f32(x, weight=weight, quant="bf16", executor=executor, row_stats=stats)
    assert y.shape == shape
    assert not stats.any()
    assert rms_norm_f32(x, out=x) is x


def test_a_last_axis_of_one_element_has_no_stride():
    x = normal(6, 4)[:, ::4]
    assert_same_bits(rms_norm_f32(x), ggml(x.copy(), 1e-5))


def test_out_is_returned_and_results_are_new():
    x, out = normal(4, 8), np.empty((4, 8), np.float32)
    assert rms_norm_f32(x, out=out) is out
    assert not np.shares_memory(rms_norm_f32(x), x)


def every_kernel(executor: Executor | None) -> list[Callable[[], np.ndarray]]:
    """Calls of every kernel on inputs where rounding and subnormals show."""
    rng = np.random.default_rng(11)
    kinds = ["normal", "subnormal", "subnormal squares", "any exponent", "zero", "normal"] * 12
    x = np.array([make_row(kind, 577, rng) for kind in kinds], np.float32)
    weight = make_row("normal", 577, rng) * np.float32(1e-30)
    small = np.full((2, 577), 1e-25, np.float32)
    blocks = rng.integers(0, 256, (64, 34 * 32), np.uint8)
    blocks[:, 1::34] &= 0x03  # subnormal scales
    vectors = normal(3, 1024, seed=1) * np.float32(1e-3)
    heads = normal(48, 20, 16, seed=3)
    angles = normal(48, 8, seed=2)
    cos, sin = np.cos(angles), np.sin(angles)
    return [
        lambda: rms_norm_f32(x, weight=weight, executor=executor),
        lambda: rms_norm_f32(x, eps=0, quant="f16", executor=executor),
        lambda: rms_norm_f32(small, eps=1e-41, executor=executor),  # eps is subnormal as a float32
        lambda: rms_norm_f32(small, eps=1e-5, executor=executor),  # eps lies between two float32
        lambda: rms_norm_f32(x, weight=weight, quant="int8", executor=executor),
        lambda: rms_norm_f32(x, eps=0, weight=weight, quant="mxint8", point="weighted", executor=executor),
        lambda: fq_kernels.round_trip(x, "f16", executor=executor),
        lambda: fq_kernels.round_trip(x, "int4:asymmetric,group=16", executor=executor),
        lambda: fq_kernels.bf16_round_trip(x, executor=executor),
        lambda: fq_kernels.dequantize(blocks, 8, executor=executor),
        lambda: fq_kernels.dequantize(blocks, 1, executor=executor),
        lambda: fq_kernels.matvec(vectors, blocks, 8, executor=executor),
        lambda: fq_kernels.rope(heads.copy(), cos, sin, executor=executor),
    ]


@pytest.mark.threads
@pytest.mark.parametrize("threads", [None, 1, 3])
@pytest.mark.parametrize("mode", ROUNDING_MODES)
def test_a_foreign_rounding_mode_does_not_matter(isa, mode, threads):
    expected = [call() for call in every_kernel(None)]
    executor = None if threads is None else Executor(threads)
    calls = every_kernel(executor)
    with foreign_environment(ROUNDING_MODES[mode]):
        got = [call() for call in calls]  # starts the executor's threads, which inherit the mode
        after = LIBM.fegetround()
    if executor:
        executor.close()
    assert after == ROUNDING_MODES[mode]
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.threads
@pytest.mark.skipif(not X86_64_GLIBC, reason="reads MXCSR out of x86-64 glibc's fenv_t")
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_flushing_of_subnormals_does_not_matter(isa, threads):
    expected = [call() for call in every_kernel(None)]
    executor = None if threads is None else Executor(threads)
    calls = every_kernel(executor)
    subnormal = np.full(1, 1e-40, np.float32)
    with foreign_environment(mxcsr_bits=FTZ_AND_DAZ):
        before = float_environment().mxcsr
        flushed = float((subnormal * subnormal.dtype.type(2)).view(np.uint32)[0]) == 0
        got = [call() for call in calls]
        after = float_environment().mxcsr
    if executor:
        executor.close()
    assert flushed, "subnormals are not flushed, so this would show nothing"
    assert before & FTZ_AND_DAZ == FTZ_AND_DAZ
    assert after & MXCSR_CONTROL == before & MXCSR_CONTROL
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
