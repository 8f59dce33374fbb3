"""What a sensitivity run says of each site and format, from what its chunks left: neither model nor text.

The estimate of a cell is along + cross + blocks (see `sensitivity`), a mean over chunks. In no square of a
sum is the cross term more than twice the root of the other two's product: where the blocks say so it is
theirs alone, not that of the whole, whose along is exact, and is left out. What labels leave of noise in the
blocks comes of a few tokens that have much of the cost; the sums token by token and element by element have
less of it, and are off by much the same factor at all sites of a kind. So of each site the geometric mean of
the three is taken, the other two under the kind's factors. What the lines of channels have in common is one
square a sample, too few to tell one site from another: all of a kind have what it adds to their blocks on the
average of the middle half of them.

An interval is on the logarithm and has three parts, whose widths add up as squares: how the chunks scatter,
which holds the sampling of labels; how sure the site's gain is; and how far the estimate itself is off, which
cells measured exactly say: a t prediction interval of ln(exact / estimate). It is in proportion to a cell's
spread: what hangs on few tokens is off by more, as a rounding may tip one over, which no second order sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from fq_kernels import default_fpu, exp, get_format, log
from fq_kernels.formats.gain import BY

from .chunks import SCORED, n_scored_per_chunk
from .inference import LEVEL, MIN_CHUNKS, Interval, ratio_test, t_quantile

LARGEST = 0.05  # nats above which the second order does not hold
ONE_PART = 0.5  # share of one part, or of one block of tokens, above which a cell hangs on it
CORRELATED = 1.5  # cost by blocks of neighbours over that by tokens, above which errors of tokens go together
FAR = 2 * BY  # of a value's scale, whose cost is measured at a change by BY
LOST = 1 / 8  # of a value's scale, above which what is left is another value; FP8's truncation takes less
MIN_ALIKE = 8  # sites of a kind, below which the blocks alone are taken
LEAST_COMMON = 0.2  # times their blocks that sites are taken to cost at least
MIN_VERIFIED = 4  # cells measured exactly, below which nothing is said of the estimate's own error
LEAST_SPREAD = 0.01  # of a cell whose chunks and tokens are all alike
GAIN_ERROR = 0.15  # of any estimate, above which a gain is measured on more chunks
USUAL_CV = 0.3  # of a gain over chunks, until any is known

# What makes an estimate not to be trusted, in the order in which it is said.
MARKS = {
    "unmeasured": "what a change of its scale costs is not measured yet: fq sensitivity --resume",
    "not finite": "the format leaves an infinity or NaN there, or its blocks do not fit the rows",
    "large": f"more than {LARGEST} nats: the second order does not hold",
    "far": f"most of it comes of a scale changed by more than {FAR:.4g}, where its cost is no square",
    "clipped": f"more than {LOST:.4g} of its scale is lost, as where the largest values are clipped",
    "tensor": "its scale is over all rows of a chunk, whose errors go together",
    "one block": f"one block of tokens has more than {ONE_PART:.0%} of it",
    "correlated": f"errors of neighbouring tokens go together: in blocks more than {CORRELATED} x as large",
}


@dataclass(frozen=True)
class Asked:
    """What a run estimates.

    sites, formats  as rules name them
    classes         by site: equal numbers where a change of scale costs the same; None where it costs nothing
    samples, seed   of the labels
    columns         names of what a chunk leaves of each site and format
    """

    sites: tuple[str, ...]
    formats: tuple[str, ...]
    classes: tuple[int | None, ...]
    samples: int
    seed: int
    columns: tuple[str, ...]

    def cell(self, site: str, spec: str) -> tuple[int, int] | None:
        """Its place among sites and formats, if it is there."""
        try:
            return self.sites.index(site), self.formats.index(spec)
        except ValueError:
            return None


@dataclass(frozen=True)
class ModelError:
    """ln(exact / estimate) as cells that were measured have it: a mean, and a standard deviation that is in
    proportion to a cell's spread.

    sd      of a cell whose spread is 1
    n       cells
    weight  what they weigh together: the sum of 1 / spread²
    """

    mean: float
    sd: float
    n: int
    weight: float

    @property
    def quantile(self) -> float:
        """Of Student's t, for 95 %."""
        return t_quantile(LEVEL, self.n - 1)

    def half(self, spread: np.ndarray) -> np.ndarray:
        """Of the 95 % prediction interval of one more, of this spread."""
        return np.asarray(self.quantile * self.sd * np.sqrt(spread * spread + 1 / self.weight))

    @classmethod
    def of(cls, logs: Sequence[float], spreads: Sequence[float]) -> ModelError | None:
        """None: too few."""
        if len(logs) < MIN_VERIFIED:
            return None
        values, each = np.array(logs), np.array(spreads)
        weights = 1 / (each * each)
        weight = float(weights.sum())
        mean = float((weights * values).sum()) / weight
        off = (values - mean) / each
        return cls(mean, math.sqrt(float((off * off).sum()) / (len(logs) - 1)), len(logs), weight)


