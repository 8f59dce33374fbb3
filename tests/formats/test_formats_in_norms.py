"""Every format where it is used: in the norms of FakeQuant, at both points, in both modes.

What comes out must be the reference's norm, then the format, then the weight, bit for bit, and have
the properties that docs/formats.md promises; what is counted must be what numpy counts.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from format_specs import ELEMENTS, OPTIONS, SPECS, WITH_INFINITY, WITHOUT_MINUS_ZERO, WITHOUT_ZERO, block_size
from hypothesis import given, note
from hypothesis import strategies as st
from strategies import assert_row_stats, assert_same_bits, epsilons, float_arrays, layouts, make_row

from fq_kernels import Executor, get_format, reference, register_format, rms_norm_f32, round_trip
from fq_kernels._kernels import N_STATS
from fq_kernels.formats import Format, unregister_format
from fq_kernels.rules import MODES, FakeQuant, Place, RowStat, Rule, Value

F32 = np.float32
NORM = Place("ffn_norm", 0)
POINTS = ("raw", "weighted")  # of what it computes
# A user's own function: to eighths, cut at +-15.875. Registered while this module's tests run.
OWN = "in_eighths"
EVERY = [*(spec for spec in SPECS if spec != "bf16:stochastic"), "bf16:stochastic,seed=7", OWN]
ALONE = [*ELEMENTS, OWN]  # each element is rounded alone
# one of each kind, for what does not depend on the numbers
KINDS = ["bf16", "fp8_e4m3fn", "int8:asymmetric", "int4:tensor", "q8_k", "mxfp4", "nvfp4", OWN]


@pytest.fixture(scope="module", autouse=True)
def own_format():
    register_format(OWN, lambda x: np.clip(np.rint(x * 8), -127, 127) / 8, largest=15.875, idempotent=True)
    yield
    unregister_format(OWN)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def hard_rows(n: int) -> np.ndarray:
    """(11, n): a row of each kind that there is."""
    rng = np.random.default_rng(3)
    kinds = ("normal", "any exponent", "subnormal", "subnormal squares", "huge", "overflowing sum", "zero",
             "signed zeros", "sparse", "infinite", "nan")  # fmt: skip
    return np.array([make_row(kind, n, rng) for kind in kinds], F32)


def clipped_by(fmt: Format, value: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Elements out of range; stochastic rounding, which counts elements, clips none but these."""
    clipped = np.isfinite(value) & ~np.isfinite(result)
    if fmt.rounding != "stochastic":
        found = fmt.quantise(value).clipped
        assert found is not None or not clipped.any()
        clipped = clipped if found is None else found
    return clipped


def with_weight(y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return y * weight


def outer_shapes(n) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(1, 4), n)


# not multiples of any block, too short for one, and several blocks
lengths = st.sampled_from([1, 5, 16, 33, 257])


# ---------------------------------------------------------------- norm, then format, then weight


@given(data=st.data(), x=float_arrays(outer_shapes(lengths)), eps=epsilons)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS)
def test_the_reference_then_the_format_then_the_weight(executor, point, mode, data, x, eps):
    rows, n = x.shape
    weight = data.draw(float_arrays(st.just((n,))))
    first = data.draw(st.integers(1, rows))
    for spec in EVERY:
        note(spec)
        rules = FakeQuant([Value(NORM)], Rule(spec, point=point, mode=mode))
        (counter,) = rules.matched
        assert counter.format is not None and get_format(str(counter.format)) == counter.format
        expected = np.zeros((0, N_STATS))
        for begin, end in ((0, first), (first, rows)):
            part = x[begin:end]
            y = np.empty_like(part)
            rules.rms_norm(NORM, part, eps=eps, weight=weight, out=y, executor=executor)
            wanted = len(part) if mode == "every" else int(begin == 0)
            value = reference.rms_norm_f32(part, eps=eps, weight=weight if point == "weighted" else None)
            result = value.copy()
            result[:wanted] = reference.round_trip(value[:wanted], counter.format, first_index=begin * n)
            assert_same_bits(y, with_weight(result, weight) if point == "raw" else result)
            # the same call again, to see each row's counts
            stats = np.full((len(part), N_STATS), np.nan)
            again = rms_norm_f32(
                part, eps=eps, weight=weight, quant=counter.format, point=point,
                quant_rows=(0, wanted), first_row=begin, row_stats=stats,
            )  # fmt: skip
            assert_same_bits(again, y)
            value, result = value[:wanted], result[:wanted]
            if wanted:
                assert_row_stats(stats[:wanted], value, result, clipped_by(counter.format, value, result))
            assert not np.delete(stats[wanted:], RowStat.SUMMED_IN_ORDER, axis=1).any()
            expected = np.concatenate([expected, stats[:wanted]])
        assert (counter.rows_seen, counter.rows_quantised) == (rows, rows if mode == "every" else 1)
        assert counter.elements == len(expected) * n
        assert counter.changed == expected[:, RowStat.CHANGED].sum()
        assert counter.out_of_range == expected[:, RowStat.OUT_OF_RANGE].sum()
        assert counter.not_finite == expected[:, RowStat.NOT_FINITE].sum()
        assert counter.max_abs_error == expected[:, RowStat.MAX_ABS_ERROR].max()


