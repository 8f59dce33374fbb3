"""How sure a figure over chunks is: intervals and tests whose unit is the chunk.

Tokens of a chunk are correlated, chunks drawn at random from a text are not, so every interval here
comes from the scatter of the chunks' own figures, by Student's t. A mean of what cannot be negative
(a KL divergence), or a ratio of two such means, has its interval on the logarithm: by the delta method
the mean, by the jackknife the ratio.
docs/statistics.md derives them and shows how often they hold the truth.

Sources: the jackknife, Quenouille, Biometrika 43 (1956), whose variance is rather too large, Efron and
Stein, Annals of Statistics 9 (1981); the number of chunks that carry a sum, Kish, Survey Sampling
(1965), of weights; Student's t and the design-based interval of a proportion, Korn and Graubard, Survey
Methodology 24 (1998); several adjusted tests, Holm, Scandinavian Journal of Statistics 6 (1979);
random chunks and random realisations together, Dorfman, Berbaum and Metz, Investigative Radiology 27
(1992), with the degrees of freedom of Satterthwaite, Biometrics Bulletin 2 (1946).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from fq_kernels import exp, log

Interval = tuple[float, float]

MIN_CHUNKS = 4  # below it nothing is said of how sure a figure is
ENOUGH_CHUNKS = 8  # below it with a warning
MIN_REALISATIONS = 3  # two scatter too freely to say how much
LEVEL = 0.05
MOST_CHUNKS = 10**6  # that are ever said to be needed


# ---------------------------------------------------------------- distributions


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function (Lentz), quick for x < (a + 1) / (a + b + 2)."""
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + step * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + step / c
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return value


def _log_1p(x: float) -> float:
    """ln(1 + x)."""
    sum_ = 1 + x
    # what the sum has lost of x is made good to first order
    return x if sum_ == 1 else log(sum_) * (x / (sum_ - 1))


def _log_gamma(x: float) -> float:
    """The logarithm of the gamma function, x > 0, by Stirling's series from 16 on."""
    product = 1.0
    while x < 16:
        product *= x
        x += 1
    y = 1 / (x * x)
    series = (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y / 1188)))) / x
    return (x - 0.5) * log(x) - x + 0.5 * log(2 * math.pi) + series - log(product)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, a and b positive."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = exp(_log_gamma(a + b) - _log_gamma(a) - _log_gamma(b) + a * log(x) + b * _log_1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(x, a, b) / a
    return 1 - front * _beta_fraction(1 - x, b, a) / b


def beta_quantile(p: float, a: float, b: float) -> float:
    """Where `beta_cdf` is p."""
    low, high = 0.0, 1.0
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)
    return (low + high) / 2


def t_p(t: float, df: float) -> float:
    """The chance that Student's t, of df degrees of freedom, is at least as far from 0 on either side."""
    if math.isnan(t):
        return 1.0
    return beta_cdf(df / (df + t * t), df / 2, 0.5) if math.isfinite(t) else 0.0


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """The t > 0 that is exceeded, on either side, with the chance p."""
    low, high = 0.0, 1.0
    while t_p(high, df) > p:
        low, high = high, 2 * high
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_p(middle, df) > p else (low, middle)
    return (low + high) / 2


# ---------------------------------------------------------------- one figure


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def mean_interval(chunks: np.ndarray) -> Interval | None:
    """95 % interval of the mean over chunks; None below MIN_CHUNKS or where a value is not finite."""
    if len(chunks) < MIN_CHUNKS or not np.isfinite(chunks).all():
        return None
    mean, half = float(np.mean(chunks)), t_quantile(LEVEL, len(chunks) - 1) * standard_error(chunks)
    return mean - half, mean + half


def positive_interval(chunks: np.ndarray) -> Interval | None:
    """Of a mean of values that cannot be negative: mean * exp(-+ t * se / mean).

    None too where fewer than MIN_CHUNKS chunks have any: then what there is came from too few; and where the
    mean is not above 0, as what an early version's rounding left of one may be.
    """
    if np.count_nonzero(chunks) < MIN_CHUNKS or not np.isfinite(chunks).all():
        return None
    mean = float(np.mean(chunks))
    if mean <= 0:
        return None
    half = t_quantile(LEVEL, len(chunks) - 1) * standard_error(chunks) / mean
    return mean * exp(-half), mean * exp(half)


@dataclass(frozen=True)
class RatioTest:
    """Two means: their ratio, its 95 % interval, and p of its being 1.

    t is ln(ratio) over its standard error, of df degrees of freedom, n the chunks that it comes from.
    """

    ratio: float
    interval: Interval
    t: float
    df: float
    p: float
    n: int


