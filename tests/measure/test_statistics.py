"""Paired statistics against a plain float64 recomputation, row by row and sum by sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fq.measure.statistics import (
    Paired,
    Reference,
    compare,
    is_exactly_zero,
    mean_se,
    ppl_se,
    score,
    summarise,
)
from fq_kernels import Executor

FIELDS = ("nll_base", "nll", "kld", "dp", "same_top", "p_top_base")
N_VOCAB = 37


def logits(seed, rows=19, scale=4.0):
    return (np.random.default_rng(seed).standard_normal((rows, N_VOCAB)) * scale).astype(np.float32)


def targets_for(values, seed=9):
    return np.random.default_rng(seed).integers(0, values.shape[1], len(values))


def log_p(row):
    """ln of the softmax, with exactly rounded sums."""
    values = [float(v) for v in row]
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def naive(base_row, other_row, target):
    p, q = log_p(base_row), log_p(other_row)
    return (
        -p[target],
        -q[target],
        math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)),
        math.exp(q[target]) - math.exp(p[target]),
        p.index(max(p)) == q.index(max(q)),
        math.exp(max(p)),
    )


def test_score_is_minus_ln_p_of_the_target(executor):
    values = logits(1)
    targets = targets_for(values)
    want = [-log_p(row)[target] for row, target in zip(values, targets, strict=True)]
    np.testing.assert_allclose(score(values, targets, executor), want, rtol=1e-13)


def test_compare_is_the_naive_recomputation(executor):
    base = logits(1)
    other = base + logits(2, scale=2.0)
    targets = targets_for(base)
    got = compare(base, other, targets, executor)
    want = [naive(*row) for row in zip(base, other, targets, strict=True)]
    for i, name in enumerate(FIELDS):
        np.testing.assert_allclose(getattr(got, name), [row[i] for row in want], rtol=1e-10, atol=1e-14)
    assert got.same_top.dtype == bool
    assert 0 < got.same_top.sum() < len(base)  # the case says something about both outcomes


def test_compare_and_score_give_the_same_nll(executor):
    base, other = logits(1), logits(2)
    targets = targets_for(base)
    paired = compare(base, other, targets, executor)
    assert (paired.nll_base == score(base, targets, executor)).all()
    assert (paired.nll == score(other, targets, executor)).all()


@pytest.mark.parametrize("before", [0, 5, -7])
def test_a_reference_compares_as_compare_does(executor, before):
    """After one of as many rows, of more and of fewer, in whose memory it may be."""
    base = logits(1)
    base[0, 3] = -np.inf  # a probability of 0
    targets = targets_for(base)
    reference = Reference(executor)
    other = logits(5, rows=len(base) + before)
    reference.set(other, targets_for(other, 6))  # of which nothing may be left
    reference.set(base.copy(), targets)
    for other in (logits(2), base):
        got, want = reference.compare(other), compare(base, other, targets, executor)
        for name in FIELDS:
            assert getattr(got, name).tobytes() == getattr(want, name).tobytes(), name


def test_kl_is_of_the_baseline_to_the_other(executor):
    """KL is not symmetric: p = (1/2, 1/2) against q = (1 - 1/e, 1/e)."""
    base = np.zeros((1, 2), np.float32)
    other = np.log(np.array([[1 - 1 / math.e, 1 / math.e]])).astype(np.float32)
    paired = compare(base, other, np.array([0]), executor)
    want = 0.5 * math.log(0.5 / (1 - 1 / math.e)) + 0.5 * math.log(0.5 / (1 / math.e))
    assert paired.kld[0] == pytest.approx(want, rel=1e-6)
    assert paired.dp[0] == pytest.approx(0.5 - 1 / math.e, rel=1e-6)  # other minus base


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_the_threads(executor, threads):
    base, other = logits(1, 41), logits(2, 41)
    targets = targets_for(base)
    want = compare(base, other, targets, executor)
    with Executor(threads) as another:
        got = compare(base, other, targets, another)
        assert (score(base, targets, another) == want.nll_base).all()
    for name in FIELDS:
        assert getattr(got, name).tobytes() == getattr(want, name).tobytes(), name


finite_logits = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12),
    elements=st.floats(-60, 60, width=32),
)


@given(st.data(), finite_logits)
def test_kl_is_never_negative(executor, data, base):
    other = data.draw(hnp.arrays(np.float32, base.shape, elements=st.floats(-60, 60, width=32)))
    paired = compare(base, other, np.zeros(len(base), np.int64), executor)
    # up to the rounding of two sums of terms as large as |ln p|
    assert (paired.kld >= -1e-13).all()
    assert (np.abs(paired.dp) <= 1).all()


@given(st.data(), finite_logits)
def test_a_stream_against_itself_is_exactly_zero(executor, data, values):
    targets = data.draw(hnp.arrays(np.int64, len(values), elements=st.integers(0, values.shape[1] - 1)))
    paired = compare(values, values.copy(), targets, executor)
    assert (paired.kld == 0).all() and (paired.dp == 0).all() and paired.same_top.all()
    assert (paired.nll == paired.nll_base).all()
    result = summarise([paired])
    assert is_exactly_zero(result)
    assert result["ppl_ratio"] == 1 and result["ppl_diff"] == result["rms_dp_se"] == 0
    assert result["ln_ppl_correlation"] == 1 or math.isnan(result["ln_ppl_correlation"])


@pytest.mark.parametrize("token", range(0, N_VOCAB, 6))
def test_one_changed_bit_is_not_exactly_zero(executor, token):
    base = logits(3)
    other = base.copy()
    other.view(np.uint32)[5, token] ^= 1
    targets = targets_for(base)
    result = summarise([compare(base, other, targets, executor)])
    assert not is_exactly_zero(result)
    assert is_exactly_zero(summarise([compare(base, base, targets, executor)]))


def test_each_figure_alone_unsettles_the_control(executor):
    base = logits(3)
    zero = summarise([compare(base, base, targets_for(base), executor)])
    for key in ("ln_ppl_ratio", "mean_kld", "kld_se", "max_kld", "median_kld", "ln_ppl_ratio_se", "rms_dp"):
        assert not is_exactly_zero(zero | {key: 1e-300}), key
    assert not is_exactly_zero(zero | {"same_top": 1 - 1e-9})
    assert not is_exactly_zero(zero | {"mean_kld": math.nan})
    assert not is_exactly_zero(zero | {"kld": zero["kld"] | {"min": -1e-300}})


def test_a_single_token_can_be_exactly_zero(executor):
    """Its standard errors are nan, which says nothing against it."""
    base = logits(3, rows=1)
    result = summarise([compare(base, base, np.array([4]), executor)])
    assert math.isnan(result["ln_ppl_ratio_se"])
    assert is_exactly_zero(result)


def test_the_top_token_is_that_of_the_logits_not_of_rounded_probabilities(executor):
    """Two logits apart by less than ln p can resolve are still two."""
    base = np.array([[1e-30, 0.0, -1.0]], np.float32)
    other = np.array([[0.0, 1e-30, -1.0]], np.float32)
    assert not compare(base, other, np.array([0]), executor).same_top[0]


class TestExtremes:
    def test_minus_infinity_is_probability_zero(self, executor):
        base = np.array([[0.0, 1.0, -np.inf]], np.float32)
        other = np.array([[0.5, 1.0, -np.inf]], np.float32)
        got = compare(base, other, np.array([0]), executor)
        want = naive(base[0, :2], other[0, :2], 0)
        for i, name in enumerate(FIELDS):
            assert getattr(got, name)[0] == pytest.approx(want[i], rel=1e-12)
        assert compare(base, base, np.array([2]), executor).kld[0] == 0

    def test_a_target_of_probability_zero_costs_infinity(self, executor):
        base = np.array([[0.0, 1.0, -np.inf]], np.float32)
        assert score(base, np.array([2]), executor)[0] == math.inf

    def test_what_only_the_other_stream_rules_out_is_infinitely_far(self, executor):
        base = np.array([[0.0, 1.0, 0.0]], np.float32)
        other = np.array([[0.0, 1.0, -np.inf]], np.float32)
        assert compare(base, other, np.array([0]), executor).kld[0] == math.inf
        assert math.isfinite(compare(other, base, np.array([0]), executor).kld[0])

    def test_huge_logits_stay_numbers(self, executor):
        largest = np.finfo(np.float32).max
        base = np.array([[largest, -largest, 0.0], [1e30, 1e30, 0.0]], np.float32)
        got = compare(base, base[:, ::-1].copy(), np.array([0, 0]), executor)
        for name in FIELDS:
            assert np.isfinite(getattr(got, name)).all(), name
        assert got.nll_base[1] == pytest.approx(math.log(2))
        assert summarise([got])["ppl_quant"] == math.inf  # exp of 1e38

    def test_nan_logits_are_not_hidden(self, executor):
        base = logits(4)
        bad = base.copy()
        bad[3, 3] = np.nan
        result = summarise([compare(base, bad, targets_for(base), executor)])
        assert math.isnan(result["ppl_quant"]) and math.isnan(result["mean_kld"])
        assert not is_exactly_zero(result)


def test_mean_se():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    mean, se = mean_se(values)
    assert mean == 4.0
    assert se == pytest.approx(np.std(values, ddof=1) / math.sqrt(4))  # the textbook's


def test_the_error_of_a_single_value_is_nan():
    mean, se = mean_se(np.array([3.0]))
    assert mean == 3.0 and math.isnan(se)
    assert math.isnan(ppl_se(np.array([3.0]))[1])


def test_a_perplexity_too_large_for_a_float_is_infinite():
    assert ppl_se(np.array([1000.0, 1001.0]))[0] == math.inf
    assert math.isnan(ppl_se(np.array([1.0, math.nan]))[0])


def test_ppl_se_is_llama_cpps_formula():
    nll = np.random.default_rng(5).gamma(2.0, 1.5, 1000)
    n = len(nll)
    ppl, se = ppl_se(nll)
    assert ppl == pytest.approx(math.exp(nll.mean()), rel=1e-12)
    assert se == pytest.approx(ppl * math.sqrt((np.mean(nll**2) - nll.mean() ** 2) / (n - 1)), rel=1e-9)


@pytest.fixture
def paired():
    """101 tokens whose quantiles can be told by hand."""
    rng = np.random.default_rng(6)
    ramp = rng.permutation(101) / 100
    return Paired(2 + 0 * ramp, 2 + ramp - 0.25, ramp, ramp - 0.5, ramp < 0.905, np.exp(-ramp))


def test_summary_of_known_values(paired):
    result = summarise([paired])
    for name, want in (
        ("max", 1),
        ("99.9%", 0.999),
        ("99%", 0.99),
        ("95%", 0.95),
        ("90%", 0.9),
        ("75%", 0.75),
        ("25%", 0.25),
        ("median", 0.5),
        ("10%", 0.1),
        ("5%", 0.05),
        ("1%", 0.01),
        ("0.1%", 0.001),
        ("min", 0),
    ):
        assert result["kld"][name] == pytest.approx(want), name
        assert result["dp"][name] == pytest.approx(want - 0.5), name
    assert result["max_kld"] == 1 and result["median_kld"] == 0.5
    assert result["mean_kld"] == pytest.approx(0.5)
    assert result["ln_ppl_ratio"] == pytest.approx(0.25)
    assert result["ppl_base"] == pytest.approx(math.exp(2))
    assert result["ppl_quant"] == pytest.approx(math.exp(2.25))
    ramp = np.arange(101) / 100
    assert result["ln_ppl_ratio_se"] == pytest.approx(ramp.std(ddof=1) / math.sqrt(101))
    assert result["rms_dp"] == pytest.approx(math.sqrt(np.mean((ramp - 0.5) ** 2)))
    assert result["same_top"] == pytest.approx(91 / 101)
    assert result["ppl_ratio"] == pytest.approx(math.exp(0.25))
    assert result["ppl_ratio_se"] == pytest.approx(math.exp(0.25) * result["ln_ppl_ratio_se"])
    assert result["ppl_diff"] == pytest.approx(math.exp(2.25) - math.exp(2))
    # the baseline does not vary: the error is the other's alone, and there is no correlation
    assert result["ppl_diff_se"] == pytest.approx(result["ppl_quant_se"])
    assert math.isnan(result["ln_ppl_correlation"])
    squares = (ramp - 0.5) ** 2
    se = squares.std(ddof=1) / math.sqrt(101)
    assert result["rms_dp_se"] == pytest.approx(se / (2 * math.sqrt(squares.mean())))


def test_what_two_streams_share_cancels():
    """The error of a difference, and the correlation, by llama-perplexity's sums of covariances."""
    rng = np.random.default_rng(3)
    base = rng.gamma(2.0, 1.5, 500)
    other = base + 0.1 * rng.standard_normal(500)
    rest = np.zeros(500)
    result = summarise([Paired(base, other, rest, rest, rest == 0, rest)])
    covariance = np.cov(other, base) / 500
    correlation = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    assert 0.99 < result["ln_ppl_correlation"] < 1
    assert result["ln_ppl_correlation"] == pytest.approx(correlation)
    gradient = np.array([result["ppl_quant"], -result["ppl_base"]])
    assert result["ppl_diff_se"] == pytest.approx(math.sqrt(gradient @ covariance @ gradient))
    assert result["ppl_diff_se"] < result["ppl_base_se"] / 5