class Gains:
    """What a change of scale costs: of each class KL / 2^-14 for the site times 1 + 2^-7, by chunks."""

    def __init__(self, classes: Sequence[int | None], klds: Mapping[int, np.ndarray]) -> None:
        """klds  by class: the mean KL of each chunk that it was measured on"""
        self.of_class = {key: float(np.mean(some)) / (BY * BY) for key, some in klds.items()}
        self.chunks = {key: len(some) for key, some in klds.items()}
        scatter = [
            (float(np.var(some, ddof=1)) / float(np.mean(some)) ** 2, len(some) - 1)
            for some in klds.values()
            if len(some) > 1 and np.mean(some) > 0
        ]
        df = sum(n for _, n in scatter)
        # of one chunk's, as a part of the mean; one figure for all, as few chunks say little each
        self.cv = math.sqrt(math.fsum(v * n for v, n in scatter) / df) if df else USUAL_CV
        self.of_site = np.array([0.0 if key is None else self.of_class.get(key, math.nan) for key in classes])
        n = [1 if key is None else self.chunks.get(key, 1) for key in classes]
        self.se = np.where([key is None for key in classes], 0.0, self.cv / np.sqrt(n))


@dataclass(frozen=True)
class Estimates:
    """Of each (site, format), over chunks: all arrays are (sites, formats) but by_chunk (chunks, sites,
    formats)."""

    by_chunk: np.ndarray
    kld: np.ndarray
    along: np.ndarray
    cross: np.ndarray
    blocks: np.ndarray
    share_along: np.ndarray
    figures: Mapping[str, np.ndarray]  # means of a chunk's columns
    scaled: np.ndarray  # (sites,): whether it is known what a change of scale costs
    unbounded: np.ndarray  # what kld would be, were no block's cost bounded

    @cached_property
    def relative_se(self) -> np.ndarray:
        """Of the mean over chunks; of one chunk, and where there is no finite cost, 0."""
        n = len(self.by_chunk)
        if n < 2:
            return np.zeros_like(self.kld)
        known = np.isfinite(self.kld) & (self.kld > 0)
        with np.errstate(all="ignore"):
            se = self.by_chunk.std(axis=0, ddof=1) / math.sqrt(n)
            return np.where(known, se / self.kld, 0.0)

    @cached_property
    def spread(self) -> np.ndarray:
        """By which cells' own errors scale: how little their chunks, and their tokens, are alike."""
        se, largest = self.relative_se, self.figures["largest"]
        spread: np.ndarray = np.maximum(np.sqrt(se * se + largest * largest), LEAST_SPREAD)
        return spread