def ratio_test(numerators: np.ndarray, denominators: np.ndarray) -> RatioTest | None:
    """Of positive figures of the same chunks. What makes a chunk hard for both cancels.

    The standard error of the ratio's logarithm is the jackknife's: how it scatters where each chunk in turn
    is left out. First-order changes would be near 0 wherever one chunk carries both sums, whatever the
    others say. Its degrees of freedom are those of as many chunks as carry the more uneven sum (`_carrying`).
    None where either has fewer than MIN_CHUNKS chunks that are not 0, or one that is not finite.
    """
    n = len(numerators)
    if min(np.count_nonzero(numerators), np.count_nonzero(denominators)) < MIN_CHUNKS:
        return None
    with np.errstate(over="ignore"):
        if not all(0 < np.sum(values) < math.inf for values in (numerators, denominators)):
            return None
    without = log(_sums_without_each(numerators) / _sums_without_each(denominators))
    off = without - np.mean(without)
    se = math.sqrt((n - 1) / n * float(np.sum(off * off)))
    df = max(min(_carrying(numerators), _carrying(denominators)) - 1, 1.0)
    return _log_ratio(float(np.mean(numerators)) / float(np.mean(denominators)), se, df, n)


def _carrying(values: np.ndarray) -> float:
    """How many equal chunks would be as uneven: 1 over the summed squares of their shares (Kish 1965)."""
    shares = values / np.sum(values)
    return 1 / float(np.sum(shares * shares))


def _sums_without_each(values: np.ndarray) -> np.ndarray:
    """The sum of all others, for each; by addition, since a chunk may be nearly all of the sum."""
    zero = np.zeros(1)
    before: np.ndarray = np.cumsum(np.concatenate([zero, values[:-1]]))
    before += np.cumsum(np.concatenate([zero, values[:0:-1]]))[::-1]
    return before


def _log_ratio(ratio: float, se: float, df: float, n: int) -> RatioTest:
    """se is of ln(ratio)."""
    half = t_quantile(LEVEL, df) * se
    t = _t(log(ratio), se)
    return RatioTest(ratio, (ratio * exp(-half), ratio * exp(half)), t, df, t_p(t, df), n)


def _t(value: float, se: float) -> float:
    return value / se if se else math.copysign(math.inf, value) if value else 0.0


def welch_test(numerators: np.ndarray, denominators: np.ndarray) -> RatioTest | None:
    """As `ratio_test`, of means over chunks that have nothing to do with one another."""
    if min(np.count_nonzero(numerators), np.count_nonzero(denominators)) < MIN_CHUNKS:
        return None
    if not (np.isfinite(numerators).all() and np.isfinite(denominators).all()):
        return None
    up, down = float(np.mean(numerators)), float(np.mean(denominators))
    if min(up, down) <= 0:
        return None
    shares = [standard_error(v) / m for v, m in ((numerators, up), (denominators, down))]
    parts = [share * share for share in shares]  # a power would be the C library's
    sizes = len(numerators) - 1, len(denominators) - 1
    spread = sum(part * part / size for part, size in zip(parts, sizes, strict=True))
    df = sum(parts) * sum(parts) / spread if spread else float(min(sizes))
    return _log_ratio(up / down, math.sqrt(sum(parts)), df, min(sizes) + 1)


def agreement_interval(agreeing: Sequence[int] | np.ndarray, tokens: int) -> Interval | None:
    """95 % interval of the share of tokens that agree, from how many do in each chunk of ``tokens``.

    Exact binomial (Clopper-Pearson) limits for the number of tokens that would say as much were they
    independent: the design effect is the variance between chunks over the binomial one. So there
    is an interval at 100 % too. None below MIN_CHUNKS.
    """
    n, total = len(agreeing), len(agreeing) * tokens
    if n < MIN_CHUNKS:
        return None
    share = float(np.sum(agreeing)) / total
    scatter = standard_error(np.asarray(agreeing)) / tokens
    variance = scatter * scatter
    design = t_quantile(LEVEL, total - 1) / t_quantile(LEVEL, n - 1)
    effective = total * design * design
    if variance > 0:
        effective *= share * (1 - share) / total / variance
    effective = min(effective, total)
    hits, misses = share * effective, (1 - share) * effective
    low = beta_quantile(LEVEL / 2, hits, misses + 1) if hits else 0.0
    high = beta_quantile(1 - LEVEL / 2, hits + 1, misses) if misses else 1.0
    return low, high


@dataclass(frozen=True)
class MeanTest:
    """A mean, its 95 % interval, and p of its being 0."""

    mean: float
    interval: Interval
    t: float
    df: float
    p: float


