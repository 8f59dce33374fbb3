"""What errors are worth: the contract's sums, by rows and by columns, on every instruction set."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from float_environments import FTZ_AND_DAZ, X86_64_GLIBC, foreign_environment
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same_bits, seeds

from fq_kernels import MAX_GRADS, Executor, error_columns, error_products, format_errors, round_trip

LANES = 16


def in_order(x, y, weights, grads):
    """As src/errors/contract.h says it."""
    e = y - x
    pairs = [(e, e), (e, x), (weights * e, e), (weights * e, x), *((e, g) for g in grads)]
    out = np.empty((len(x), len(pairs)), np.float32)
    for i in range(len(x)):
        for k, (one, other) in enumerate(pairs):
            lanes = np.zeros(LANES, np.float32)
            for j in range(x.shape[1]):
                lanes[j % LANES] += one[i, j] * other[i, j]
            width = LANES // 2
            while width:
                lanes[:width] += lanes[width : 2 * width]
                width //= 2
            out[i, k] = lanes[0]
    return out


@given(seeds, st.integers(0, 5), st.integers(1, 70), st.integers(0, 5))
def test_equal_the_contract(isa, seed, rows, n, n_grads):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, rows, n)).astype(np.float32) * np.float32(10.0 ** rng.integers(-30, 15))
    weights, *grads = rng.standard_normal((1 + n_grads, rows, n)).astype(np.float32)
    grads = np.array(grads, np.float32).reshape(n_grads, rows, n)
    assert_same_bits(error_products(x, y, weights, grads), in_order(x, y, weights, grads))


@pytest.mark.parametrize("n", [1023, 1024, 1025, 2050])
def test_rows_of_several_pieces(isa, n):
    rng = np.random.default_rng(n)
    x, y, weights, *grads = rng.standard_normal((5, 2, n)).astype(np.float32)
    assert_same_bits(error_products(x, y, weights, np.stack(grads)), in_order(x, y, weights, grads))


@pytest.mark.threads
def test_any_strides_and_threads(isa):
    rng = np.random.default_rng(5)
    # so many rows that a thread does not take them all
    x, y, weights = rng.standard_normal((3, 200, 300)).astype(np.float32)[:, :, :96]
    grads = rng.standard_normal((6, 400, 300)).astype(np.float32)[::2, 1::2, :96]
    wanted = in_order(x, y, weights[::-1], grads)
    with Executor(3) as executor:
        for some in (None, executor):
            assert_same_bits(error_products(x, y, weights[::-1], grads, executor=some), wanted)


def test_as_many_gradients_as_go_into_a_call(isa):
    rng = np.random.default_rng(8)
    x, y, weights, *grads = rng.standard_normal((3 + MAX_GRADS, 2, 33)).astype(np.float32)
    assert_same_bits(error_products(x, y, weights, np.stack(grads)), in_order(x, y, weights, grads))


@pytest.mark.parametrize("rows, n", [(0, 8), (3, 0), (0, 0)])
def test_of_nothing(isa, rows, n):
    """What was in memory before is no answer."""
    x, grads, centre = (
        np.empty((rows, n), np.float32),
        np.empty((2, rows, n), np.float32),
        np.zeros(n, np.float32),
    )
    formats = ["bf16", "int8:tensor"]
    with Executor(2) as executor:
        for some in (None, executor):
            found = error_products(x, x, x, grads, executor=some), error_columns(x, x, centre, executor=some)
            for result in (*found, *format_errors(x, formats, x, grads, centre=centre, executor=some)):
                assert not result.any()
    assert found[0].shape == (rows, 6) and found[1].shape == (2, n)


def test_subnormal_products_stay(isa):
    x, y = np.zeros((1, 20), np.float32), np.full((1, 20), 1e-22, np.float32)
    with foreign_environment(mxcsr_bits=FTZ_AND_DAZ) if X86_64_GLIBC else nullcontext():
        found = error_products(x, y, np.ones((1, 20), np.float32), np.full((1, 1, 20), 1e-20, np.float32))
    assert 1.9e-43 < found[0, 0] < 2.1e-43 and 1.9e-41 < found[0, 4] < 2.1e-41


def test_what_is_not_finite_shows():
    x, y = np.ones((2, 8), np.float32), np.ones((2, 8), np.float32)
    y[0, 3], y[1, 5] = np.nan, np.inf
    found = error_products(x, y, x, x[None])
    assert np.isnan(found[0]).all() and np.isinf(found[1]).all()


def test_wrong_arguments():
    x = np.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match="x must be of shape"):
        error_products(x[0], x[0], x[0], x[None])
    with pytest.raises(ValueError, match="y must be of shape"):
        error_products(x, x[:1], x, x[None])
    with pytest.raises(ValueError, match="weights must be of shape"):
        error_products(x, x, x[0], x[None])
    for grads in (x, x[None, :1], np.ones((MAX_GRADS + 1, 2, 8), np.float32)):
        with pytest.raises(ValueError, match="grads must be of shape"):
            error_products(x, x, x, grads)
    with pytest.raises(TypeError, match="grads must have dtype float32"):
        error_products(x, x, x, x[None].astype(np.float64))


def by_rows(x, y, centre):
    """Of columns, as src/errors/contract.h says it."""
    sums = np.zeros((2, x.shape[1]), np.float32)
    for a, b in zip(x, y, strict=True):
        sums += np.stack([b - a, (b - a) * (a - centre)])
    return sums


@given(seeds, st.integers(0, 5), st.integers(0, 70))
def test_columns_equal_the_contract(isa, seed, rows, n):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, rows, n)).astype(np.float32) * np.float32(10.0 ** rng.integers(-15, 15))
    centre = rng.standard_normal(n).astype(np.float32)
    assert_same_bits(error_columns(x, y, centre), by_rows(x, y, centre))


@pytest.mark.threads
def test_columns_of_any_strides_and_threads(isa):
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((2, 80, 2000)).astype(np.float32)[:, ::2, :1900]
    centre = rng.standard_normal(1900).astype(np.float32)
    wanted = by_rows(x[::-1], y, centre)
    with Executor(3) as executor:
        for some in (None, executor):
            assert_same_bits(error_columns(x[::-1], y, centre, executor=some), wanted)


def test_subnormal_sums_of_columns_stay(isa):
    x, y = np.zeros((1, 20), np.float32), np.full((1, 20), 1e-22, np.float32)
    with foreign_environment(mxcsr_bits=FTZ_AND_DAZ) if X86_64_GLIBC else nullcontext():
        found = error_columns(x, y, np.full(20, -1e-20, np.float32))
    assert ((0.9e-42 < found[1]) & (found[1] < 1.1e-42)).all()


def test_wrong_arguments_of_columns():
    x = np.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match="x must be of shape"):
        error_columns(x[0], x[0], x[0])
    with pytest.raises(ValueError, match="y must be of shape"):
        error_columns(x, x[:1], x[0])
    for centre in (x, x[0, :7]):
        with pytest.raises(ValueError, match="centre must be of shape"):
            error_columns(x, x, centre)
    with pytest.raises(TypeError, match="centre must have dtype float32"):
        error_columns(x, x, x[0].astype(np.float64))


MIXED = [
    "bf16",
    "int8:tensor",
    "fp8_e4m3fn:stochastic",
    "int4:group=32",
    "mxfp4",
    "fp8_e5m2:row",
    "nvfp4:row",
    "int8:had=64",
]


def by_round_trips(x, formats, weights, grads, centre, first_row):
    """format_errors as its docstring says it."""
    rounded = [round_trip(x, fmt, first_row=first_row) for fmt in formats]
    products = np.stack([error_products(x, y, weights, grads) for y in rounded])
    columns = np.zeros((len(formats), 2, x.shape[1]), np.float32)
    for row in range(0, len(x), 32):
        some = slice(row, row + 32)
        columns += np.stack([error_columns(x[some], y[some], centre) for y in rounded])
    return products, columns


@given(seeds, st.integers(0, 70), st.sampled_from([64, 320, 2112]), st.integers(0, 5))
def test_of_formats_equal_those_of_each(isa, seed, rows, n, n_grads):
    rng = np.random.default_rng(seed)
    x, weights, *grads = rng.standard_normal((2 + n_grads, rows, n)).astype(np.float32)
    x *= np.float32(10.0 ** rng.integers(-30, 15))
    grads = np.array(grads, np.float32).reshape(n_grads, rows, n)
    centre = rng.standard_normal(n).astype(np.float32)
    formats = list(rng.permutation(MIXED)[: rng.integers(0, 4)])
    found = format_errors(x, formats, weights, grads, centre=centre, first_row=seed)
    if formats:
        for one, other in zip(found, by_round_trips(x, formats, weights, grads, centre, seed), strict=True):
            assert_same_bits(one, other)
    assert found[0].shape == (len(formats), rows, 4 + n_grads) and found[1].shape == (len(formats), 2, n)


@pytest.mark.threads
def test_of_formats_with_any_strides_and_threads(isa):
    rng = np.random.default_rng(7)
    x, weights = rng.standard_normal((2, 200, 400)).astype(np.float32)[:, ::2, :192]
    grads = rng.standard_normal((6, 100, 400)).astype(np.float32)[::2, ::-1, :192]
    centre = rng.standard_normal(192).astype(np.float32)
    wanted = by_round_trips(x, MIXED, weights, grads, centre, 3)
    with Executor(3) as executor:
        for some in (None, executor):
            found = format_errors(x, MIXED, weights, grads, centre=centre, first_row=3, executor=some)
            assert_same_bits(found[0], wanted[0])
            assert_same_bits(found[1], wanted[1])
            found = format_errors(x, MIXED, weights, grads, first_row=3, executor=some)
            assert_same_bits(found[0], wanted[0])
            assert found[1] is None


def test_subnormal_errors_of_formats_stay(isa):
    x = np.full((1, 64), 1e-41, np.float32)
    with foreign_environment(mxcsr_bits=FTZ_AND_DAZ) if X86_64_GLIBC else nullcontext():
        products, columns = format_errors(x, ["fp8_e4m3fn"], x, x[None], centre=x[0])
    assert (columns[0, 0] == -x[0]).all() and products.shape == (1, 1, 5)


def test_wrong_arguments_of_formats():
    x = np.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match="fp9"):
        format_errors(x, ["bf16", "fp9"], x, x[None])
    with pytest.raises(TypeError, match="None"):
        format_errors(x, [None], x, x[None])
    with pytest.raises(ValueError, match="had=64"):
        format_errors(x, ["bf16", "int8:had=64"], x, x[None])
    with pytest.raises(ValueError, match="centre must be of shape"):
        format_errors(x, ["bf16"], x, x[None], centre=x)
    with pytest.raises(ValueError, match="first_row"):
        format_errors(x, ["bf16"], x, x[None], first_row=-1)
    with pytest.raises(ValueError, match="weights must be of shape"):
        format_errors(x, [], x[0], x[None])
