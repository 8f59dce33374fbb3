"""What holds of every format, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from format_specs import (
    DETERMINISTIC,
    ELEMENTS,
    SCALED,
    SPECS,
    WITH_INFINITY,
    WITHOUT_MINUS_ZERO,
    WITHOUT_ZERO,
    block_size,
)
from hypothesis import given, note
from hypothesis import strategies as st
from strategies import assert_same_bits, float_arrays, make_row

from fq_kernels import formats, get_format

F32 = np.float32
FINITE = ("normal", "any exponent", "subnormal", "huge", "zero", "signed zeros", "sparse")
some_shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 16, 33, 257]))
matrices = float_arrays(some_shapes)
finite = float_arrays(some_shapes, FINITE)


def noted(specs: list[str]) -> Iterator[str]:
    """One after the other; of a failing example the last one noted is what failed."""
    for spec in specs:
        note(spec)
        yield spec


def quantised(spec: str, x: np.ndarray) -> np.ndarray:
    return get_format(spec).quantise(x).values


@given(x=matrices)
def test_result_and_argument(x):
    for spec in noted(SPECS):
        before = x.copy()
        values, clipped = get_format(spec).quantise(x)
        assert x.tobytes() == before.tobytes()
        assert values.shape == x.shape and values.dtype == F32
        assert values.flags.c_contiguous and values.flags.writeable
        assert not np.shares_memory(values, x)
        lost = np.isfinite(x) & ~np.isfinite(values)
        if clipped is None:
            assert not lost.any()
        else:
            assert clipped.shape == x.shape and clipped.dtype == bool
            assert clipped.any() and clipped[lost].all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("spec", SPECS)
def test_small_shapes(spec, shape):
    assert quantised(spec, np.zeros(shape, F32)).shape == shape


@given(x=matrices)
def test_layout_does_not_matter(x):
    for spec in noted(SPECS):
        wide = np.full((2 * x.shape[0], x.shape[1] + 3), np.nan, F32)
        wide[::2, 1:-2] = x
        assert_same_bits(quantised(spec, wide[::2, 1:-2]), quantised(spec, x))
        assert_same_bits(quantised(spec, np.asfortranarray(x)), quantised(spec, x))


@given(x=matrices)
def test_rounding_twice_is_rounding_once(x):
    for spec in noted([spec for spec in SPECS if get_format(spec).idempotent]):
        once = quantised(spec, x)
        finite = np.isfinite(once).all(axis=1)
        twice = quantised(spec, once)
        assert (twice[finite] == once[finite]).all()


@given(x=finite)
def test_sign_and_zero_are_kept(x):
    for spec in noted([spec for spec in SPECS if spec not in WITHOUT_ZERO]):
        y = quantised(spec, x)
        kept = ~np.isnan(y)  # the others have overflown
        y, minus = y[kept], np.signbit(x[kept])
        assert (y[x[kept] == 0] == 0).all()
        assert ((y == 0) | (np.signbit(y) == minus)).all()
        if spec in ELEMENTS:
            assert np.array_equal(np.signbit(y[y == 0]), minus[y == 0] & (spec not in WITHOUT_MINUS_ZERO))


@given(x=matrices)
def test_elements_keep_their_order(x):
    for spec in noted([spec for spec in ELEMENTS if spec in DETERMINISTIC]):
        ordered = np.sort(x[~np.isnan(x)])[np.newaxis]
        y = quantised(spec, ordered)[0]
        y = y[~np.isnan(y)]  # overflow of a format without infinity
        assert (y[:-1] <= y[1:]).all()


@given(x=matrices)
def test_elements_stay_in_range(x):
    for spec in noted(ELEMENTS):
        fmt = get_format(spec)
        y, clipped = fmt.quantise(x)
        assert fmt.largest is not None and (np.abs(y[np.isfinite(y)]) <= fmt.largest).all()
        inside = np.abs(x) <= fmt.largest
        assert np.isfinite(y[inside]).all()
        assert clipped is None or not clipped[inside].any()
        if spec in WITH_INFINITY:
            assert np.isinf(y[np.isinf(x)]).all()
            assert np.array_equal(np.isnan(y), np.isnan(x))
        elif "no-saturate" in spec:
            assert np.isnan(y[~np.isfinite(x)]).all() and not np.isinf(y).any()
        else:
            assert (np.abs(y[np.isinf(x)]) == fmt.largest).all()
            assert np.array_equal(np.isnan(y), np.isnan(x)) and not np.isinf(y).any()
            assert clipped is None or np.isinf(x).sum() <= clipped.sum()


@given(x=finite)
def test_scales_cover_every_finite_float(x):
    for spec in noted([spec for spec in SCALED if spec.startswith(("int", "mx", "nv"))]):
        y = quantised(spec, x)
        assert np.isfinite(y).all()
        # the coarsest, e2m1, goes from just above 5 to 6
        assert (np.abs(y.astype(float)) <= np.abs(x.astype(float)).max() * 1.2 + 2.0**-127).all()


@given(data=st.data(), bad=st.sampled_from([np.nan, np.inf, -np.inf]), n=st.sampled_from([1, 33, 576]))
def test_a_block_with_a_nan_or_an_infinity_is_nan(data, bad, n):
    good = np.random.default_rng(n).standard_normal((3, n)).astype(F32)
    row, at = data.draw(st.integers(0, 2)), data.draw(st.integers(0, n - 1))
    x = good.copy()
    x[row, at] = bad
    for spec in noted(SCALED):
        size = block_size(spec, n)
        block = np.zeros(x.shape, bool)
        block[row, at // size * size : (at // size + 1) * size] = True
        if get_format(spec).whole_tensor:
            block[:] = True
        expected = np.where(block, F32(np.nan), quantised(spec, np.where(block, F32(0), good)))
        values, clipped = get_format(spec).quantise(x)
        assert_same_bits(values, expected)
        lost = block & np.isfinite(x)
        assert (clipped is None and not lost.any()) or clipped[lost].all()


@given(x=matrices)
def test_rows_are_rounded_alone(x):
    for spec in noted([spec for spec in DETERMINISTIC if not get_format(spec).whole_tensor]):
        values, clipped = get_format(spec).quantise(x)
        for i, row in enumerate(x):
            alone = get_format(spec).quantise(row[np.newaxis])
            assert_same_bits(alone.values[0], values[i])
            cut = clipped is not None and clipped[i].any()
            assert (alone.clipped is not None) == cut
            assert not cut or np.array_equal(alone.clipped[0], clipped[i])


@pytest.mark.parametrize("spec", SPECS)
def test_pieces_do_not_matter(spec, monkeypatch):
    rng = np.random.default_rng(0)
    x = np.array([make_row(kind, 70, rng) for kind in (*FINITE, "nan", "infinite")], F32)
    expected = get_format(spec).quantise(x)
    monkeypatch.setattr(formats.format, "_PIECE", 141)
    got = get_format(spec).quantise(x)
    assert_same_bits(got.values, expected.values)
    assert np.array_equal(got.clipped, expected.clipped)


@given(x=matrices)
def test_a_shorter_last_block_is_one_filled_up_with_zeros(x):
    for spec in noted([spec for spec in SCALED if (get_format(spec).family.block or " ")[0].isdigit()]):
        rows, n = x.shape
        padded = np.zeros((rows, n + -n % 256), F32)
        padded[:, :n] = x
        assert_same_bits(quantised(spec, x), quantised(spec, padded)[:, :n])


def test_formats_are_ordered_as_their_precision_says():
    x = np.random.default_rng(5).standard_normal((64, 576)).astype(F32)

    def noise(spec: str) -> float:
        return float(np.square(quantised(spec, x).astype(float) - x).mean())

    for order in (
        ["f16", "bf16", "bf16:truncate", "fp8_e4m3fn", "fp8_e5m2", "fp4_e2m1"],
        ["tf32", "tf32:truncate", "bf16"],
        ["int8:group=32", "int8", "int8:tensor", "int4:group=32", "int4", "int4:tensor"],
        ["q8_0", "q8_k", "q5_1", "q5_0", "q4_1", "q4_0"],
        ["mxint8", "mxfp8_e4m3", "mxfp8_e5m2"],
        ["mxfp6_e2m3", "mxfp6_e3m2", "nvfp4", "mxfp4"],
        ["iq4_nl", "q4_0"],
    ):
        measured = [noise(spec) for spec in order]
        assert measured == sorted(measured), dict(zip(order, measured, strict=True))
