"""Intervals and tests over chunks: against published distributions, and by how often they are right."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq.measure.inference import (
    LEVEL,
    MIN_CHUNKS,
    Ordering,
    RatioTest,
    agreement_interval,
    beta_cdf,
    beta_quantile,
    chunks_needed,
    holm,
    mean_interval,
    positive_interval,
    ratio_test,
    realisations_test,
    t_p,
    t_quantile,
    welch_test,
)

NAN = math.nan

# ---------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    "a, b, x, cdf",
    [
        (0.5, 0.5, 0.3, 0.36901011956554536),
        (2, 3, 0.6, 0.8208),
        (891, 1, 0.997, 0.068767946459723),
    ],
)
def test_beta(a, b, x, cdf):
    assert beta_cdf(x, a, b) == pytest.approx(cdf, rel=1e-10)
    assert beta_quantile(cdf, a, b) == pytest.approx(x, rel=1e-10)
    assert beta_cdf(1 - x, b, a) == pytest.approx(1 - cdf, rel=1e-10)


# Abramowitz and Stegun, table 26.10, and scipy
@pytest.mark.parametrize(
    "p, df, t",
    [
        (0.05, 3, 3.182446305284263),
        (0.05, 7, 2.364624251592785),
        (0.05, 31, 2.0395134463964077),
        (1e-4, 7, 7.8845842624166025),
        (0.05, 2.5, 3.5746548420036834),
    ],
)
def test_student(p, df, t):
    assert t_quantile(p, df) == pytest.approx(t, rel=1e-9)
    assert t_p(t, df) == t_p(-t, df) == pytest.approx(p, rel=1e-9)


def test_figures_that_sum_to_nothing_have_no_interval_and_no_ratio():
    """Rounding may leave less than 0 of a figure that cannot be."""
    one, other = np.array([1, -1, 2, -2, 4, -4]) * 1e-9, np.ones(6) + np.arange(6)
    assert positive_interval(one) is None and positive_interval(other)
    for test in (ratio_test, welch_test):
        assert test(one, other) is None and test(other, one) is None and test(other, other) is not None


def test_student_at_the_ends():
    assert t_p(0, 5) == 1 and t_p(math.inf, 5) == 0 and t_p(NAN, 5) == 1
    assert 0 < t_p(1e6, 15) < 1e-60


# ---------------------------------------------------------------- one figure

SKEWED = np.random.default_rng(3).gamma(2.0, 1.0, (2000, 5))


def holds(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


def test_intervals_hold_the_mean_as_often_as_they_say():
    """Of five chunks. The interval on the logarithm keeps to positive values and is right of skewed ones."""
    normal = np.random.default_rng(4).standard_normal((2000, 5))
    assert 0.94 < holds(map(mean_interval, normal), 0) < 0.96
    logs = [positive_interval(x) for x in SKEWED]
    assert 0.92 < holds(logs, 2) < 0.97
    assert all(low > 0 for low, _ in logs)


def test_a_ratio_is_of_the_same_chunks():
    hard = np.random.default_rng(1).gamma(1.0, 1.0, 9)
    test = ratio_test(3 * hard, 2 * hard)
    assert test.ratio == pytest.approx(1.5)
    assert test.interval == pytest.approx((1.5, 1.5)) and test.p < 1e-30
    same = ratio_test(hard, hard)
    assert (same.ratio, same.t, same.p) == (1, 0, 1)
    turned = ratio_test(2 * hard, hard + 0.1)
    back = ratio_test(hard + 0.1, 2 * hard)
    assert (turned.t, turned.p) == pytest.approx((-back.t, back.p))


def test_one_chunk_that_carries_both_decides_nothing():
    """It has next to all of either sum, so that its own ratio is that of the means; the others deny it."""
    one = np.array([1.24e-4, 4.3e-8, 4.6e-8, 4.3e-8])
    other = np.array([8.8e-6, 2.4e-7, 2.6e-7, 2.2e-7])
    test = ratio_test(one, other)
    assert test.ratio == pytest.approx(13, rel=0.01)
    assert test.p > 0.3 and test.interval[0] < 1e-2 and test.df == 1
    # were they of its opinion, they would count
    agreeing = ratio_test(one, one / 13 * np.array([1, 1.1, 0.9, 1.05]))
    assert agreeing.p < 0.05


def test_a_ratio_interval_and_its_test_agree():
    for up, down in zip(SKEWED[:400], SKEWED[400:800], strict=True):
        test = ratio_test(up, down)
        assert (test.interval[0] > 1 or test.interval[1] < 1) == (test.p < LEVEL)


@pytest.mark.parametrize("test", [ratio_test, welch_test])
def test_equal_means_are_called_different_as_often_as_said(test):
    found = [test(up, down).p < LEVEL for up, down in zip(SKEWED[:1000], SKEWED[1000:], strict=True)]
    assert 0.02 < np.mean(found) < 0.08


def test_welch_takes_chunks_that_are_not_the_same():
    up, down = SKEWED[0], SKEWED[1, :4]
    test = welch_test(up, down)
    assert test.ratio == pytest.approx(up.mean() / down.mean()) and test.n == 4
    wide = ratio_test(3 * up, 2 * up).interval
    assert welch_test(3 * up, 2 * up).interval[0] < 0.9 * wide[0]


@pytest.mark.parametrize("n", range(MIN_CHUNKS))
def test_too_few_chunks_say_nothing(n):
    few = np.ones(n)
    assert mean_interval(few) is positive_interval(few) is None
    assert ratio_test(few, few) is welch_test(few, few) is realisations_test(np.ones((5, n))) is None
    assert agreement_interval([3] * n, 5) is None


def test_chunks_that_are_0_count_as_none():
    assert positive_interval(np.array([1.0, 1, 1, 0, 0, 0])) is None
    assert ratio_test(np.array([1.0, 1, 1, 0]), np.ones(4)) is None
    assert positive_interval(np.array([1.0, 1, 1, 2, 0])) is not None


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_is_not_finite_has_no_interval(bad):
    chunks, fine = np.array([1.0, 2, 3, bad]), np.ones(4)
    assert mean_interval(chunks) is positive_interval(chunks) is None
    assert ratio_test(chunks, fine) is ratio_test(fine, chunks) is welch_test(fine, chunks) is None
    assert realisations_test(np.array([chunks, fine])) is None


def test_a_sum_that_overflows_has_no_interval():
    huge = np.full(4, 1e308)
    assert ratio_test(huge, np.ones(4)) is ratio_test(np.ones(4), huge) is None


# ---------------------------------------------------------------- agreement


def test_agreement_knows_that_tokens_of_a_chunk_go_together():
    spread, even = agreement_interval([90, 100] * 5, 100), agreement_interval([95] * 10, 100)
    assert spread[0] < even[0] < 0.95 < even[1] < spread[1]
    # exact limits of 950 of 1000 are 0.9346 to 0.9627; a chunk's tokens being alike, for fewer
    assert even[0] < 0.9347 and even[1] > 0.9626


def test_full_agreement_is_not_certain():
    low, high = agreement_interval([255] * 6, 255)
    assert high == 1 and 1 - low == pytest.approx(0.0041, abs=2e-4)
    assert agreement_interval([0] * 6, 255) == pytest.approx((0, 1 - low))


def test_agreement_holds_the_truth():
    """Chunks whose shares differ: a beta-binomial of 0.9, as correlated as ours are."""
    rng = np.random.default_rng(8)
    found = [agreement_interval(rng.binomial(100, rng.beta(45, 5, 8)), 100) for _ in range(200)]
    assert 0.92 < holds(found, 0.9) <= 1


# ---------------------------------------------------------------- realisations


def test_one_realisation_says_nothing():
    assert realisations_test(np.ones((1, 9))) is None


def test_realisations_that_differ_as_a_whole_widen_the_interval():
    rng = np.random.default_rng(2)
    alike = rng.standard_normal((5, 12))
    apart = alike + np.array([-2.0, -1, 0, 1, 2])[:, None]
    narrow, wide = realisations_test(alike).interval, realisations_test(apart).interval
    assert wide[0] < narrow[0] - 0.5 and wide[1] > narrow[1] + 0.5


@pytest.mark.parametrize("of_realisation", [0, 1])
def test_realisations_test_holds_the_truth(of_realisation):
    rng = np.random.default_rng(6)
    hits = []
    for _ in range(600):
        values = rng.standard_normal((4, 6)) + rng.standard_normal(6)
        values += of_realisation * rng.standard_normal((4, 1))
        low, high = realisations_test(values).interval
        hits.append(low <= 0 <= high)
    assert 0.93 < np.mean(hits) < 0.99


# ---------------------------------------------------------------- several


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1, 1]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_between_no_adjustment_and_bonferroni(ps):
    for p, adjusted in zip(ps, holm(ps), strict=True):
        assert p <= adjusted <= min(1, len(ps) * p)


def test_an_order_is_what_the_paired_tests_tell():
    rng = np.random.default_rng(1)
    hard = rng.gamma(2, 1, 8)
    cells = np.array([hard * f * (1 + 0.01 * rng.standard_normal(8)) for f in (1, 3, 1.0, 2)])
    order = Ordering(cells)
    assert [order.rank(i) for i in range(4)] == [(3, 4), (1, 1), (3, 4), (2, 2)]
    assert order.costs_more(1, 0) and not order.costs_more(0, 1) and not order.apart(0, 2)
    assert order.n_resolved == 5 and order.known
    assert order.chunks_for_the_next == order.chunks_needed(0, 2) > 8


def test_without_chunks_there_is_no_order():
    order = Ordering(np.ones((3, 3)))
    assert not order.known and order.rank(0) == (1, 3) and order.chunks_for_the_next is None
    assert Ordering([]).n == 0


def test_equal_cells_are_ordered_in_one_of_twenty_sweeps_at_most():
    """Twelve cells that cost the same, 66 pairs: without adjustment nearly every sweep would order some."""
    rng = np.random.default_rng(9)
    found = [Ordering(rng.gamma(20, 1, (12, 8))).n_resolved > 0 for _ in range(60)]
    assert np.mean(found) < 0.12


def test_chunks_needed():
    test = RatioTest(1.5, (0.5, 4.5), t=2.0, df=5.0, p=0.1, n=8)  # eight chunks that count as six
    needed = chunks_needed(test, 435)
    assert needed > 8
    for n, enough in ((needed, True), (needed - 1, False)):
        assert (2.0 * math.sqrt(n / 8) > t_quantile(LEVEL / 435, 6 * n / 8 - 1)) == enough
    assert chunks_needed(replace(test, t=1e-9), 1) is None