@given(x=float_arrays(outer_shapes(st.just(48))), other=st.sampled_from(KINDS))
def test_a_format_at_each_point(executor, x, other):
    weight = normal(48, seed=1)
    for spec in KINDS:
        note(spec)
        rules = FakeQuant([Value(NORM)], [f"*.raw={spec}", f"*.weighted={other}"])
        y = np.empty_like(x)
        rules.rms_norm(NORM, x, eps=1e-5, weight=weight, out=y, executor=executor)
        raw = reference.round_trip(reference.rms_norm_f32(x, eps=1e-5), spec)
        assert_same_bits(y, reference.round_trip(with_weight(raw, weight), other))


# ---------------------------------------------------------------- properties


def rounded_rows(spec, point, mode, x, weight, executor) -> tuple[np.ndarray, np.ndarray]:
    """What the format was given and what it made of it, for the rows that the mode rounds."""
    rules = FakeQuant([Value(NORM)], Rule(spec, point=point, mode=mode))
    y = np.empty_like(x)
    # eps 0: zeros become NaN and subnormal squares infinities, beside what the weight adds
    rules.rms_norm(NORM, x, eps=0.0, weight=weight, out=y, executor=executor)
    value = reference.rms_norm_f32(x, eps=0.0, weight=weight if point == "weighted" else None)
    wanted = rules.matched[0].rows_quantised
    assert_same_bits(y[wanted:], value[wanted:])
    return value[:wanted], y[:wanted]


@st.composite
def norms(draw, point) -> tuple[np.ndarray, np.ndarray]:
    """x (rows, n), and a weight, which at the raw point must not hide what the format returned."""
    x = draw(float_arrays(outer_shapes(lengths)))
    n = x.shape[-1]
    return x, draw(float_arrays(st.just((n,)))) if point == "weighted" else np.ones(n, F32)


in_every_mode = pytest.mark.parametrize("mode", MODES)
at_both_points = pytest.mark.parametrize("point", POINTS)


@given(data=st.data())
@in_every_mode
@at_both_points
def test_formats_by_element(executor, point, mode, data):
    x, weight = data.draw(norms(point))
    for spec in ALONE:
        note(spec)
        largest = get_format(spec).largest
        value, y = rounded_rows(spec, point, mode, x, weight, executor)
        nan, infinite = np.isnan(value), np.isinf(value)
        # range, NaN and infinity
        assert (np.abs(y[np.isfinite(y)]) <= largest).all()
        assert np.isfinite(y[np.abs(value) <= largest]).all()
        assert np.isnan(y[nan]).all()
        if spec in WITH_INFINITY:
            assert np.isinf(y[infinite]).all() and not np.isnan(y[~nan]).any()
        elif "no-saturate" in spec:
            assert np.isnan(y[infinite]).all() and not np.isinf(y).any()
        else:
            assert (np.abs(y[infinite]) == largest).all() and not np.isnan(y[~nan]).any()
        # sign and zero
        known = ~np.isnan(y)
        assert (y[value == 0] == 0).all()
        same_sign = np.signbit(y) == np.signbit(value)
        if spec in WITHOUT_MINUS_ZERO:
            same_sign |= (y == 0) & ~np.signbit(y)
        assert same_sign[known].all()
        # order
        if "stochastic" not in spec:
            order = np.argsort(value[known])
            ordered = y[known][order]
            assert (ordered[:-1] <= ordered[1:]).all()


