"""Rounding to 16-bit formats: ggml's rule for every float, the variants against the reference."""

from __future__ import annotations

import os
from functools import partial

import ggml_oracle
import numpy as np
import pytest
from format_specs import TO_INFINITY
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_row_stats, assert_same_bits, float_arrays, layouts, seeds, some_of

from fq_kernels import (
    Executor,
    bf16_round_trip,
    bf16_to_float,
    float_to_bf16,
    force_isa,
    get_format,
    isa,
    reference,
    round_trip,
    supported_isas,
)
from fq_kernels._kernels import N_STATS

DETERMINISTIC = ["nearest-even", "nearest-even-ftz", "truncate", "nearest-away"]
ROUNDINGS = [*DETERMINISTIC, "stochastic"]
# those that keep infinities; others are in test_narrow_floats.py
FORMATS = [f"{name},seed=7" if "stochastic" in name else name for name in TO_INFINITY]
# of those without a kernel: by element, by block, by row; test_formats_in_norms.py has all of them
BY_FUNCTION = ["q8_0", "mxfp6", "int8:asymmetric"]
DETERMINISTIC_FORMATS = [name for name in FORMATS if "stochastic" not in name]
# those with a rule or instructions of their own, and one of the narrow floats
FOR_ALL_FLOATS = [name for name in DETERMINISTIC_FORMATS if get_format(name).kernel.narrow is None]
FOR_ALL_FLOATS += ["f16", "fp8_e4m3fn"]


def every_upper_half() -> np.ndarray:
    """(65536, k) float32: every upper half with the lower halves where rules part ways, and some others."""
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    lower += np.random.default_rng(1).integers(0, 2**16, 4).tolist()
    upper = np.arange(2**16, dtype=np.uint32) << 16
    return (upper[:, np.newaxis] | np.array(lower, np.uint32)).view(np.float32)


UPPER_HALVES = every_upper_half()