def estimated(asked: Asked, left: Sequence[np.ndarray], gains: Gains) -> Estimates:
    """left: of each chunk, (sites, formats, columns)."""
    table = np.stack(left)
    column = {name: table[..., i] for i, name in enumerate(asked.columns)}
    means = {name: values.mean(axis=0) for name, values in column.items()}
    c = column["along"]
    along = c * c * gains.of_site[:, None]
    factor = _smoothing(asked, means)
    if "common" in means:
        factor *= _common(asked, column["blocks"], column["common"])
    mean_along, blocks = along.mean(axis=0), means["blocks"] * factor
    with np.errstate(invalid="ignore"):
        possible = means["cross"] * means["cross"] <= 4 * mean_along * blocks
        cut = means.get("unbounded", means["blocks"]) - means["blocks"]
    cross = np.where(possible | ~np.isfinite(mean_along), column["cross"], 0.0)
    # a cross term may be negative, but no cost is
    by_chunk = np.maximum(along + cross + column["blocks"] * factor, 0.0)
    kld = by_chunk.mean(axis=0)
    share = np.divide(mean_along, kld, out=np.sign(mean_along), where=kld > 0)
    parts = mean_along, cross.mean(axis=0), blocks
    return Estimates(by_chunk, kld, *parts, share, means, np.isfinite(gains.of_site), kld + cut)


def _smoothing(asked: Asked, means: Mapping[str, np.ndarray]) -> np.ndarray:
    """What blocks are multiplied by, (sites, formats): a kind's mean of it is 1, on the logarithm."""
    blocks, by_token, by_element = (means[name] for name in ("blocks", "by_token", "by_element"))
    # not where a format leaves nothing, infinity or NaN
    known = (blocks > 0) & (by_token > 0) & (by_element > 0) & np.isfinite(blocks)
    over = np.zeros_like(blocks)
    over[known] = log(by_token[known] / blocks[known]) + log(by_element[known] / blocks[known])
    factor = np.ones_like(blocks)
    for some in _kinds(asked):
        n = known[some].sum(axis=0)
        off = over[some] - over[some].sum(axis=0) / np.maximum(n, 1)
        factor[some] = np.where(known[some] & (n >= MIN_ALIKE), exp(off / 3), 1.0)
    return factor