@given(data=st.data())
@in_every_mode
@at_both_points
def test_formats_with_scales(executor, point, mode, data):
    x, weight = data.draw(norms(point))
    for spec in (spec for spec in SPECS if spec not in ELEMENTS):
        note(spec)
        fmt = get_format(spec)
        value, y = rounded_rows(spec, point, mode, x, weight, executor)
        n = value.shape[1]
        finite = np.isfinite(value)
        # a block that is not finite is NaN, and no other is: but for ggml's scales, which overflow
        if fmt.whole_tensor:
            block = np.full(value.shape, finite.all())
        else:
            size = block_size(spec, n)
            ends = range(0, n, size)
            block = np.repeat(np.logical_and.reduceat(finite, ends, axis=1), size, axis=1)[:, :n]
        assert np.isnan(y[~block]).all()
        value, y = value[block], y[block]
        largest = np.abs(value.astype(float)).max(initial=0.0)
        if spec.startswith(("q", "iq")):
            assert np.isfinite(y).all() or largest > 65504  # q4_1's minimum is a half
        else:
            assert np.isfinite(y).all()
            # the coarsest, e2m1, goes from just above 5 to 6
            assert (np.abs(y.astype(float)) <= largest * 1.2 + 2.0**-127).all()
        if spec in WITHOUT_ZERO:
            continue
        kept = np.isfinite(y)
        assert (y[kept & (value == 0)] == 0).all()
        assert ((y == 0) | (np.signbit(y) == np.signbit(value)))[kept].all()


@given(data=st.data())
@in_every_mode
@at_both_points
def test_a_row_or_a_tensor_of_one_scale_keeps_its_order(executor, point, mode, data):
    x, weight = data.draw(norms(point))
    for spec in (
        "int8",
        "int8:asymmetric",
        "int8:tensor",
        "int8:asymmetric,tensor",
        "int4",
        "int4:asymmetric",
    ):
        note(spec)
        value, y = rounded_rows(spec, point, mode, x, weight, executor)
        if get_format(spec).whole_tensor:
            value, y = value.reshape(1, -1), y.reshape(1, -1)
        for before, after in zip(value, y, strict=True):
            if np.isfinite(before).all():
                ordered = after[np.argsort(before)]
                assert (ordered[:-1] <= ordered[1:]).all()


@given(data=st.data())
@in_every_mode
@at_both_points
def test_rounding_twice_is_rounding_once(executor, point, mode, data):
    x, weight = data.draw(norms(point))
    for spec in [spec for spec in EVERY if get_format(spec).idempotent]:
        note(spec)
        _, once = rounded_rows(spec, point, mode, x, weight, executor)
        kept = np.isfinite(once).all(axis=1)
        again = round_trip(once, spec, executor=executor)
        assert (again[kept] == once[kept]).all()


# ---------------------------------------------------------------- layout, threads, part of the rows