def blocks_of_floats(turn: int = 0) -> list[int]:
    """Of the 4096 blocks of 2^20 floats: with FQ_ALL_FLOATS=1 all.

    Else, of the 16 that have a sign's and two exponents', one, another at the next two and in the next turn,
    and all of those with the zeros and the infinities; outside CI a sixteenth of these, others on each run.
    """
    if os.environ.get("FQ_ALL_FLOATS"):
        return list(range(4096))
    return some_of([i for i in range(4096) if i % 2048 // 8 in (0, 255) or (i + i // 16 + turn) % 16 == 0])


@pytest.mark.long
def test_nearest_even_is_ggmls_for_all_floats(executor):
    blocks = blocks_of_floats()

    def check(i: int) -> None:
        first = blocks[i] * 2**20
        x = np.arange(first, first + 2**20, dtype=np.uint32).view(np.float32)
        assert np.array_equal(float_to_bf16(x), ggml_oracle.float_to_bf16(x)), f"from {first:#x}"

    executor.map(check, len(blocks))


@pytest.mark.long
def test_every_instruction_set_is_the_scalar_one_for_all_floats(executor):
    # in spans that stay in the cache; the sets are switched outside, as that is for the whole process
    total, span = 2**20, 2**16
    first = np.arange(total, dtype=np.uint32)
    x = np.empty_like(first)
    expected, got = np.empty(total, np.float32), np.empty(total, np.float32)

    def each(compute) -> None:
        executor.map(lambda i: compute(slice(i * span, (i + 1) * span)), total // span)

    def fill(out: np.ndarray, quant: str, part: slice) -> None:
        round_trip(x[part].view(np.float32), quant, out=out[part])

    def check(name: str, quant: str, part: slice) -> None:
        fill(got, quant, part)
        same = np.array_equal(expected[part].view(np.uint64), got[part].view(np.uint64))
        assert same, f"{name}, {quant}, near {x[part.start]:#x}"

    def floats(block: int, part: slice) -> None:
        np.add(first[part], np.uint32(block * total), out=x[part])

    of_block = {}
    for turn, quant in enumerate(FOR_ALL_FLOATS):
        for block in blocks_of_floats(turn):
            of_block.setdefault(block, []).append(quant)
    in_use = isa()
    try:
        for block, quants in of_block.items():
            each(partial(floats, block))
            for quant in quants:
                force_isa("scalar")
                each(partial(fill, expected, quant))
                for name in supported_isas()[1:]:
                    force_isa(name)
                    each(partial(check, name, quant))
    finally:
        force_isa(in_use)


@pytest.mark.threads
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_codes_are_the_references(isa, executor, rounding):
    expected = reference.float_to_bf16(UPPER_HALVES, rounding=rounding, seed=9)
    assert np.array_equal(float_to_bf16(UPPER_HALVES, rounding=rounding, seed=9), expected)
    assert np.array_equal(float_to_bf16(UPPER_HALVES, rounding=rounding, seed=9, executor=executor), expected)
    wide = bf16_round_trip(UPPER_HALVES, rounding=rounding, seed=9)
    # bits, not values: the NaN codes are part of the bf16 rules
    assert wide.tobytes() == reference.bf16_to_float(expected).tobytes()


def test_f16_is_numpys(isa):
    with np.errstate(over="ignore", invalid="ignore"):
        expected = UPPER_HALVES.astype(np.float16).astype(np.float32)
    assert_same_bits(round_trip(UPPER_HALVES, "f16"), expected)
    assert_same_bits(reference.round_trip(UPPER_HALVES, "f16"), expected)


def test_all_f16_values_stay(isa):
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # arm64's cast tells of signalling NaNs
        x = halves.astype(np.float32)
    assert_same_bits(round_trip(x, "f16"), x)
    # the middles between neighbours, and the floats next to the middles
    finite = np.arange(0x7BFF, dtype=np.uint16)
    low, high = (np.add(finite, i).view(np.float16).astype(np.float32) for i in (np.uint16(0), np.uint16(1)))
    middle = (low + high) / 2
    for y in (middle, np.nextafter(middle, low), np.nextafter(middle, high), -middle):
        assert_same_bits(round_trip(y, "f16"), y.astype(np.float16).astype(np.float32))


@pytest.mark.threads
def test_bf16_to_float_is_exact(isa, executor):
    codes = np.arange(2**16, dtype=np.uint16)
    bits = bf16_to_float(codes).view(np.uint32)
    assert np.array_equal(bits, codes.astype(np.uint32) << 16)
    shared = bf16_to_float(codes.reshape(64, 1024), executor=executor)
    assert np.array_equal(shared.ravel().view(np.uint32), bits)
    strided = bf16_to_float(codes.reshape(256, 256)[::-1, 3:])
    assert np.array_equal(strided.view(np.uint32), bits.reshape(256, 256)[::-1, 3:])
    assert np.array_equal(reference.bf16_to_float(codes).view(np.uint32), bits)


# The five values of the report, by ggml's rule and by the one that the report's text describes

KNOWN = np.array([1.23456788, -0.98765433, 0.00012346, -1000.12347412, 3.14159274], np.float32)
NEAREST = np.array([1.234375, -0.98828125, 0.00012302398681640625, -1000.0, 3.140625], np.float32)


def test_known_values(isa):
    truncated = NEAREST.copy()
    truncated[1] = -0.984375
    assert_same_bits(bf16_round_trip(KNOWN), NEAREST)
    assert_same_bits(bf16_round_trip(KNOWN, rounding="truncate"), truncated)


@pytest.mark.parametrize(
    ("bits", "even", "ftz", "truncate", "away"),
    [
        (0x00000000, 0x0000, 0x0000, 0x0000, 0x0000),
        (0x80000000, 0x8000, 0x8000, 0x8000, 0x8000),
        (0x3F808000, 0x3F80, 0x3F80, 0x3F80, 0x3F81),  # a tie below an even code
        (0x3F818000, 0x3F82, 0x3F82, 0x3F81, 0x3F82),  # a tie below an odd one
        (0xBF808000, 0xBF80, 0xBF80, 0xBF80, 0xBF81),
        (0x3F808001, 0x3F81, 0x3F81, 0x3F80, 0x3F81),
        (0x3F807FFF, 0x3F80, 0x3F80, 0x3F80, 0x3F80),
        (0x00000001, 0x0000, 0x0000, 0x0000, 0x0000),
        (0x00018000, 0x0002, 0x0000, 0x0001, 0x0002),  # subnormal
        (0x807FFFFF, 0x8080, 0x8000, 0x807F, 0x8080),  # the largest subnormal rounds to a normal number
        (0x7F7FFFFF, 0x7F80, 0x7F80, 0x7F7F, 0x7F80),  # the largest float overflows
        (0xFF7FFFFF, 0xFF80, 0xFF80, 0xFF7F, 0xFF80),
        (0x7F800000, 0x7F80, 0x7F80, 0x7F80, 0x7F80),
        (0xFF800000, 0xFF80, 0xFF80, 0xFF80, 0xFF80),
        (0x7F800001, 0x7FC0, 0x7FC0, 0x7FC0, 0x7FC0),  # NaN whose payload lies in the lower half
        (0x7FFFFFFF, 0x7FFF, 0x7FFF, 0x7FFF, 0x7FFF),
        (0xFFFFFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
    ],
)
def test_known_codes(isa, bits, even, ftz, truncate, away):
    x = np.full(1, bits, np.uint32).view(np.float32)
    for rounding, code in zip(DETERMINISTIC, (even, ftz, truncate, away), strict=True):
        assert float_to_bf16(x, rounding=rounding)[0] == code, rounding
        assert reference.float_to_bf16(x, rounding=rounding)[0] == code, rounding


# Properties

any_floats = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300).map(
    lambda bits: np.array(bits, np.uint32).view(np.float32)
) | float_arrays().map(np.ravel)


@given(x=any_floats)
@pytest.mark.parametrize("quant", FORMATS)
def test_sign_zero_infinity_and_nan_are_kept(quant, x):
    y = round_trip(x, quant)
    nan = np.isnan(x)
    assert np.array_equal(np.isnan(y), nan)
    assert np.array_equal(np.signbit(y), np.signbit(x))
    assert (y[x == 0] == 0).all()
    assert np.isinf(y[np.isinf(x)]).all()


@given(x=any_floats)
@pytest.mark.parametrize("quant", FORMATS)
def test_rounding_twice_is_rounding_once(quant, x):
    once = round_trip(x, quant)
    assert_same_bits(round_trip(once, quant), once)


@given(x=any_floats)
@pytest.mark.parametrize("quant", DETERMINISTIC_FORMATS)
def test_order_is_kept(quant, x):
    y = round_trip(np.sort(x[~np.isnan(x)]), quant)
    assert (y[:-1] <= y[1:]).all()


@pytest.mark.threads
@given(data=st.data(), x=float_arrays())
@pytest.mark.parametrize("quant", [*FORMATS, *BY_FUNCTION])
def test_layout_and_threads_do_not_matter(executor, quant, data, x):
    expected = round_trip(x, quant)
    _, strided = data.draw(layouts(x.ndim)).place(x)
    memory, out = data.draw(layouts(x.ndim)).place(np.full_like(x, -1))
    before = memory.copy()
    assert round_trip(strided, quant, out=out, executor=executor) is out
    assert_same_bits(out, expected)
    out[...] = -1
    assert memory.tobytes() == before.tobytes(), "written beside the rows"
    assert round_trip(strided, quant, out=strided) is strided
    assert_same_bits(strided, expected)


@pytest.mark.threads
@given(x=float_arrays(), data=st.data())
@pytest.mark.parametrize("quant", [*FORMATS, *BY_FUNCTION])
def test_some_rows_of_some_sequence(executor, quant, x, data):
    rows = x.reshape(-1, x.shape[-1])
    begin, end = data.draw(st.tuples(st.integers(-1, len(rows) + 1), st.integers(-1, len(rows) + 1)))
    first = data.draw(st.sampled_from([0, 3, 2**50]))
    expected = rows.copy()
    some = slice(max(begin, 0), max(end, 0))
    if len(rows[some]):
        expected[some] = row_by_row(rows[some], quant, first + some.start)
    stats = np.full((len(rows), N_STATS), np.nan)
    options = {"quant_rows": (begin, end), "first_row": first}
    assert_same_bits(round_trip(x, quant, **options, executor=executor).reshape(rows.shape), expected)
    assert_same_bits(round_trip(x, quant, **options, row_stats=stats).reshape(rows.shape), expected)
    inside = range(len(rows))[some]
    clipped = get_format(quant).quantise(rows[inside]).clipped if quant in BY_FUNCTION else None
    assert_row_stats(stats[inside], rows[inside], expected[inside], clipped)
    assert not np.delete(stats, inside, axis=0).any()


def row_by_row(rows: np.ndarray, quant: str, first: int) -> np.ndarray:
    return np.stack([round_trip(row[None], quant, first_row=first + i)[0] for i, row in enumerate(rows)])


@pytest.mark.threads
@pytest.mark.parametrize("offset", [0, 1, 16])
@pytest.mark.parametrize("n", [1, 33, 1 << 20])
@pytest.mark.parametrize("quant", [*DETERMINISTIC_FORMATS, "int8"])
def test_outputs_too_large_for_the_cache(isa, executor, quant, n, offset):
    rows = (1 << 19) // n + 3
    x = np.random.default_rng(0).standard_normal((rows, n), dtype=np.float32)
    x[1, 0], x[2, -1] = np.nan, np.inf
    memory = np.full(rows * n + 64, 7.0, np.float32)
    out = memory[offset : offset + rows * n].reshape(rows, n)
    round_trip(x, quant, out=out, executor=executor)
    in_place = x.copy()
    assert_same_bits(out, round_trip(in_place, quant, out=in_place))
    assert (memory[:offset] == 7.0).all() and (memory[offset + rows * n :] == 7.0).all()


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0)])
def test_empty(executor, shape):
    x = np.empty(shape, np.float32)
    if not shape:
        with pytest.raises(ValueError, match="x must have at least one axis"):
            round_trip(x, "bf16")
        return
    assert round_trip(x, "bf16", executor=executor).shape == shape
    assert float_to_bf16(x, executor=executor).shape == shape
    assert bf16_to_float(x.astype(np.uint16), executor=executor).shape == shape


