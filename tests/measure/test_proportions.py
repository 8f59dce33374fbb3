"""Shares of items and survival, against scipy, and by what they say of data made at random."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import optimize, stats

from fq.measure.proportions import (
    Z,
    mcnemar_p,
    median_survival,
    survival,
    tango_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 30), (7, 30), (30, 30), (123, 500)])
def test_wilsons_interval(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(0, 0) is None


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (1, 1), (2, 1), (0, 6), (5, 5), (5, 6), (3, 9), (40, 70), (700, 600)]
)
def test_mcnemars_test_is_exact(lost, gained):
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained)


def likeliest_lost(lost, gained, n, delta):
    """The chance of a lost item under which the data are likeliest, where gained is delta more."""

    def minus_ln(q):
        rest = 1 - 2 * q - delta
        with np.errstate(divide="ignore"):
            return -sum(
                k * math.log(max(p, 1e-300))
                for k, p in ((lost, q), (gained, q + delta), (n - lost - gained, rest))
            )

    low, high = max(0.0, -delta), (1 - delta) / 2
    return optimize.minimize_scalar(
        minus_ln, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(12, 2, 50), (3, 9, 40), (1, 1, 20), (0, 7, 30), (25, 24, 60)]
)
def test_tangos_interval_is_where_the_score_says_so(lost, gained, n):
    """With the nuisance chance found by a search of the likelihood, not by the formula."""
    for delta, side in zip(tango_interval(lost, gained, n), (Z, -Z), strict=True):
        q = likeliest_lost(lost, gained, n, delta)
        score = (gained - lost - n * delta) / math.sqrt(n * (2 * q + delta - delta * delta))
        assert score == pytest.approx(side, abs=1e-3)


def test_tangos_interval_at_the_edges():
    # no item differs: it is Wilson's for none of n
    assert tango_interval(0, 0, 50)[1] == pytest.approx(wilson_interval(0, 50)[1])
    assert tango_interval(0, 0, 50)[0] == -tango_interval(0, 0, 50)[1]
    low, high = tango_interval(30, 0, 30)
    assert low == -1 and -1 < high < -0.7
    assert tango_interval(0, 30, 30) == pytest.approx((-high, 1.0))
    assert tango_interval(0, 0, 0) is None


def test_tangos_interval_holds_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for chances in ((0.02, 0.03, 0.95), (0.1, 0.2, 0.7)):
        lost, gained, _ = rng.multinomial(150, chances, 3000).T
        ends = [tango_interval(a, b, 150) for a, b in zip(lost.tolist(), gained.tolist(), strict=True)]
        held = np.mean([low <= chances[1] - chances[0] <= high for low, high in ends])
        assert held == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_survival_is_scipys(seed):
    rng = np.random.default_rng(seed)
    times = rng.integers(1, 20, 40)
    ended = rng.random(40) < 0.6
    expected = stats.ecdf(stats.CensoredData.right_censored(times, ~ended)).sf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where nobody is left it has no interval
        ends = expected.confidence_interval(method="log-log")
    curve = survival(times.tolist(), ended.tolist())
    at = {int(time): i for i, time in enumerate(expected.quantiles)}
    for point in curve:
        i = at[point.time]
        assert point.share == pytest.approx(expected.probabilities[i])
        assert point.at_risk == (times >= point.time).sum()
        if 0 < point.share:
            assert point.interval == pytest.approx((ends.low.probabilities[i], ends.high.probabilities[i]))
    assert {point.time for point in curve} == set(times[ended].tolist())


def test_median_survival():
    curve = survival([1, 2, 3, 4, 5, 6], [True] * 6)
    median, (low, high) = median_survival(curve)
    assert (median, low, high) == (3, 1, None)
    # of few the curve's end, which has no interval, is none of the median's either
    assert median_survival(survival([7], [True])) == (7, (None, None))
    assert median_survival(survival([3, 10], [True, True])) == (3, (3, None))
    assert curve[-1].share == 0 and curve[-1].interval is None
    assert median_survival(survival([5] * 4, [False] * 4)) == (None, (None, None))
    assert survival([], []) == []
