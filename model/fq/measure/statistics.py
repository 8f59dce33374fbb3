"""Exact paired statistics: float64 from float32 logits, token by token.

Definitions are llama-perplexity's (its names are in brackets): nll is -ln p of the correct
token; KL divergence is KL(base || quantised) of the two next-token distributions; dp is the
change of the correct token's probability. Nothing is stored in fewer bits than it was
computed in, so a stream compared with itself gives exactly 0 everywhere.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from fq_kernels import Executor, default_fpu, exp, kl_divergence, log_softmax, log_sum_exp

from .inference import MIN_CHUNKS, agreement_interval, mean_interval, positive_interval
from .who_pays import who_pays

TOP_ROWS = 32  # per task
FLOOR = np.float32(16)  # nats below a row's largest; a file of ln p has none less

_scratch = threading.local()


def _rows(n_vocab: int) -> np.ndarray:
    """This thread's scratch, two of float64 (1, n_vocab)."""
    rows = getattr(_scratch, "rows", None)
    if rows is None or rows.shape[2] != n_vocab:
        rows = _scratch.rows = np.empty((2, 1, n_vocab))
    return rows


@default_fpu()
def score(logits: np.ndarray, targets: np.ndarray, executor: Executor) -> np.ndarray:
    """nll of each target, float64 (n,), from logits float32 (n, n_vocab)."""
    return -_log_p_of(targets, logits, log_sum_exp(logits, executor=executor))


def _log_p_of(targets: np.ndarray, logits: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """ln p of a token in each row, of which log_sum_exp says the parts."""
    correct = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    with np.errstate(invalid="ignore"):
        log_p: np.ndarray = (correct - parts[:, 0]) - parts[:, 1]
    return log_p


@dataclass
class Paired:
    """Per scored token, float64 (n,): of the baseline, of the other stream, and between them.

    NaN where a logit that it is made from is NaN or infinity, which is no agreement either; a logit of minus
    infinity is probability 0.
    """

    nll_base: np.ndarray
    nll: np.ndarray
    kld: np.ndarray
    dp: np.ndarray
    same_top: np.ndarray  # bool
    p_top_base: np.ndarray  # the baseline's largest probability

    @classmethod
    def concatenate(cls, parts: list[Paired]) -> Paired:
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in cls.__dataclass_fields__))


@default_fpu()
def compare(base: np.ndarray, other: np.ndarray, targets: np.ndarray, executor: Executor) -> Paired:
    """Paired figures of two streams' logits, float32 (n, n_vocab) each, for the same tokens."""
    lp, found = np.empty((len(base), 2)), np.empty((len(base), 3))
    top = _top(base, executor)

    def row(i: int) -> None:
        log_p, p = _rows(base.shape[1])
        log_softmax(base[i : i + 1], log_p=log_p, p=p)
        lp[i] = log_p[0, targets[i]], log_p[0, top[i]]
        found[i] = kl_divergence(other[i : i + 1], log_p, p)

    executor.map(row, len(base))
    return _paired(lp, top, other, found, targets, executor)


def above_floor(log_p: np.ndarray) -> np.ndarray:
    """Which of a row's ln p, as the file has them, are no floor; bool of its shape."""
    least = log_p.min()
    # float32's last places are of the row's largest and least
    reaches = log_p.max() - least > FLOOR - np.float32(1e-4)
    known: np.ndarray = log_p > least if reaches else np.ones(log_p.shape, bool)
    return known


@default_fpu()
def compare_log_p(base: np.ndarray, other: np.ndarray, targets: np.ndarray, executor: Executor) -> Paired:
    """The same with a baseline of which a file has ln p, float32 (n, n_vocab): it is not normalised again.

    At the file's floor (`above_floor`) it says only that p is less. There the other stream's p is taken for
    it, so that the KL divergence is that of the tokens above.
    """
    lp, found = np.empty((len(base), 2)), np.empty((len(base), 3))
    top = _top(base, executor)

    def row(i: int) -> None:
        log_p, p = _rows(base.shape[1])
        log_softmax(other[i : i + 1], log_p=log_p, p=p)
        known = above_floor(base[i])
        log_p[0, known] = base[i, known]
        p[0, known] = exp(log_p[0, known])
        lp[i] = base[i, targets[i]], base[i, top[i]]
        found[i] = kl_divergence(other[i : i + 1], log_p, p)

    executor.map(row, len(base))
    return _paired(lp, top, other, found, targets, executor)