def test_errors_name_the_argument():
    x = np.ones((2, 8), np.float32)
    for function in (bf16_round_trip, float_to_bf16):
        with pytest.raises(TypeError, match=r"x must .*float32.*float64"):
            function(x.astype(np.float64))
        with pytest.raises(ValueError, match="last axis of x"):
            function(x[:, ::2])
        with pytest.raises(ValueError, match=r"rounding must be one of nearest-even, .*'upwards'"):
            function(x, rounding="upwards")
        with pytest.raises(ValueError, match="rounding must "):
            function(x, rounding="stochastic,seed=3")
        with pytest.raises(ValueError, match="seed must "):
            function(x, rounding="stochastic", seed=-1)
        with pytest.raises(TypeError, match="seed must "):
            function(x, rounding="stochastic", seed=1.5)
        with pytest.raises(TypeError, match="executor must "):
            function(x, executor=2)
    with pytest.raises(TypeError, match=r"bits must .*uint16.*float32"):
        bf16_to_float(x)
    with pytest.raises(ValueError, match="unknown format 'bf15'"):
        round_trip(x, "bf15")
    memory = np.ones(24, np.float32)
    with pytest.raises(ValueError, match="out overlaps x"):
        round_trip(memory[:16].reshape(2, 8), "bf16", out=memory[1:17].reshape(2, 8))
    assert (memory == 1).all()
    with pytest.raises(ValueError, match="out has shape"):
        round_trip(x, "bf16", out=np.ones((8, 2), np.float32))