def test_chunks_are_summarised_as_one(paired):
    quarters = [Paired(*(getattr(paired, f)[i : i + 20] for f in FIELDS)) for i in range(0, 80, 20)]
    together, apart = summarise([Paired.concatenate(quarters)]), summarise(quarters)
    for key in ("ppl_quant", "mean_kld", "kld_se", "same_top", "kld"):
        assert apart[key] == together[key], key
    assert together["mean_kld_ci95_chunks"] is None
    low, high = apart["mean_kld_ci95_chunks"]
    assert low < together["mean_kld"] < high


def chunks_of(means, agreeing, tokens=10):
    """Chunks with these mean KLs, and so many tokens with the same top."""
    return [
        Paired(
            np.ones(tokens),
            np.full(tokens, 1 + m),
            np.full(tokens, m),
            np.zeros(tokens),
            np.arange(tokens) < a,
            np.full(tokens, 0.5),
        )
        for m, a in zip(means, agreeing, strict=True)
    ]


def test_the_largest_chunk_stands_beside_the_mean():
    result = summarise(chunks_of([1.0, 1.0, 13.0, 1.0], [10] * 4))
    assert result["largest_chunk"] == {"position": 2, "mean_kld": 13.0, "times_mean": 3.25}
    assert result["chunks"]["mean_kld"] == [1.0, 1.0, 13.0, 1.0]


def test_where_few_chunks_differ_there_is_no_interval():
    """Rounding that acts in one chunk alone, first-call say, scatters between chunks by that alone."""
    result = summarise(chunks_of([1.0, 0, 0, 0, 0, 0, 0, 0], [9] + [10] * 7))
    for key in ("mean_kld", "ln_ppl_ratio", "same_top"):
        assert result[f"{key}_ci95_chunks"] is None
    assert result["ppl_base_ci95_chunks"] is not None
    four = summarise(chunks_of([1.0, 2.0, 1.5, 1.0, 0, 0, 0, 0], [9] + [10] * 7))
    for key in ("mean_kld", "ln_ppl_ratio", "same_top"):
        assert four[f"{key}_ci95_chunks"] is not None


def test_full_agreement_has_an_interval():
    low, high = summarise(chunks_of([1.0, 2.0, 1.5, 1.0], [10] * 4))["same_top_ci95_chunks"]
    assert 0.7 < low < 0.95 and high == 1