def _paired(
    lp: np.ndarray, top: np.ndarray, other: np.ndarray, found: np.ndarray, targets: np.ndarray, ex: Executor
) -> Paired:
    """lp (n, 2), top: the baseline's ln p of the targets and of its top tokens, and these; found:
    kl_divergence's of other."""
    lp, lp_top = lp.T
    lq = _log_p_of(targets, other, found)
    dp = exp(lq) - exp(lp)
    kld = np.where(np.isnan(dp), np.nan, found[:, 2])
    return Paired(-lp, -lq, kld, dp, (top == _top(other, ex)) & (top >= 0), exp(lp_top))


def _top(logits: np.ndarray, executor: Executor) -> np.ndarray:
    """The token with the largest logit in each row; -1 where that is infinite or NaN, and there is none."""
    top = np.empty(len(logits), np.intp)

    def block(i: int) -> None:
        rows = slice(i * TOP_ROWS, (i + 1) * TOP_ROWS)
        logits[rows].argmax(axis=1, out=top[rows])  # of the first NaN, where there is one
        largest = np.take_along_axis(logits[rows], top[rows, None], axis=1)[:, 0]
        top[rows][~np.isfinite(largest)] = -1

    executor.map(block, -(-len(logits) // TOP_ROWS))
    return top


class Reference:
    """A baseline that many streams are compared with, as by `compare`; its part is computed once.

    It keeps 16 bytes for each of its logits, float32 (n, n_vocab).
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._memory = np.empty((2, 0, 0))

    @default_fpu()
    def set(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """Take a baseline, in the memory of the one before: fresh pages cost more than the work."""
        n, n_vocab = logits.shape
        if self._memory.shape[1] < n or self._memory.shape[2] != n_vocab:
            self._memory = np.empty((2, n, n_vocab))
        self._log_p, self._p = self._memory[:, :n]
        self._targets = targets

        log_softmax(logits, log_p=self._log_p, p=self._p, executor=self._executor)
        self._top = _top(logits, self._executor)
        self._lp = np.take_along_axis(self._log_p, np.stack([targets, self._top], axis=1), axis=1)

    @default_fpu()
    def compare(self, other: np.ndarray) -> Paired:
        """Paired figures of the baseline and a stream's logits, float32 (n, n_vocab)."""
        found = kl_divergence(other, self._log_p, self._p, executor=self._executor)
        return _paired(self._lp, self._top, other, found, self._targets, self._executor)


def mean_se(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, values taken as independent (nan for a single value)."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, float(math.sqrt(np.mean((values - mean) ** 2) / (n - 1)))


@default_fpu()
def ppl_se(nll: np.ndarray) -> tuple[float, float]:
    """exp(mean nll) and PPL * sqrt((E[nll^2] - E[nll]^2) / (n - 1))."""
    mean, se = mean_se(nll)
    ppl = exp(mean)
    return ppl, ppl * se


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """nan where one of them does not vary."""
    da, db = a - np.mean(a), b - np.mean(b)
    scale = math.sqrt(np.mean(da * da) * np.mean(db * db))
    return float(np.mean(da * db) / scale) if scale else math.nan


QUANTILES = {
    "max": 1,
    "99.9%": 0.999,
    "99%": 0.99,
    "95%": 0.95,
    "90%": 0.9,
    "75%": 0.75,
    "median": 0.5,
    "25%": 0.25,
    "10%": 0.1,
    "5%": 0.05,
    "1%": 0.01,
    "0.1%": 0.001,
    "min": 0,
}


def _distribution(values: np.ndarray) -> dict[str, float]:
    """Largest to smallest, as llama-perplexity lists them."""
    return dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))


@default_fpu()
@np.errstate(invalid="ignore", over="ignore")  # a broken model's figures may be infinite, and then nan
def summarise(chunks: list[Paired], first_scored: int = 0) -> dict[str, Any]:
    """The comparison of all chunks (of equal size), as written to JSON.

    first_scored  the position of a chunk, from 0, that is the first of these

    ``…_se`` take tokens as independent, as llama-perplexity does; ``…_ci95_chunks`` are 95 % intervals over
    chunks (see inference), None where there are too few chunks, or too few that differ at all.
    """
    all_ = Paired.concatenate(chunks)
    ppl_base, ppl_base_se = ppl_se(all_.nll_base)
    ppl, ppl_quant_se = ppl_se(all_.nll)
    ratio = all_.nll - all_.nll_base
    ln_ratio, ln_ratio_se = mean_se(ratio)
    mean_kld, kld_se = mean_se(all_.kld)
    kld = _distribution(all_.kld)
    mean_dp, dp_se = mean_se(all_.dp)
    mean_dp2, dp2_se = mean_se(all_.dp**2)
    rms_dp = math.sqrt(mean_dp2)
    same_top, same_top_se = mean_se(all_.same_top.astype(np.float64))
    of_chunks = chunk_means(chunks)
    klds, ln_ratios = of_chunks["mean_kld"], of_chunks["ln_ppl_ratio"]
    differ = sum(bool(np.any(c.kld) or np.any(c.nll != c.nll_base)) for c in chunks) >= MIN_CHUNKS
    largest = int(np.argmax(klds))
    return {
        "ppl_base": ppl_base,
        "ppl_base_se": ppl_base_se,
        "ppl_base_ci95_chunks": ppl_interval([c.nll_base for c in chunks]),
        "ppl_quant": ppl,
        "ppl_quant_se": ppl_quant_se,
        "ppl_quant_ci95_chunks": ppl_interval([c.nll for c in chunks]),
        "ln_ppl_correlation": _correlation(all_.nll, all_.nll_base),
        "ln_ppl_ratio": ln_ratio,
        "ln_ppl_ratio_se": ln_ratio_se,
        "ln_ppl_ratio_ci95_chunks": mean_interval(ln_ratios) if differ else None,
        "ppl_ratio": exp(ln_ratio),
        "ppl_ratio_se": exp(ln_ratio) * ln_ratio_se,
        "ppl_diff": ppl - ppl_base,
        # to first order, as all errors of perplexities; of pairs, so that what both share cancels
        "ppl_diff_se": mean_se(ppl * all_.nll - ppl_base * all_.nll_base)[1],
        "mean_kld": mean_kld,
        "kld_se": kld_se,
        "mean_kld_ci95_chunks": positive_interval(klds),
        "largest_chunk": {
            "position": largest,
            "mean_kld": float(klds[largest]),
            "times_mean": float(klds[largest]) / mean_kld if mean_kld else None,
        },
        "median_kld": kld["median"],
        "max_kld": kld["max"],
        "kld": kld,
        "mean_dp": mean_dp,
        "dp_se": dp_se,
        "rms_dp": rms_dp,
        "rms_dp_se": dp2_se / (2 * rms_dp) if rms_dp else 0.0,
        "dp": _distribution(all_.dp),
        "same_top": same_top,
        "same_top_se": same_top_se,
        "same_top_ci95_chunks": agreement_interval(
            [int(c.same_top.sum()) for c in chunks], len(chunks[0].same_top)
        )
        if differ
        else None,
        "who_pays": who_pays(
            [c.kld for c in chunks],
            [c.nll_base for c in chunks],
            [c.p_top_base for c in chunks],
            first_scored,
        ),
        "chunks": {name: values.tolist() for name, values in of_chunks.items()},
    }


def chunk_means(chunks: list[Paired]) -> dict[str, np.ndarray]:
    """Per chunk, float64 (chunks,): what intervals and tests are made from."""
    return {
        "mean_kld": np.array([np.mean(c.kld) for c in chunks]),
        "ln_ppl_ratio": np.array([np.mean(c.nll - c.nll_base) for c in chunks]),
    }


def ppl_interval(nll: list[np.ndarray]) -> tuple[float, float] | None:
    """95 % interval over chunks of the perplexity, from each chunk's nll."""
    interval = mean_interval(np.array([np.mean(c) for c in nll]))
    return None if interval is None else (exp(interval[0]), exp(interval[1]))


def is_exactly_zero(comparison: dict[str, Any]) -> bool:
    """Whether every difference of a comparison is 0: what the control must be."""
    zero = ("ln_ppl_ratio", "mean_kld", "median_kld", "max_kld", "mean_dp", "rms_dp")
    return (
        all(comparison[key] == 0.0 for key in zero)
        # nan for a single token
        and not any(comparison[key] > 0.0 for key in ("ln_ppl_ratio_se", "kld_se"))
        and comparison["kld"]["min"] == 0.0
        and comparison["same_top"] == 1.0
    )