# Stochastic rounding


@given(seed=seeds, x=float_arrays())
def test_stochastic_rounds_to_a_neighbour(seed, x):
    y = float_to_bf16(x, rounding="stochastic", seed=seed).astype(np.int64)
    low = float_to_bf16(x, rounding="truncate").astype(np.int64)
    exact = (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF) == 0
    assert ((y == low) | ((y == low + 1) & ~exact)).all()


@pytest.mark.parametrize("value", [1.2345678, -1.2345678, 1e-40, -3e38, 1 + 2**-16, 1 + 2**-7 - 2**-23])
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**64 - 1])
def test_stochastic_is_unbiased(value, seed):
    n = 400_000
    x = np.full((8, n // 8), value, np.float32)
    low = float(bf16_round_trip(x[:1, :1], rounding="truncate")[0, 0])
    y = bf16_round_trip(x, rounding="stochastic", seed=seed).astype(np.float64)
    step = np.abs(y - low).max()
    up = float(x.view(np.uint32)[0, 0] & 0xFFFF) / 2**16
    assert (y != low).mean() == pytest.approx(up, abs=6 * (up * (1 - up) / n) ** 0.5)
    assert set(np.unique(np.abs(y - low))) <= {0.0, step}


@pytest.mark.threads
def test_stochastic_depends_on_seed_and_index_alone(isa):
    x = np.random.default_rng(3).standard_normal(48 * 1000).astype(np.float32)
    expected = reference.round_trip(x, "bf16:stochastic,seed=5")
    for shape in [(48000,), (48000, 1), (48, 1000), (3, 16, 1000), (1, 1, 48000), (2, 24000)]:
        for executor in (None, Executor(1), Executor(3)):
            y = round_trip(x.reshape(shape), "bf16:stochastic,seed=5", executor=executor)
            assert_same_bits(y.ravel(), expected)
            codes = float_to_bf16(x.reshape(shape), rounding="stochastic", seed=5, executor=executor)
            assert_same_bits(reference.bf16_to_float(codes).ravel(), expected)
    assert (round_trip(x, "bf16:stochastic,seed=6") != expected).mean() > 0.2
    tail = round_trip(x[1:], "bf16:stochastic,seed=5")
    assert (tail != expected[1:]).any()


def test_stochastic_numbers_are_not_those_of_a_neighbouring_seed_shifted():
    x = np.full(4096, 1 + 2**-8, np.float32)
    up = [round_trip(x, f"bf16:stochastic,seed={seed}") != 1 for seed in range(4)]
    for a in range(4):
        assert (up[a][1:] != up[a][:-1]).mean() == pytest.approx(0.5, abs=0.05)
        for b in range(a):
            for shift in range(3):
                assert (up[a][shift:] != up[b][: 4096 - shift]).mean() == pytest.approx(0.5, abs=0.05)
