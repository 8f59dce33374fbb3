"""exp, ln, cos and sin against extended precision and against one another's bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq_kernels import cos, exp, force_isa, log, log_softmax, log_sum_exp, sin, supported_isas
from fq_kernels import isa as fq_isa


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(got, expected)  # a NaN where a NaN is
    assert got.dtype == expected.dtype == np.float64
    assert (np.signbit(got) == np.signbit(expected))[~np.isnan(expected)].all()


EXACT = {exp: np.exp, log: np.log, cos: np.cos, sin: np.sin}


def arguments(fn) -> np.ndarray:
    rng = np.random.default_rng(3)
    if fn is exp:
        return np.concatenate([rng.uniform(-745, 709.7, 50_000), rng.uniform(-1, 1, 50_000)])
    if fn is log:
        return np.concatenate([np.exp(rng.uniform(-744, 709, 50_000)), 1 + rng.normal(0, 1e-3, 50_000)])
    whole = np.arange(-1000, 1000) * (np.pi / 2)
    return np.concatenate([rng.uniform(-(2**20), 2**20, 50_000), rng.uniform(-8, 8, 50_000), whole])


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="no longer float on this platform")
@pytest.mark.parametrize("fn", EXACT, ids=lambda fn: EXACT[fn].__name__)
def test_errors_are_within_the_contract(isa, fn):
    x = arguments(fn)
    exact = EXACT[fn](x.astype(np.longdouble))
    unit = np.spacing(np.abs(exact.astype(np.float64))) if fn in (exp, log) else 2e-16
    assert (np.abs(fn(x) - exact) <= unit).all()


@pytest.mark.parametrize("fn", EXACT, ids=lambda fn: EXACT[fn].__name__)
@given(x=st.lists(st.floats(width=64), min_size=1, max_size=70))
def test_bits_do_not_depend_on_the_instruction_set(fn, x):
    values, before, found = np.array(x), fq_isa(), []
    try:
        for name in supported_isas():
            force_isa(name)
            found.append(fn(values))
    finally:
        force_isa(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])
    # one at a time, and as numbers
    assert_same_bits(np.array([fn(float(value)) for value in x]), found[0])


@np.errstate(all="ignore")
def test_limits_are_those_of_c(isa):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 710.0, -746.0, -1.0, 5e-324, -5e-324])
    for fn, numpys in EXACT.items():
        np.testing.assert_allclose(fn(x), numpys(x), rtol=1e-15, atol=1e-16)
    assert fn(x.reshape(2, 5)).shape == (2, 5) and isinstance(exp(1), float)
    assert np.signbit(sin(-0.0)) and not np.signbit(sin(0.0))
    assert exp(0.0) == 1 and log(1.0) == 0 and cos(0.0) == 1 and sin(0.0) == 0
    # the rest by 2 pi of what is larger, which is no longer the angle that it was
    assert abs(sin(1e300)) <= 1 and sin(2.0**21) == sin(math.fmod(2.0**21, 2 * math.pi))


@pytest.mark.threads
@given(
    rows=st.integers(0, 3),
    n=st.integers(1, 200),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_log_softmax(isa, executor, rows, n, scale, seed):
    x = (np.random.default_rng(seed).normal(0, 1, (rows, n)) * scale).astype(np.float32)
    log_p, p = np.full((2, rows, n), np.nan)
    log_softmax(x, log_p=log_p, p=p, executor=executor)
    parts = log_sum_exp(x)
    assert_same_bits(log_p, (x - parts[:, :1]) - parts[:, 1:])
    np.testing.assert_allclose(p, np.where(log_p < -700, 0, np.exp(log_p)), rtol=4e-16, atol=0)


def test_numbers_of_numpy_are_numbers():
    for one in (np.float32(1), np.float64(1), np.int64(1), 1):
        assert type(exp(one)) is float and exp(one) == exp(1.0)


def test_log_softmax_errors():
    x, log_p, p = np.zeros((2, 3), np.float32), np.zeros((2, 3)), np.zeros((2, 3))
    cases = [
        (TypeError, "x must", (x.astype(float), log_p, p)),
        (TypeError, "log_p must", (x, x, p)),
        (ValueError, r"p must .*\(2, 3\)", (x, log_p, p[:1])),
        (ValueError, "log_p must", (x, np.zeros((3, 2)).T, p)),
        (ValueError, "log_p overlaps p", (x, p, p)),
        (ValueError, "x must", (x[0], log_p, p)),
    ]
    for error, message, (values, logs, out) in cases:
        with pytest.raises(error, match=message):
            log_softmax(values, log_p=logs, p=out)
