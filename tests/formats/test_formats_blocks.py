"""Formats with scales: ggml's against ggml, the others against slow references in fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import chain, pairwise

import ggml_oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from number_tables import FLOATS, Table, nearest
from strategies import ROW_KINDS, assert_same_bits, make_row, seeds

from fq_kernels import get_format
from fq_kernels.formats.blocks import rotated

F32 = np.float32
SMALLEST_NORMAL = Fraction(2) ** -126
LARGEST = Fraction(2 - Fraction(1, 2**23)) * 2**127
FINITE_KINDS = [kind for kind in ROW_KINDS if kind not in ("infinite", "nan")]


@st.composite
def finite_rows(draw, n, max_rows: int = 4) -> np.ndarray:
    """(rows, n) float32, finite: rows of every kind, of any scale, and of values half-way between codes."""
    rng = np.random.default_rng(draw(seeds))
    rows = []
    for kind in draw(
        st.lists(st.sampled_from([*FINITE_KINDS, "scaled", "ties"]), min_size=1, max_size=max_rows)
    ):
        if kind == "ties":
            row = rng.integers(-254, 255, n) / 2 * 2.0 ** rng.integers(-30, 30)
        elif kind == "scaled":
            row = rng.standard_normal(n) * 2.0 ** rng.integers(-149, 125)
        else:
            row = make_row(kind, n, rng)
        rows.append(row)
    return np.array(rows, F32)


def quantised(spec: str, x: np.ndarray) -> np.ndarray:
    return get_format(spec).quantise(x).values


def assert_same_numbers(got: np.ndarray, expected) -> None:
    """The same bits, but for the sign of a zero."""
    assert_same_bits(got + F32(0), np.array(expected, F32) + F32(0))


# ---------------------------------------------------------------- ggml


@given(data=st.data())
@pytest.mark.parametrize("name", ggml_oracle.BLOCK_FORMATS)
def test_equals_ggml(name, data):
    size = ggml_oracle.BLOCK_FORMATS[name][1]
    x = data.draw(finite_rows(size))
    got, expected = quantised(name, x), ggml_oracle.block_round_trip(name, x)
    # Where a scale's inverse overflows, or iq4_nl has no scale, ggml's codes are undefined; they
    # are multiplied by zero then, and only the zero's sign is.
    largest = np.abs(x).max(axis=1)
    defined = largest > 1e-15 if name == "iq4_nl" else (largest > 1e-36) | (largest == 0)
    assert_same_bits(got[defined], expected[defined])
    assert_same_numbers(got, expected)


@pytest.mark.parametrize("name", ggml_oracle.BLOCK_FORMATS)
def test_equals_ggml_on_many_blocks(name):
    # some orders of summation and ties show in one block of thousands
    size = ggml_oracle.BLOCK_FORMATS[name][1]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2**20 // size, size)) * 2.0 ** rng.integers(-8, 8, (2**20 // size, 1))
    x = x.astype(F32)
    assert_same_bits(quantised(name, x), ggml_oracle.block_round_trip(name, x))


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_k", "iq4_nl"])
def test_the_first_of_two_largest_decides(name):
    size = ggml_oracle.BLOCK_FORMATS[name][1]
    x = np.tile(np.linspace(-0.9, 0.9, size, dtype=F32), (2, 1))
    x[0, 3], x[0, 7], x[1, 3], x[1, 7] = 1, -1, -1, 1
    assert_same_bits(quantised(name, x), ggml_oracle.block_round_trip(name, x))


@pytest.mark.parametrize("name", ["q8_0", "q8_1"])
def test_halves_round_away_from_zero(name):
    # what adding a half and truncating gets wrong: the float before a half, and an odd number and a half
    x = np.zeros((1, 32), F32)
    x[0, :6] = 127, np.nextafter(F32(0.5), F32(0)), 0.5, -0.5, 2.5, np.nextafter(F32(2.5), F32(0))
    assert quantised(name, x)[0, :6].tolist() == [127, 0, 1, -1, 3, 2]
    assert_same_bits(quantised(name, x), ggml_oracle.block_round_trip(name, x))


@pytest.mark.parametrize(("name", "n_codes"), [("q4_0", 16), ("q5_0", 32)])
def test_elements_past_the_last_code_are_counted_as_cut(name, n_codes):
    x = np.zeros((1, 32), F32)
    top = n_codes // 2
    x[0, :5] = -top, top, top - 0.5, top - 0.75, -(top - 0.75)
    fmt = get_format(name)
    assert fmt.quantise(x).clipped[0, :5].tolist() == [False, True, True, False, False]
    assert fmt.quantise(x).values[0, :5].tolist() == [-top, top - 1, top - 1, top - 1, 1 - top]
    x[0, 1:3] = 0
    assert fmt.quantise(x).clipped is None


# ---------------------------------------------------------------- int8, int4


def f32(x: Fraction) -> Fraction:
    """Rounded to float32. Quotients and products of two of them survive the way over float64."""
    return Fraction(float(F32(float(x))))


def integers(group: list[Fraction], bits: int, asymmetric: bool) -> list[Fraction]:
    if asymmetric:
        low, high, top = min(0, *group), max(0, *group), 2**bits - 1
        scale = max(f32((high - low) / top), SMALLEST_NORMAL)
        zero = round(f32(-low / scale))
    else:
        low, zero, top = Fraction(0), 0, 2 ** (bits - 1) - 1
        scale = max(f32(max(map(abs, group)) / top), SMALLEST_NORMAL)
    codes = [round(f32(x / scale)) for x in group]
    if asymmetric:
        codes = [min(max(code + zero, 0), top) for code in codes]
        assert 0 <= zero <= top
    else:
        assert all(-top <= code <= top for code in codes)
    values = [(code - zero) * scale for code in codes]
    return [max(-LARGEST, min(LARGEST, v)) for v in values]


def groups(grouping: str, x: np.ndarray) -> list[list[Fraction]]:
    rows = [[Fraction(float(v)) for v in row] for row in x]
    if grouping == "tensor":
        return [list(chain(*rows))]
    size = x.shape[1] if grouping == "row" else int(grouping.removeprefix("group="))
    return [row[at : at + size] for row in rows for at in range(0, len(row), size)]


@given(x=finite_rows(37))
@pytest.mark.parametrize("grouping", ["row", "tensor", "group=5", "group=16", "group=100"])
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers(bits, symmetry, grouping, x):
    expected = [v for group in groups(grouping, x) for v in integers(group, bits, symmetry == "asymmetric")]
    got = quantised(f"int{bits}:{symmetry},{grouping}", x)
    assert_same_numbers(got, np.array([float(v) for v in expected]).reshape(x.shape))
    assert not np.signbit(got[got == 0]).any(), "an integer has no -0"


@pytest.mark.parametrize("bits", [8, 4])
def test_all_codes_of_an_integer_are_used(bits):
    top = 2 ** (bits - 1) - 1
    x = np.linspace(-1, 0.7, 4001, dtype=F32)[np.newaxis]
    assert len(np.unique(quantised(f"int{bits}", np.concatenate([x, -x])))) == 2 * top + 1
    assert len(np.unique(quantised(f"int{bits}:asymmetric", x))) == 2**bits


@pytest.mark.parametrize("spec", ["int8", "int4", "int8:asymmetric", "int4:asymmetric", "nvfp4"])
def test_next_to_the_largest_float(spec):
    # a scale that is rounded up, times the largest code, is beyond float32
    for bits in range(0x7F7FFFFF - 64, 0x7F800000):
        x = np.array([[bits, bits | 1 << 31]], np.uint32).view(F32)
        values, clipped = get_format(spec).quantise(x)
        assert np.isfinite(values).all() and clipped is None


# ---------------------------------------------------------------- MX

MX_ELEMENTS = {
    "mxfp8_e4m3": "fp8_e4m3fn",
    "mxfp8_e5m2": "fp8_e5m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": "fp4_e2m1",
}
MX = {name: FLOATS[element] for name, element in MX_ELEMENTS.items()}
MX["mxint8"] = Table(tuple(Fraction(code, 64) for code in range(128)), Fraction(2), 6)


def floor_log2(x: Fraction) -> int:
    exponent = math.floor(math.log2(x)) if x else 0
    while Fraction(2) ** exponent > x:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= x:
        exponent += 1
    return exponent


def mx_exponent(largest: Fraction, table: Table, rule: str) -> int:
    emax = floor_log2(table.numbers[-1])
    floor = floor_log2(largest)
    if rule == "ceil":
        return floor + (Fraction(2) ** floor < largest) - emax
    if rule == "rceil":  # the smallest scale under which nothing is cut
        return next(
            e for e in (floor - emax, floor - emax + 1) if table.numbers[-1] * Fraction(2) ** e >= largest
        )
    if rule == "even":  # the largest rounded to an element's mantissa, a half up
        step = Fraction(2) ** (floor - table.m)
        return floor_log2(math.floor(largest / step + Fraction(1, 2)) * step) - emax
    return floor - emax


def mx(block: list[Fraction], table: Table, rule: str) -> tuple[list[Fraction], list[bool]]:
    """OCP MX 1.0, section 6.3, with another scale where the rule says so; and which elements were cut."""
    largest = max(map(abs, block))
    if not largest:
        return block, [False] * len(block)
    exponent = mx_exponent(largest, table, rule)
    scale = Fraction(2) ** max(-127, min(127, exponent))
    endless = (*table.numbers, table.first_beyond)
    return (
        [max(-LARGEST, min(LARGEST, nearest(table.numbers, x / scale) * scale)) for x in block],
        [abs(nearest(endless, x / scale)) == table.first_beyond for x in block],
    )


@given(data=st.data())
@pytest.mark.parametrize("name", MX)
def test_mx(name, data):
    rule = data.draw(st.sampled_from(["floor", "rceil", "even", "ceil"]))
    x = data.draw(finite_rows(32, max_rows=3))
    # largest magnitudes at which the rules part
    numbers = MX[name].numbers
    number = data.draw(st.sampled_from([*numbers[len(numbers) // 2 :], MX[name].first_beyond]))
    x[0, 0] = np.clip(float(number) * float(x[0, 1]), -float(LARGEST), float(LARGEST))
    if data.draw(st.booleans()):
        x[0, 0] = np.nextafter(x[0, 0], F32(0))
    result = get_format(f"{name}:{rule}").quantise(x)
    clipped = np.zeros(x.shape, bool) if result.clipped is None else result.clipped
    for row, got, cut in zip(x, result.values, clipped, strict=True):
        expected, beyond = mx([Fraction(float(v)) for v in row], MX[name], rule)
        assert_same_numbers(got, [float(v) for v in expected])
        assert cut.tolist() == beyond


@pytest.mark.parametrize("name", MX)
def test_every_code_of_an_mx_element_is_kept_and_every_middle_is_a_tie(name):
    numbers = MX[name].numbers
    middles = [(a + b) / 2 for a, b in pairwise(numbers)]
    for scale in (-100, -3, 0, 90):
        for sign in (1, -1):
            step = Fraction(2) ** scale
            values = [sign * v * step for v in (*numbers, *middles)]
            blocks = [[values[len(numbers) - 1], *values[i : i + 31]] for i in range(0, len(values), 31)]
            x = np.zeros((len(blocks), 32), F32)
            for row, block in zip(x, blocks, strict=True):
                row[: len(block)] = [float(v) for v in block]
            expected = [[float(nearest(numbers, Fraction(float(v)) / step) * step) for v in row] for row in x]
            values, clipped = get_format(name).quantise(x)
            assert_same_numbers(values, expected)
            assert clipped is None
            if name == "mxint8":
                assert not np.signbit(values[values == 0]).any(), "an integer has no -0"


def test_the_ends_of_an_e8m0_scale():
    x = np.zeros((2, 32), F32)
    x[0, :2] = np.finfo(F32).max, -np.finfo(F32).max
    x[1, :3] = 2.0**-134, 2.0**-133, -3 * 2.0**-134  # of a scale of 2**-127 at least: 1/2, 1 and 3/2 codes
    y = quantised("mxint8", x)
    assert y[0, :2].tolist() == [127 * 2.0**121, -127 * 2.0**121]
    assert y[1, :3].tolist() == [0, 2.0**-133, -(2.0**-132)]


# ---------------------------------------------------------------- nvfp4


def nvfp4_block(block: list[Fraction], wanted: Fraction, outer: Fraction) -> list[Fraction]:
    inner = nearest(FLOATS["fp8_e4m3fn"].numbers, wanted)
    scale = f32(inner * outer)
    codes = [nearest(FLOATS["fp4_e2m1"].numbers, f32(x / scale)) if scale else Fraction(0) for x in block]
    return [f32(f32(code * inner) * outer) for code in codes]


def nvfp4(rows: list[list[Fraction]], four: bool = False) -> list[list[Fraction]]:
    """The rows share the outer scale; each is a multiple of 16 long."""
    outer = max(f32(max(abs(v) for row in rows for v in row) / (6 * (256 if four else 448))), SMALLEST_NORMAL)
    result = []
    for row in rows:
        values: list[Fraction] = []
        for at in range(0, len(row), 16):
            block = row[at : at + 16]
            wanted = f32(f32(max(map(abs, block)) / 6) / outer)
            best = nvfp4_block(block, wanted, outer)
            if four:
                other = nvfp4_block(block, f32(wanted * Fraction(3, 2)), outer)
                best = min(best, other, key=lambda c: squared_error(c, block))
            values += best
        result.append(values)
    return result


def squared_error(codes: list[Fraction], block: list[Fraction]) -> Fraction:
    """In float32, added in halves."""
    values = [f32(f32(a - b) ** 2) for a, b in zip(codes, block, strict=True)]
    while len(values) > 1:
        half = len(values) // 2
        values = [f32(a + b) for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


@given(seed=seeds)
def test_nvfp4_with_four_over_six(seed):
    rng = np.random.default_rng(seed)
    # of a size at which no square overflows or is subnormal
    x = (rng.standard_normal((2, 48)) * 2.0 ** rng.integers(-20, 20)).astype(F32)
    exact = [[Fraction(float(v)) for v in row] for row in x]
    expected = nvfp4(exact, four=True)
    assert_same_numbers(quantised("nvfp4:four-over-six", x), [[float(v) for v in row] for row in expected])


def test_four_over_six_has_no_larger_error_in_any_block():
    x = np.random.default_rng(2).standard_normal((8, 512)).astype(F32)

    def errors(spec: str) -> np.ndarray:
        return np.square(quantised(spec, x).astype(float) - x).reshape(-1, 16).sum(axis=1)

    four, six = errors("nvfp4:four-over-six"), errors("nvfp4")
    assert four.sum() < 0.95 * six.sum() and 0.2 < (four < six).mean() < 0.8


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_a_rotation_is_hadamards_matrix(size):
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((20, 64)) * 2.0 ** rng.integers(-100, 100, (20, 1))).astype(F32)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    wide = (x.astype(np.float64).reshape(-1, size) @ matrix / math.sqrt(size)).reshape(x.shape)
    error = np.abs(rotated(x, size) - wide).max(axis=1)
    assert (error <= 2.0**-21 * np.abs(x).max(axis=1)).all()


@pytest.mark.parametrize("spec", ["int4", "mxfp4", "nvfp4", "int8:tensor"])
def test_what_is_rounded_is_the_rotated(spec):
    x = np.random.default_rng(4).standard_normal((4, 128)).astype(F32)
    separator = "," if ":" in spec else ":"
    got = quantised(f"{spec}{separator}had=32", x)
    assert_same_bits(got, rotated(quantised(spec, rotated(x, 32)), 32))


@given(x=finite_rows(48))
@pytest.mark.parametrize("shared", ["tensor", "row"])
def test_nvfp4(shared, x):
    exact = [[Fraction(float(v)) for v in row] for row in x]
    expected = nvfp4(exact) if shared == "tensor" else [nvfp4([row])[0] for row in exact]
    assert_same_numbers(quantised(f"nvfp4:{shared}", x), [[float(v) for v in row] for row in expected])


def test_nvfp4_uses_its_whole_scale():
    x = np.zeros((1, 32), F32)
    x[0, 0], x[0, 16], x[0, 17] = 6 * 448, 6 * 2.0**-9, 2.0**-9  # smallest subnormal scale
    assert quantised("nvfp4", x)[0, [0, 16, 17]].tolist() == x[0, [0, 16, 17]].tolist()
    x[0, 16] = 6 * 2.0**-11  # under half of it: no scale
    assert quantised("nvfp4", x)[0, [0, 16]].tolist() == [6 * 448, 0]
