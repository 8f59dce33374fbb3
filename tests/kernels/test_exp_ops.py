"""Kernels with exponentials against float64, and against their contract's bits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same_bits, seeds

from fq_kernels import (
    Executor,
    causal_exp,
    force_isa,
    geglu,
    kl_divergence,
    log_sum_exp,
    soft_cap,
    supported_isas,
    swiglu,
)


def exp_f32(x: np.ndarray) -> np.ndarray:
    """The kernels' exp of x <= 0, x of any shape: second of a row whose maximum is 0."""
    rows = np.zeros((x.size, 1, 2), np.float32)
    rows[:, 0, 1] = x.reshape(-1)
    causal_exp(rows, 2)
    return rows[:, 0, 1].reshape(x.shape)


def test_exp_is_within_two_ulp(isa):
    x = -np.unique(
        np.concatenate([np.linspace(0, 87, 400_001), np.geomspace(1e-38, 87, 100_001)]).astype(np.float32)
    )
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert np.abs(exp_f32(x) - exact).max(initial=0, where=exact > 0) <= 1
    assert (np.abs(exp_f32(x) - exact) / ulp).max() <= 2


def test_exp_of_limits(isa):
    floor = exp_f32(np.float32([-87]))[0]
    assert 1.6e-38 < floor < 1.7e-38
    x = np.float32([0, -0.0, -1e-45, -87.5, -200, -3e38, -np.inf, np.nan])
    assert_same_bits(exp_f32(x), np.float32([1, 1, 1, floor, floor, floor, floor, np.nan]))


def test_causal_exp_of_a_larger_argument_than_the_maximum_of_the_rest(isa):
    # what a row does not keep has no say in its maximum
    x = np.float32([[[1, 50, 60], [1, 2, 60], [1, 2, 3]]])
    sums = causal_exp(x, 1)
    e = np.exp(np.float64([0, -1, -2]))
    assert np.allclose(x[0], [[1, 0, 0], [e[1], 1, 0], [e[2], e[1], 1]], rtol=3e-7, atol=0)
    assert np.allclose(sums, [[1, 1 + e[1], e.sum()]], rtol=3e-7, atol=0)


@given(
    heads=st.integers(0, 3),
    rows=st.integers(1, 9),
    n_first=st.integers(1, 300),
    more=st.integers(0, 70),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e30]),
    window=st.sampled_from([0, 0, 1, 63, 64, 65, 200, 1000]),
    seed=seeds,
)
def test_causal_exp(isa, heads, rows, n_first, more, scale, window, seed):
    x = np.random.default_rng(seed).normal(0, 1, (heads, rows, n_first + rows - 1 + more)) * scale
    x = x.astype(np.float32)
    got = x.copy()
    sums = causal_exp(got, n_first, window)
    assert sums.shape == (heads, rows)
    for row in range(rows):
        n = n_first + row
        hidden = max(n - window, 0) if window else 0
        kept = x[:, row, hidden:n]
        # a difference of float32 is what exp is of
        exact = np.exp(np.maximum(kept - kept.max(axis=1, keepdims=True), -87).astype(np.float64))
        assert (np.abs(got[:, row, hidden:n] - exact) <= 2.4e-7 * exact).all()
        assert not got[:, row, n:].any() and not got[:, row, :hidden].any()
        assert np.allclose(sums[:, row], exact.sum(axis=1), rtol=1e-6, atol=0)


@pytest.mark.threads
@given(n=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 60.0]), seed=seeds)
def test_swiglu(isa, executor, n, scale, seed):
    rng = np.random.default_rng(seed)
    gate, up = rng.normal(0, scale, n).astype(np.float32), rng.normal(0, 1, n).astype(np.float32)
    g = gate.astype(np.float64)
    exact = g / (1 + np.exp(-g)) * up
    got = gate.copy()
    assert swiglu(got, up, executor=executor) is got
    # below -88 it is next to nothing rather than nothing
    assert (np.abs(got - exact) <= 5e-7 * np.abs(exact) + 1e-35 * np.abs(up)).all()


@pytest.mark.threads
@given(n=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 60.0]), seed=seeds)
def test_geglu(isa, executor, n, scale, seed):
    rng = np.random.default_rng(seed)
    gate, up = rng.normal(0, scale, n).astype(np.float32), rng.normal(0, 1, n).astype(np.float32)
    g = gate.astype(np.float64)
    exact = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * up
    got = gate.copy()
    assert geglu(got, up, executor=executor) is got
    # the exponential's argument, of some tens where it matters, is off by its own rounding
    assert (np.abs(got - exact) <= 4e-6 * np.abs(g * up)).all()


def test_geglu_of_limits(isa):
    gate = np.float32([0, -0.0, np.inf, np.nan, 3e38, 1e15])
    got = geglu(gate.copy(), np.ones(6, np.float32))
    assert_same_bits(got, gate)
    assert abs(geglu(np.float32([-20]), np.ones(1, np.float32))[0]) < 1e-30


