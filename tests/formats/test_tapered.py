"""HiFloat8 and E8M0, held against their codes, decoded as their authors describe them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from strategies import assert_same_bits, float_arrays

from fq_kernels import get_format, round_trip

F32 = np.float32
POSITIVE = np.random.default_rng(0).integers(1, 0x7F400000, 100_000, np.uint32).view(F32)


def hif8_magnitude(code: int) -> float:
    """Of 7 bits behind the sign: a prefix, the exponent that it gives the length of, and the mantissa."""
    bits = f"{code:07b}"
    if bits.startswith("0000"):
        return 2.0 ** (int(bits[4:], 2) - 23) if code else 0.0
    prefix, width = next(
        (prefix, width)
        for prefix, width in (("11", 4), ("10", 3), ("01", 2), ("001", 1), ("0001", 0))
        if bits.startswith(prefix)
    )
    field, mantissa = bits[len(prefix) : len(prefix) + width], bits[len(prefix) + width :]
    size = int("1" + field[1:], 2) if width else 0  # the highest bit of the exponent's size is not stored
    exponent = -size if field.startswith("1") else size
    return 2.0**exponent * (1 + int(mantissa, 2) / 2 ** len(mantissa))


MAGNITUDES = sorted(hif8_magnitude(code) for code in range(128))
HIF8, BEYOND = np.array(MAGNITUDES[:-1]), MAGNITUDES[-1]  # the last code is infinity's


def hif8(x: np.ndarray) -> np.ndarray:
    """To the nearest code, ties away from zero, in float64."""
    numbers = np.append(HIF8, BEYOND)
    middles = (numbers[:-1] + numbers[1:]) / 2
    at = np.searchsorted(middles, np.abs(x.astype(np.float64)), side="right")
    result = np.append(HIF8, np.inf)[at]
    result = np.where(np.isnan(x), np.nan, np.where(np.signbit(x) & (result > 0), -result, result))
    return result.astype(F32)


def test_hif8s_numbers():
    assert len(set(HIF8)) == 127 and HIF8[1] == 2.0**-22 and HIF8[-1] == 2.0**15 and BEYOND == 1.5 * 2.0**15
    x = np.concatenate([HIF8, -HIF8]).astype(F32)
    assert np.array_equal(round_trip(x, "hif8"), x)
    middles = ((HIF8[:-1] + HIF8[1:]) / 2).astype(F32)
    around = np.concatenate([np.nextafter(middles, F32(0)), middles, np.nextafter(middles, F32(np.inf))])
    for sign in (F32(1), F32(-1)):
        assert_same_bits(round_trip(sign * around, "hif8"), hif8(sign * around))


@given(x=float_arrays())
def test_hif8_is_the_nearest_code(x):
    expected = hif8(x)
    assert_same_bits(round_trip(x, "hif8"), expected)
    largest = np.copysign(F32(2.0**15), x)
    saturated = np.where(np.isinf(expected), largest, expected)
    assert_same_bits(round_trip(x, "hif8:saturate"), saturated)
    rows = x.reshape(-1, x.shape[-1])
    clipped = get_format("hif8:saturate").quantise(rows).clipped
    assert np.array_equal(
        np.zeros(rows.shape) if clipped is None else clipped, np.isinf(expected).reshape(rows.shape)
    )


def test_hif8_dithered_errs_by_no_more_than_its_steps():
    x = np.random.default_rng(0).standard_normal((40, 500)).astype(F32)
    found = round_trip(x, "hif8:dither,seed=3")
    step = np.diff(HIF8)[np.searchsorted(HIF8, np.abs(x), side="right") - 1]
    assert (np.abs(found - x) <= step / 2).all() and np.abs(found - x).mean() > 0.2 * step.mean()


@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-away", "truncate", "up"])
def test_e8m0_is_the_power_of_two_on_that_side(rounding):
    x = np.concatenate([POSITIVE, F32(1.5) * F32(2) ** np.arange(-120, 120, dtype=F32)])
    x = x[x >= 2.0**-127]
    below = 2.0 ** np.floor(np.log2(x.astype(np.float64)))
    below = np.where(below > x, below / 2, np.where(2 * below <= x, 2 * below, below))  # log2 is not exact
    even = np.log2(below) % 2 == 1  # the code is the exponent and 127
    up = {
        "nearest-even": (x > 1.5 * below) | (x == 1.5 * below) & ~even,
        "nearest-away": x >= 1.5 * below,
        "truncate": np.zeros(x.shape, bool),
        "up": x > below,
    }[rounding]
    assert np.array_equal(
        round_trip(x, f"e8m0:{rounding}"), np.where(up, 2 * below, below).clip(max=2.0**127)
    )


def test_e8m0_as_ml_dtypes_has_it():
    """Where it is right: what is below float32's normal numbers it rounds to the upper one too early."""
    x = POSITIVE[POSITIVE >= 2.0**-126]
    expected = x.astype(ml_dtypes.float8_e8m0fnu).astype(F32)
    assert np.array_equal(round_trip(x, "e8m0:nearest-away"), expected)


def test_what_e8m0_has_no_code_for():
    x = np.array([[0, -0.0, 1e-45, 2.0**-128, 3e38, np.inf, -1, -np.inf, np.nan, 1]], F32)
    small, large = 2.0**-127, 2.0**127
    nan = [np.nan] * 3
    for spec, above in (("e8m0", large), ("e8m0:no-saturate", np.nan)):
        expected = np.array([[small] * 4 + [above] * 2 + nan + [1]], F32)
        assert_same_bits(np.abs(round_trip(x, spec)), expected)
    clipped = get_format("e8m0").quantise(x).clipped
    assert clipped.tolist() == [[True] * 7 + [False] * 3]