@given(data=st.data(), x=float_arrays(st.tuples(st.integers(1, 3), st.integers(1, 3), lengths)))
@at_both_points
def test_layout_does_not_matter(executor, point, data, x):
    n, rows = x.shape[-1], x.shape[0] * x.shape[1]
    weight = data.draw(float_arrays(st.just((n,)), ("normal", "zero", "any exponent")))
    begin, end = data.draw(st.tuples(st.integers(-2, rows + 2), st.integers(-2, rows + 2)))
    in_one = data.draw(layouts(x.ndim))
    apart = data.draw(layouts(x.ndim))
    for spec in [*OPTIONS, *KINDS, "bf16:stochastic,seed=7"]:
        note(spec)
        options = {
            "weight": weight,
            "quant": spec,
            "point": point,
            "quant_rows": (begin, end),
            "first_row": 5,
        }
        expected = reference.rms_norm_f32(x, **options)
        stats = np.full((rows, N_STATS), np.nan)
        assert_same_bits(rms_norm_f32(x, **options, row_stats=stats), expected)
        _, strided = in_one.place(x)
        memory, out = apart.place(np.full_like(x, -1))
        before, got = memory.copy(), np.full_like(stats, np.nan)
        options |= {"executor": executor, "row_stats": got}
        assert rms_norm_f32(strided, **options, out=out) is out
        assert_same_bits(out, expected)
        assert_same_bits(strided, x)
        out[...] = -1
        assert memory.tobytes() == before.tobytes(), "written beside the rows"
        assert rms_norm_f32(strided, **options, out=strided) is strided
        assert_same_bits(strided, expected)
        assert np.array_equal(got, stats, equal_nan=True)


@pytest.fixture(scope="module")
def executors():
    opened = [Executor(threads) for threads in (1, 2, 7)]
    yield opened
    for one in opened:
        one.close()


@pytest.mark.parametrize("shape", [(500, 70), (20000, 3)])
@pytest.mark.parametrize("spec", EVERY)
def test_thread_count_does_not_matter(executors, spec, shape):
    rows, n = shape
    x = normal(*shape)
    if not get_format(spec).whole_tensor:
        x[7::50][:11] = np.resize(hard_rows(n), x[7::50][:11].shape)
    for point in POINTS:
        options = {"weight": normal(n, seed=1), "quant": spec, "point": point, "quant_rows": (1, rows - 1)}
        expected = reference.rms_norm_f32(x, **options)
        stats = np.empty((rows, N_STATS))
        assert_same_bits(rms_norm_f32(x, **options, row_stats=stats), expected)
        for executor in executors:
            y, got = x.copy(), np.full_like(stats, np.nan)
            rms_norm_f32(y, **options, out=y, row_stats=got, executor=executor)
            assert_same_bits(y, expected)
            assert np.array_equal(got, stats, equal_nan=True)


def test_threads_share_the_rows_of_a_function(mine):
    threads, sizes = set(), []
    both = threading.Barrier(2, timeout=10)

    def fn(x):
        sizes.append(len(x))
        if len(sizes) <= 2:
            both.wait()  # the second is not begun by the thread that is in the first
        threads.add(threading.get_ident())
        return np.rint(x)

    mine(fn)
    with Executor(2) as executor:
        rms_norm_f32(normal(4096, 64), quant="mine", executor=executor)
    assert len(threads) == 2 and sum(sizes) == 4096


@pytest.mark.parametrize("rows", [(0, 4096), (-5, 3), (7, 99999)])
def test_a_scale_of_the_tensor_is_that_of_the_rounded_rows(mine, executor, rows):
    seen = []
    mine(lambda x: seen.append(x.shape) or x, whole_tensor=True)
    x = normal(4096, 16)
    rms_norm_f32(x, quant="mine", quant_rows=rows, executor=executor)
    begin, end = max(rows[0], 0), min(rows[1], 4096)
    assert seen == [(end - begin, 16)]
    value = reference.rms_norm_f32(x)
    some = rms_norm_f32(x, quant="int8:tensor", quant_rows=rows, executor=executor)[begin:end]
    assert_same_bits(some, get_format("int8:tensor").quantise(value[begin:end]).values)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (3, 0, 8), (0, 0)])
@pytest.mark.parametrize("spec", KINDS)
def test_empty(executor, spec, shape):
    x, weight = np.empty(shape, F32), np.ones(shape[-1], F32)
    stats = np.full((int(np.prod(shape[:-1])), N_STATS), np.nan)
    for point in POINTS:
        y = rms_norm_f32(x, weight=weight, quant=spec, point=point, executor=executor, row_stats=stats)
        assert y.shape == shape and not stats.any()
    assert round_trip(x, spec, out=x, executor=executor) is x