@pytest.mark.threads
@given(
    n=st.integers(0, 1000),
    cap=st.sampled_from([0.5, 30.0, 50.0]),
    scale=st.sampled_from([0.01, 1.0, 1e3]),
    seed=seeds,
)
def test_soft_cap(isa, executor, n, cap, scale, seed):
    x = (np.random.default_rng(seed).normal(0, scale, n) * cap).astype(np.float32)
    got = x.copy()
    assert soft_cap(got, cap, executor=executor) is got
    assert (np.abs(got - cap * np.tanh(x.astype(np.float64) / cap)) <= 2e-7 * cap).all()


def test_soft_cap_of_limits(isa):
    got = soft_cap(np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0]), 30.0)
    assert_same_bits(got, np.float32([30, -30, np.nan, 0.0, -0.0]))


def test_swiglu_of_limits(isa):
    gate = np.float32([0, -0.0, np.inf, np.nan, 3e38, -3e38, -88.5])
    got = swiglu(gate.copy(), np.ones(7, np.float32))
    assert_same_bits(got[:5], gate[:5])
    assert got[5] == pytest.approx(-3e38 * 6.05e-39, rel=1e-2)
    assert abs(got[6]) < 1e-35


@pytest.mark.threads
@given(
    rows=st.integers(0, 5),
    n=st.integers(1, 700),
    gap=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1.0, 20.0, 1e4, 1e37]),
    seed=seeds,
)
def test_log_sum_exp(isa, executor, rows, n, gap, scale, seed):
    memory = np.random.default_rng(seed).normal(0, scale, (rows, n + gap)).astype(np.float32)
    x = memory[:, :n]
    got = log_sum_exp(x, executor=executor)
    assert got.dtype == np.float64
    assert (got[:, 0] == x.max(axis=1)).all()
    exact = np.log(np.exp(x - x.max(axis=1, keepdims=True).astype(np.float64)).sum(axis=1))
    assert (np.abs(got[:, 1] - exact) <= 2e-14).all()


def test_log_sum_exp_of_limits(isa):
    inf, nan = np.inf, np.nan
    cases = {nan: [[1, nan], [nan, 1], [inf, 0], [-inf, -inf], [inf, inf]], 2.0: [[-inf, 2], [2, -3e38]]}
    for expected, rows in cases.items():
        np.testing.assert_array_equal(log_sum_exp(np.float32(rows)).sum(axis=1), expected)


def _beyond_line(d):
    """exp(d) - 1 - d of a float, to forty digits."""
    exact = Decimal(d)
    return exact.exp() - 1 - exact


@pytest.mark.threads
@given(
    rows=st.integers(0, 3),
    n=st.sampled_from([1, 2, 63, 64, 65, 200]),
    gap=st.integers(0, 3),
    apart=st.sampled_from([0, 1e-6, 1e-4, 1e-2, 0.1, 1, 10]),
    seed=st.integers(0, 99),
)
def test_kl_divergence(isa, executor, rows, n, gap, apart, seed):
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 5, (rows, n + gap)).astype(np.float32)[:, :n]
    x = (base + rng.normal(0, apart, base.shape)).astype(np.float32)
    parts = log_sum_exp(base)
    log_p = (base - parts[:, :1]) - parts[:, 1:]
    p = np.exp(log_p)
    got = kl_divergence(x, log_p, p, executor=executor)
    parts = log_sum_exp(x)
    assert got[:, :2].tobytes() == parts.tobytes()
    log_q = (x - parts[:, :1]) - parts[:, 1:]
    with localcontext() as context:
        context.prec = 40
        for i in range(rows):
            d = (log_q[i] - log_p[i]).tolist()
            exact = sum(Decimal(a) * _beyond_line(b) for a, b in zip(p[i].tolist(), d, strict=True))
            assert got[i, 2] >= 0
            assert abs(Decimal(float(got[i, 2])) - exact) <= Decimal("5e-13") * exact


def test_kl_divergence_loses_no_part_of_p(isa):
    """The smallest change of one float32 logit in 4000: the divergence is far below a rounding of p."""
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, (50, 4000)).astype(np.float32)
    x = base.copy()
    x[:, 7] = np.nextafter(x[:, 7], np.float32(9))
    parts = log_sum_exp(base)
    log_p = (base - parts[:, :1]) - parts[:, 1:]
    p = np.exp(log_p)
    moved = (x[:, 7] - base[:, 7]).astype(np.float64)
    expected = p[:, 7] * (1 - p[:, 7]) * moved**2 / 2
    assert (expected < 1e-16).all()
    np.testing.assert_allclose(kl_divergence(x, log_p, p)[:, 2], expected, rtol=1e-3)