def _common(asked: Asked, blocks: np.ndarray, common: np.ndarray) -> np.ndarray:
    """What blocks are multiplied by for what the lines of channels have in common, (sites, formats); both
    (chunks, sites, formats)."""
    looked = np.isfinite(common)  # at some chunks
    factor: np.ndarray = np.ones(blocks.shape[1:])
    with np.errstate(all="ignore"):
        more = np.where(looked, common, 0.0).sum(axis=0) / np.where(looked, blocks, 0.0).sum(axis=0)
    for some in _kinds(asked):
        for j in range(factor.shape[1]):
            known = np.sort(more[some, j][np.isfinite(more[some, j])])
            if (n := len(known)) >= MIN_ALIKE:
                factor[some, j] = max(1 + float(known[n // 4 : n - n // 4].mean()), LEAST_COMMON)
    return factor


def _kinds(asked: Asked) -> list[list[int]]:
    """Sites of each kind and point."""
    kinds: dict[tuple[str, str | None], list[int]] = {}
    for i, site in enumerate(asked.sites):
        kind, _, point = site_parts(site)
        kinds.setdefault((kind, point), []).append(i)
    return list(kinds.values())


def marks_of(asked: Asked, found: Estimates) -> np.ndarray:
    """Texts (sites, formats): of MARKS the first that holds, or nothing."""
    marks = np.full(found.kld.shape, "", object)
    tensor = np.array([get_format(spec).whole_tensor for spec in asked.formats])
    single = found.figures["by_token"]
    together = np.divide(found.figures["neighbours"], single, out=np.ones_like(single), where=single > 0)
    change = np.abs(found.figures["along"])
    # of what the blocks do not serve, it does not matter
    matters = 1 - found.share_along > ONE_PART
    holds = {
        "unmeasured": np.broadcast_to(~found.scaled[:, None], found.kld.shape),
        "not finite": ~np.isfinite(found.kld),
        "large": np.maximum(found.kld, found.unbounded) > LARGEST,
        "far": (change > FAR) & (found.share_along > ONE_PART),
        "clipped": change > LOST,
        "tensor": np.broadcast_to(tensor, found.kld.shape),
        "one block": (found.figures["largest"] > ONE_PART) & matters,
        "correlated": (together > CORRELATED) & matters,
    }
    for name in reversed(MARKS):
        marks[holds[name]] = name
    return marks


def intervals(asked: Asked, found: Estimates, gains: Gains, errors: ModelError | None) -> np.ndarray | None:
    """Both ends, (sites, formats, 2); None where there is nothing to make them of."""
    n = len(found.by_chunk)
    if errors is None or n < MIN_CHUNKS:
        return None
    with np.errstate(all="ignore"):
        of_chunks = t_quantile(LEVEL, n - 1) * found.relative_se
        of_gain = 2 * np.where(found.share_along > 0, found.share_along * gains.se[:, None], 0.0)
        of_model = errors.half(found.spread)
        half = np.sqrt(of_chunks * of_chunks + of_gain * of_gain + of_model * of_model)
        ends = [found.kld * exp(errors.mean + sign * half) for sign in (-1, 1)]
    return np.stack(ends, axis=-1)


@dataclass(frozen=True)
class Judged:
    """Estimates, and what is known of how far they are to be trusted.

    marks     texts (sites, formats): why one is not, or nothing
    verified  of each cell that was measured: site, format, mean_kld, exact, their ratio, mark
    errors    what these say of all others; None: too few
    exact     by place of a cell that was measured on all chunks: the mean KL of each
    """

    found: Estimates
    marks: np.ndarray
    verified: list[dict[str, Any]]
    errors: ModelError | None
    exact: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def by_chunk(self, i: int, j: int) -> np.ndarray:
        """Of a cell the mean KL of each chunk: as it was measured, else as it is estimated."""
        found = self.exact.get((i, j))
        return self.found.by_chunk[:, i, j] if found is None else found

    def trusted(self, i: int, j: int) -> bool:
        return (i, j) in self.exact or not self.marks[i, j]


@default_fpu()
def judged(
    asked: Asked,
    left: Sequence[np.ndarray],
    gains: Gains,
    exact: Mapping[tuple[str, str], np.ndarray],
    chosen: Set[tuple[str, str]] = frozenset(),
) -> Judged:
    """left: of each chunk that ended, at least one; exact, chosen: as of `sensitivity_figures`."""
    found = estimated(asked, left, gains)
    marks, verified, whole = marks_of(asked, found), [], {}
    logs: list[float] = []
    spreads: list[float] = []
    spread = found.spread
    for (site, spec), klds in exact.items():
        place, n = asked.cell(site, spec), min(len(klds), len(left))
        if place is None or n < min(MIN_CHUNKS, len(left)):
            continue
        if not np.isfinite(klds).all():
            marks[place] = "not finite"
        elif n == len(left):
            whole[place] = klds[:n]
        # over the chunks that both have
        i, j = place
        estimate, measured = float(found.by_chunk[:n, i, j].mean()), float(np.mean(klds[:n]))
        ratio = measured / estimate if estimate > 0 else math.nan
        if math.isfinite(ratio):
            entry = {"site": site, "format": spec, "mean_kld": estimate, "exact": measured, "ratio": ratio}
            verified.append(entry | {"mark": str(marks[place]) or None})
            if not marks[place] and ratio > 0 and (site, spec) not in chosen:
                logs.append(float(log(ratio)))
                spreads.append(float(spread[place]))
    return Judged(found, marks, verified, ModelError.of(logs, spreads), whole)


@default_fpu()
def sensitivity_figures(
    about: Mapping[str, Any],
    asked: Asked,
    left: Sequence[np.ndarray],
    gains: Gains,
    exact: Mapping[tuple[str, str], np.ndarray],
    pairs: Mapping[tuple[str, str, str], np.ndarray] = MappingProxyType({}),
    chosen: Set[tuple[str, str]] = frozenset(),
) -> dict[str, Any]:
    """As written to JSON.

    left   of each chunk that ended, in order
    exact  by site and format: the mean KL of each chunk, of those that were measured
    pairs  the same by two sites and their format
    chosen
           sites and formats of exact that are no sample of all, from which nothing follows for others

    ``cells`` are by format, and in each by site. ``rank`` is the place among the format's, 1 the largest.
    ``verified`` has those that were measured, and ``model_error`` what they say of all others: the mean of
    ln(exact / estimate), its standard deviation over a cell's ``spread``, and the interval of the ratio for a
    cell whose spread is the median of those that are not marked. ``pairs`` has of two sites rounded together
    the mean KL, and what it is times those of each alone.
    """
    result: dict[str, Any] = {"estimate": "sensitivity", **about}
    n_scored = n_scored_per_chunk(about["n_ctx"], about.get("scored", SCORED[0]))
    result |= {
        "n_chunks": len(left),
        "n_scored": len(left) * n_scored,
        "samples": asked.samples,
        "seed": asked.seed,
    }
    result |= {"formats": list(asked.formats), "n_sites": len(asked.sites), "cells": [], "verified": []}
    result |= {
        "pairs": _pairs(exact, pairs),
        "model_error": None,
        "gain_cv": None,
        "partial": len(left) < about["n_chunks_asked"],
    }
    if not left:
        return result
    said = judged(asked, left, gains, exact, chosen)
    found, marks, errors = said.found, said.marks, said.errors
    result["verified"] = said.verified
    behind = any(len(klds) < len(left) for klds in (*exact.values(), *pairs.values()))
    result["partial"] = bool(result["partial"] or behind or not found.scaled.all())
    if errors is not None:
        usual = float(np.median(found.spread[marks == ""]))
        half = float(errors.half(np.array(usual)))
        result["model_error"] = {
            "ln_ratio_mean": errors.mean,
            "ln_ratio_sd_over_spread": errors.sd,
            "n": errors.n,
            "spread_median": usual,
            "ratio_ci95": [float(exp(errors.mean + sign * half)) for sign in (-1, 1)],
        }
    result["gain_cv"] = gains.cv
    ends = intervals(asked, found, gains, errors)
    order = np.argsort(-found.kld, axis=0, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, len(asked.sites) + 1)[:, None], axis=0)
    for j, spec in enumerate(asked.formats):
        for i in range(len(asked.sites)):
            result["cells"].append(_entry(asked, found, gains, marks, ends, ranks, i, j) | {"format": spec})
    return result


def _pairs(
    exact: Mapping[tuple[str, str], np.ndarray], pairs: Mapping[tuple[str, str, str], np.ndarray]
) -> list[dict[str, Any]]:
    """Over the chunks that the pair and each of its sites have, the dearest first."""
    entries = []
    for (*sites, spec), both in pairs.items():
        alone = [exact[site, spec] for site in sites if (site, spec) in exact]
        n = min(len(both), *(len(klds) for klds in alone)) if len(alone) == 2 else 0
        if not n:
            continue
        each = [float(np.mean(klds[:n])) for klds in alone]
        test = ratio_test(both[:n], alone[0][:n] + alone[1][:n])
        entries.append(
            {
                "sites": sites,
                "format": spec,
                "mean_kld": float(np.mean(both[:n])),
                "alone": each,
                "over_sum": float(np.mean(both[:n])) / sum(each) if sum(each) > 0 else None,
                "over_sum_ci95": None if test is None else test.interval,
                "p": None if test is None else test.p,
            }
        )
    return sorted(entries, key=lambda entry: -entry["mean_kld"])


def _entry(
    asked: Asked,
    found: Estimates,
    gains: Gains,
    marks: np.ndarray,
    ends: np.ndarray | None,
    ranks: np.ndarray,
    i: int,
    j: int,
) -> dict[str, Any]:
    kind, layer, point = site_parts(asked.sites[i])
    kld = float(found.kld[i, j])
    finite = math.isfinite(kld)
    interval: Interval | None = None
    if ends is not None and finite and np.isfinite(ends[i, j]).all():
        interval = float(ends[i, j, 0]), float(ends[i, j, 1])
    value_sq, error_sq = (float(found.figures[name][i, j]) for name in ("value_sq", "error_sq"))
    sqnr = 10 * log(value_sq / error_sq) / log(10.0) if value_sq > 0 and error_sq > 0 else None
    parts = {"along": found.along, "cross": found.cross, "blocks": found.blocks}
    return {
        "site": asked.sites[i],
        "kind": kind,
        "layer": layer,
        "point": point,
        "mean_kld": kld if finite else None,
        "mean_kld_ci95": interval,
        "rank": int(ranks[i, j]) if finite else None,
        **{name: float(part[i, j]) if finite else None for name, part in parts.items()},
        "by_token": float(found.figures["whole_by_token"][i, j]) if finite else None,
        "by_element": float(found.figures["whole_by_element"][i, j]) if finite else None,
        "gain": float(gains.of_site[i]),
        "sqnr_db": sqnr,
        "spread": float(found.spread[i, j]) if finite else None,
        "mark": str(marks[i, j]) or None,
    }


def gains_in_need(asked: Asked, found: Estimates, gains: Gains) -> list[int]:
    """Classes whose gain is not known well enough for some site and format that is not marked."""
    most: dict[int, float] = {}
    sound = np.where(marks_of(asked, found) == "", found.share_along, 0.0)
    for key, shares in zip(asked.classes, sound, strict=True):
        if key is not None:
            most[key] = max(most.get(key, 0.0), float(shares.max()))
    return [
        key
        for key, share in most.items()
        if share * gains.cv / math.sqrt(max(gains.chunks.get(key, 0), 1)) > GAIN_ERROR
    ]


def site_parts(site: str) -> tuple[str, int | None, str | None]:
    """Kind, layer and point of a site's text."""
    place, _, point = site.partition(".")
    kind, _, layer = place.partition("[")
    return kind, int(layer.rstrip("]")) if layer else None, point or None


def dearest(asked: Asked, found: Estimates, marks: np.ndarray, n: int) -> list[tuple[tuple[str, ...], str]]:
    """Of each format the n dearest sites that are not marked, no two of one norm or value."""
    chosen = []
    for j, spec in enumerate(asked.formats):
        places: dict[tuple[str, int | None], str] = {}
        for i in np.argsort(-found.kld[:, j], kind="stable"):
            if not marks[i, j] and found.kld[i, j] > 0:
                places.setdefault(site_parts(asked.sites[i])[:2], asked.sites[i])
        sites = tuple(places.values())[:n]
        chosen.append((tuple(sorted(sites, key=asked.sites.index)), spec))
    return chosen


def to_verify(asked: Asked, found: Estimates, marks: np.ndarray, n: int) -> list[tuple[str, str]]:
    """n cells to measure exactly: of all that are not marked, in order of size, as many steps apart; of each
    step the one whose kind of site, and whose format, were taken least."""
    places = [(i, j) for i, j in np.ndindex(*found.kld.shape) if not marks[i, j] and found.kld[i, j] > 0]
    places.sort(key=lambda at: (float(found.kld[at]), at))
    kinds: dict[object, int] = {}
    chosen: list[tuple[str, str]] = []
    n = min(n, len(places))
    for step in range(n):
        among = places[len(places) * step // n : len(places) * (step + 1) // n]

        def taken(at: tuple[int, int]) -> tuple[int, int, int, int]:
            kind, _, point = site_parts(asked.sites[at[0]])
            same = kinds.get((kind, point), 0), kinds.get(asked.formats[at[1]], 0)
            # scattered over what is left, the same way always
            return sum(same), *same, (at[0] * 7919 + at[1] * 104729) % 65537

        i, j = min(among, key=taken)
        kind, _, point = site_parts(asked.sites[i])
        for key in ((kind, point), asked.formats[j]):
            kinds[key] = kinds.get(key, 0) + 1
        chosen.append((asked.sites[i], asked.formats[j]))
    return chosen