def realisations_test(values: np.ndarray) -> MeanTest | None:
    """The mean of values (realisations, chunks), both of them drawn at random.

    Var(mean) = (MS_chunks + MS_realisations - MS_both) / (realisations * chunks), where MS_both is the
    residual of the two-way table; a negative component counts as 0. None below MIN_CHUNKS chunks that
    differ at all, below MIN_REALISATIONS, or where a value is not finite.
    """
    k, n = values.shape
    if k < MIN_REALISATIONS or not np.isfinite(values).all():
        return None
    if np.count_nonzero(values.any(axis=0)) < MIN_CHUNKS:
        return None
    mean = float(np.mean(values))
    of_chunk, of_realisation = values.mean(axis=0) - mean, values.mean(axis=1) - mean
    rest = values - mean - of_chunk - of_realisation[:, None]
    chunks = k * float(np.sum(of_chunk * of_chunk)) / (n - 1)
    realisations = n * float(np.sum(of_realisation * of_realisation)) / (k - 1)
    both = float(np.sum(rest * rest)) / ((k - 1) * (n - 1))
    if realisations > both:
        total = chunks + realisations - both
        parts = chunks * chunks / (n - 1) + realisations * realisations / (k - 1)
        parts += both * both / ((k - 1) * (n - 1))
        df = min(total * total / parts, n - 1)
    else:
        total, df = chunks, n - 1
    df = max(df, 1.0)
    se = math.sqrt(total / (n * k))
    half = t_quantile(LEVEL, df) * se
    t = _t(mean, se)
    return MeanTest(mean, (mean - half, mean + half), t, df, t_p(t, df))


# ---------------------------------------------------------------- several at once


def holm(ps: Sequence[float]) -> list[float]:
    """p of each of several tests that are read together, adjusted so that with the chance 1 - LEVEL none of
    those below LEVEL is false."""
    adjusted, least = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = least
    return adjusted


def chunks_needed(test: RatioTest, tests: int) -> int | None:
    """How many chunks resolve, among ``tests`` tests, what is not yet; None: more than MOST_CHUNKS.

    Taken that the means and the scatter of the chunks stay as they are.
    """

    def enough(chunks: int) -> bool:
        more = chunks / test.n
        df = max((test.df + 1) * more - 1, 1.0)
        return abs(test.t) * math.sqrt(more) > t_quantile(LEVEL / max(tests, 1), df)

    if not enough(MOST_CHUNKS):
        return None
    low, high = MIN_CHUNKS - 1, MIN_CHUNKS
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class Ordering:
    """Which of several cells cost more than which, by their mean KL over the same chunks.

    means  (cells, chunks)

    Every pair is tested by `ratio_test`, and the p are adjusted (`holm`) over all pairs.
    """

    def __init__(self, means: Sequence[np.ndarray] | np.ndarray) -> None:
        self.n = len(means)
        self.pairs = list(combinations(range(self.n), 2))
        self.tests = {(i, j): ratio_test(means[i], means[j]) for i, j in self.pairs}
        known = {pair: test.p for pair, test in self.tests.items() if test is not None}
        self.p = dict(zip(known, holm(list(known.values())), strict=True))
        # whether any order could be told: false below MIN_CHUNKS
        self.known = bool(known)

    def costs_more(self, i: int, j: int) -> bool:
        """Whether it is resolved that cell i has a larger mean KL than cell j."""
        pair = (min(i, j), max(i, j))
        test = self.tests[pair]
        return test is not None and self.p[pair] < LEVEL and (test.ratio > 1) == (i < j)

    def apart(self, i: int, j: int) -> bool:
        return self.costs_more(i, j) or self.costs_more(j, i)

    @property
    def n_resolved(self) -> int:
        return sum(self.apart(i, j) for i, j in self.pairs)

    def rank(self, i: int) -> tuple[int, int]:
        """(best, worst) place of a cell, 1 being the largest mean KL."""
        others = [j for j in range(self.n) if j != i]
        return (
            1 + sum(self.costs_more(j, i) for j in others),
            self.n - sum(self.costs_more(i, j) for j in others),
        )

    def chunks_needed(self, i: int, j: int) -> int | None:
        """How many chunks would resolve the order of two cells, as one of all these pairs."""
        test = self.tests[min(i, j), max(i, j)]
        return None if test is None else chunks_needed(test, len(self.p))

    @property
    def chunks_for_the_next(self) -> int | None:
        """How many would resolve one more pair."""
        left = [pair for pair in self.pairs if self.tests[pair] is not None and not self.apart(*pair)]
        if not left:
            return None
        return self.chunks_needed(*max(left, key=lambda pair: abs(getattr(self.tests[pair], "t", 0.0))))
