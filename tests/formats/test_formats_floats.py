"""Narrow floats against tables of their codes, built here from (exponent, mantissa, bias) in fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from number_tables import FLOATS, nearest
from strategies import float_arrays, shapes

from fq_kernels import get_format

F32 = np.float32
INF = F32(np.inf)


def rounded(name: str, x) -> np.ndarray:
    """(n,) -> (n,)"""
    return get_format(name).quantise(np.array([x], F32)).values[0]


def clipped(name: str, x) -> list[bool]:
    found = get_format(name).quantise(np.array([x], F32)).clipped
    return [False] * len(x) if found is None else found[0].tolist()


def probes(name: str) -> np.ndarray:
    """Every number of the format and the one that would come next, every middle between two, and the
    floats beside each; then some far outside."""
    numbers = [float(v) for v in (*FLOATS[name].numbers, FLOATS[name].first_beyond)]
    middles = [(a + b) / 2 for a, b in pairwise(numbers)]
    x = np.array([*numbers, *middles, 1e30, 3e38, 3e-45, 1e-30], F32)
    return np.concatenate([x, np.nextafter(x, INF), np.nextafter(x, -INF)])


def test_the_tables_have_all_codes():
    assert {name: len(table.numbers) for name, table in FLOATS.items()} == {
        "fp8_e4m3fn": 127, "fp8_e5m2": 124, "fp8_e4m3fnuz": 128, "fp8_e5m2fnuz": 128,
        "fp6_e2m3": 32, "fp6_e3m2": 32, "fp4_e2m1": 8,
    }  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_every_number_every_middle_and_their_neighbours(name):
    x = probes(name)
    expected = [float(nearest(FLOATS[name].numbers, Fraction(float(v)))) for v in x]
    assert rounded(name, x).tolist() == expected
    assert (-rounded(name, -x)).tolist() == expected


@pytest.mark.parametrize("name", FLOATS)
def test_elements_are_counted_as_cut_from_the_middle_to_the_next_number_on(name):
    x = probes(name)
    numbers = [*FLOATS[name].numbers, FLOATS[name].first_beyond]
    expected = [nearest(numbers, Fraction(float(v))) == numbers[-1] for v in x]
    assert clipped(name, x) == clipped(name, -x) == expected
    assert clipped(name, [np.inf, -np.inf, np.nan]) == [True, True, False]


@pytest.mark.parametrize("name", FLOATS)
def test_the_numbers_that_are_said(name):
    fmt, table = get_format(name), FLOATS[name]
    assert fmt.largest == table.numbers[-1]
    assert fmt.smallest_subnormal == table.numbers[1]
    assert fmt.smallest_normal == table.numbers[2**table.m]


@pytest.mark.parametrize("name", FLOATS)
def test_infinity_nan_and_zero(name):
    y = rounded(name, [np.inf, -np.inf, np.nan, 0.0, -0.0, -1e-30])
    assert y[:2].tolist() == [FLOATS[name].numbers[-1], -FLOATS[name].numbers[-1]]
    assert np.isnan(y[2]) and (y[3:] == 0).all()
    assert np.signbit(y[3:]).tolist() == ([False] * 3 if name.endswith("fnuz") else [False, True, True])


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz"])
def test_overflow_without_saturation(name):
    x = np.concatenate([probes(name), [INF]]).astype(F32)
    fmt = f"{name}:no-saturate"
    y, cut = rounded(fmt, x), clipped(name, x)
    over = F32(np.inf if name == "fp8_e5m2" else np.nan)
    expected = np.where(cut, over, rounded(name, x))
    assert np.array_equal(y, expected, equal_nan=True)
    assert np.array_equal(rounded(fmt, -x), -expected, equal_nan=True)
    assert clipped(fmt, x) == [*cut[:-1], False]
    assert np.isnan(rounded(fmt, [np.nan])).all()


# ---------------------------------------------------------------- tf32


def tf32(v: float, rounding: str) -> float:
    """v to 11 significant bits, of float32's exponents."""
    if v == 0 or not np.isfinite(v):
        return v
    x = Fraction(float(v))
    exponent = max(int(np.frexp(np.float64(v))[1]) - 1, -126)
    step = Fraction(2) ** (exponent - 10)
    steps = int(x / step) if rounding == "truncate" else round(x / step)
    result = steps * step
    return float(np.copysign(float(result) if abs(result) < 2**128 else np.inf, v))


TF32_BITS = [
    sign | upper | lower
    for sign in (0, 1 << 31)
    for upper in (0, 1 << 13, 3 << 13, 0x7FE000, 0x00800000, 0x3F800000, 0x3F802000, 0x3FFFE000, 0x7F7FE000)
    for lower in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF)
]


@pytest.mark.parametrize("rounding", ["nearest-even", "truncate"])
def test_tf32(rounding):
    x = np.array(TF32_BITS, np.uint32).view(F32)
    expected = np.array([tf32(float(v), rounding) for v in x], F32)
    got = rounded(f"tf32:{rounding}", x)
    assert got.tobytes() == expected.tobytes()
    assert clipped(f"tf32:{rounding}", x) == np.isinf(expected).tolist()
    assert np.isinf(expected).any() == (rounding == "nearest-even")


@pytest.mark.parametrize("rounding", ["nearest-even", "truncate"])
def test_tf32_keeps_infinity_and_nan(rounding):
    x = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFF800001], np.uint32).view(F32)
    y = rounded(f"tf32:{rounding}", x)
    assert np.isinf(y[:2]).all() and np.isnan(y[2:]).all()
    assert np.array_equal(np.signbit(y), np.signbit(x))


@given(x=float_arrays(shapes(min_dims=2, max_dims=2)))
def test_tf32_of_any_float(x):
    got = get_format("tf32").quantise(x).values
    for v, y in zip(x.ravel()[:200], got.ravel()[:200], strict=True):
        assert y == F32(tf32(float(v), "nearest-even")) or np.isnan(v)