@pytest.mark.parametrize("spec", EVERY)
def test_no_rows_are_asked_for(executor, spec):
    x = normal(5, 33)
    stats = np.full((5, N_STATS), np.nan)
    options = {"weight": normal(33, seed=1), "executor": executor, "row_stats": stats}
    for rows in ((0, 0), (3, 2), (5, 9), (-4, 0), (99, -99)):
        y = rms_norm_f32(x, quant=spec, quant_rows=rows, **options)
        assert_same_bits(y, rms_norm_f32(x, weight=options["weight"]))
        assert not stats[:, : RowStat.SUMMED_IN_ORDER].any() and not stats[:, RowStat.OUT_OF_RANGE].any()


def test_the_callers_numpy_settings_do_not_matter(executor):
    x, weight = hard_rows(33), np.full(33, 3e38, F32)
    for spec in KINDS:
        expected = reference.rms_norm_f32(x, eps=0, weight=weight, quant=spec)
        for threads in (None, executor):
            with np.errstate(all="raise"):
                y = rms_norm_f32(x, eps=0, weight=weight, quant=spec, executor=threads)
            assert_same_bits(y, expected)


# ---------------------------------------------------------------- one's own function, and its errors


@pytest.fixture
def mine():
    """Registers under the name ``mine``; gone after the test."""
    yield lambda fn, **facts: register_format("mine", fn, **facts)
    unregister_format("mine")


class OwnError(Exception):
    pass


@pytest.mark.parametrize("whole_tensor", [False, True])
@pytest.mark.parametrize("threads", [None, 1, 3])
@pytest.mark.parametrize("error", [OwnError("row 300"), KeyboardInterrupt(), StopIteration(3)])
def test_what_a_function_raises_comes_out_unchanged(mine, error, threads, whole_tensor):
    x = normal(2000, 64)
    bad = reference.rms_norm_f32(x)[300, 5]

    def fn(part):
        if (part == bad).any():
            raise error
        return part

    mine(fn, whole_tensor=whole_tensor)
    executor = None if threads is None else Executor(threads)
    for call in (rms_norm_f32, lambda x, **options: round_trip(reference.rms_norm_f32(x), **options)):
        with pytest.raises(type(error)) as caught:
            call(x, quant="mine", executor=executor)
        assert caught.value is error
        # the executor goes on working, with all of its threads
        assert_same_bits(call(x, quant="tf32", executor=executor), reference.rms_norm_f32(x, quant="tf32"))
    if executor:
        meet = threading.Barrier(threads, timeout=10)
        executor.map(lambda i: meet.wait(), threads)
        executor.close()


@pytest.mark.parametrize("threads", [None, 2])
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x[:-1], r"format mine: its function returned shape \(\d+, 64\) for shape \(\d+, 64\)"),
        (lambda x: x.T, "format mine: its function returned shape"),
        (lambda x: 0.0, r"format mine: its function returned shape \(\)"),
        (lambda x: x.astype(complex), "format mine: its function returned complex128"),
    ],
)
def test_a_function_that_returns_something_else(mine, fn, message, threads):
    mine(fn)
    with pytest.raises(ValueError, match=message):
        rms_norm_f32(normal(500, 64), quant="mine", executor=threads and Executor(threads))


def test_a_function_may_use_the_kernels_and_the_same_executor(mine, executor):
    mine(lambda x: round_trip(rms_norm_f32(x, executor=executor), "q8_0", executor=executor))
    x = normal(2000, 64)
    expected = reference.rms_norm_f32(reference.rms_norm_f32(x), quant="q8_0")
    assert_same_bits(rms_norm_f32(x, quant="mine", executor=executor), expected)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_format_that_is_gone_writes_nothing(as_text):
    fmt = register_format("mine", np.rint)
    quant = "mine" if as_text else fmt
    rms_norm_f32(normal(2, 8), quant=quant)
    unregister_format("mine")
    out = np.full((2, 8), F32(-7))
    for call in (rms_norm_f32, round_trip):
        with pytest.raises(ValueError, match="unknown format 'mine"):
            call(normal(2, 8), quant=quant, out=out)
    with pytest.raises(ValueError, match="unknown format 'mine"):
        rms_norm_f32(normal(2, 8), result_quant=quant, out=out)
    assert (out == -7).all()