def test_kl_divergence_where_p_is_nothing(isa):
    """There a term is q: without it the others would not add up to a divergence."""
    p = np.array([[0, 1.0]])
    x = np.float32([[0, 0]])
    log_p = np.array([[-np.inf, 0.0]])
    assert abs(kl_divergence(x, log_p, p)[0, 2] - math.log(2)) < 1e-14


def test_kl_divergence_of_limits(isa):
    """Where both are 0 nothing counts; where only the other is 0, all is lost."""
    inf, nan = np.inf, np.nan
    p = np.array([[0, 1.0]] * 4)
    log_p = np.array([[-inf, 0.0]] * 4)
    x = np.float32([[-inf, 3], [5, -inf], [1, nan], [-inf, -3e38]])
    np.testing.assert_array_equal(kl_divergence(x, log_p, p)[:, 2], [0, inf, nan, 0])
    itself = np.float32([[1, 2, 3.5]])
    parts = log_sum_exp(itself)
    log_q = (itself - parts[:, :1]) - parts[:, 1:]
    assert kl_divergence(itself, log_q, np.exp(log_q))[0, 2] == 0


@pytest.mark.threads
def test_the_bits_depend_on_neither_instruction_set_nor_threads():
    rng = np.random.default_rng(3)
    x = rng.normal(0, 20, (3, 40, 3001)).astype(np.float32)
    up = rng.normal(0, 1, x.shape).astype(np.float32)
    log_p = rng.normal(-9, 3, (120, 3001))
    p = np.exp(log_p)

    def results(executor):
        e = x.copy()
        sums = causal_exp(e, 1000)
        gate = swiglu(x.copy(), up, executor=executor)
        rows = x.reshape(-1, 3001)
        divergence = kl_divergence(rows, log_p, p, executor=executor)
        return [e, sums, gate, log_sum_exp(rows, executor=executor), divergence]

    expected = [array.tobytes() for array in results(None)]
    for threads in (1, 2, 5):
        with Executor(threads) as executor:
            assert [array.tobytes() for array in results(executor)] == expected
    best = supported_isas()[-1]
    try:
        for name in supported_isas():
            force_isa(name)
            assert [array.tobytes() for array in results(None)] == expected
    finally:
        force_isa(best)


def test_errors():
    x, y = np.ones((2, 3, 8), np.float32), np.ones((2, 3, 8), np.float32)
    read_only = x.copy()
    read_only.flags.writeable = False
    d = np.ones((3, 8))
    cases = [
        (ValueError, "up must be C-contiguous of shape", swiglu, (x, y[:1])),
        (ValueError, "soft_cap must be a positive number, not 1e-60", soft_cap, (x, 1e-60)),
        (ValueError, r"soft_cap must be a positive number, not 1e\+300", soft_cap, (x, 1e300)),
        (ValueError, "gate must be C-contiguous", swiglu, (x[:, ::2], y[:, ::2])),
        (ValueError, "gate overlaps up", swiglu, (x, x)),
        (ValueError, "gate is read-only", swiglu, (read_only, y)),
        (TypeError, "up must .*float64", swiglu, (x, y.astype(np.float64))),
        (TypeError, "gate must .*list", swiglu, ([1.0], y)),
        (ValueError, "x must be C-contiguous of shape .heads", causal_exp, (x[0], 1)),
        (ValueError, "x must be C-contiguous of shape .heads", causal_exp, (x[:, ::2], 1)),
        (ValueError, "n_first must be an integer from 1 to 6, not 7", causal_exp, (x, 7)),
        (ValueError, "n_first must be an integer from 1 to 6, not 0", causal_exp, (x, 0)),
        (ValueError, "n_first must ", causal_exp, (x, 1.0)),
        (ValueError, "x is read-only", causal_exp, (read_only, 1)),
        (ValueError, "x must be of shape", log_sum_exp, (x,)),
        (ValueError, "x must be of shape", log_sum_exp, (np.empty((2, 0), np.float32),)),
        (TypeError, "x must .*float64", log_sum_exp, (np.ones((2, 2)),)),
        (ValueError, "last axis of x", log_sum_exp, (x[0, :, ::2],)),
        (ValueError, "x must be of shape", kl_divergence, (x, d, d)),
        (TypeError, "log_p must .*float32", kl_divergence, (x[0], y[0], d)),
        (ValueError, "log_p must be C-contiguous of shape .3, 8.", kl_divergence, (x[0], d[:2], d)),
        (
            ValueError,
            "p must be C-contiguous of shape .3, 8.",
            kl_divergence,
            (x[0], d, np.ones((3, 9))[:, :8]),
        ),
    ]
    for error, message, function, arguments in cases:
        with pytest.raises(error, match=message):
            function(*arguments)
    assert (x == 1).all() and (y == 1).all()
