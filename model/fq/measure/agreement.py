"""Whether two runs rank their cells alike, as on another text or with longer chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..words import table
from .cells import RANKED
from .inference import LEVEL, MIN_CHUNKS

MIN_CELLS = 3  # that have an order worth a correlation
SAMPLES = 2000


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of two (n,); equal values share their mean rank. NaN where one of them is all equal."""
    a, b = (_ranks(x) - (len(x) - 1) / 2 for x in (one, other))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else np.nan


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[place]


def agreement(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each pair of runs, `figures` of both, and each group that both have; as written to JSON.

    one, other    places of the two in ``runs``
    n             cells of both, whose tokens are all finite, and that differ from the baseline in either
    spearman      of their mean KL divergences
    ci95_chunks   95 % interval: each run's chunks drawn anew, with replacement; None below MIN_CHUNKS. Chance
                  between chunks makes orders that are the same look less alike, so it lies rather too low
    """
    found = []
    for (i, one), (j, other) in combinations(enumerate(runs), 2):
        for group in (g["name"] for g in one["groups"]):
            mine, others = _klds(one, group), _klds(other, group)
            both = [n for n in mine if n in others and (mine[n].any() or others[n].any())]
            if len(both) < MIN_CELLS:
                continue
            a, b = np.stack([mine[n] for n in both]), np.stack([others[n] for n in both])
            found.append(
                {
                    "group": group,
                    "one": i,
                    "other": j,
                    "n": len(both),
                    "spearman": rank_correlation(a.mean(axis=1), b.mean(axis=1)),
                    "ci95_chunks": _interval(a, b),
                }
            )
    return found


def _klds(data: Mapping[str, Any], group: str) -> dict[str, np.ndarray]:
    """Mean KL in each chunk of the group's ranked cells, by name."""
    found = {}
    for entry in data["cells"]:
        if entry["group"] == group and entry["kind"] in RANKED and not entry["not_finite_tokens"]:
            found[entry["name"]] = np.array(entry["comparison"]["chunks"]["mean_kld"], np.float64)
    return found


def _interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float] | None:
    if min(a.shape[1], b.shape[1]) < MIN_CHUNKS:
        return None
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(SAMPLES):
        means = [x[:, rng.integers(x.shape[1], size=x.shape[1])].mean(axis=1) for x in (a, b)]
        drawn.append(rank_correlation(*means))
    if not np.isfinite(drawn).all():
        return None
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def agreement_text(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """``names`` of the runs, for people."""
    if not found:
        return "the runs share no group with three cells or more: no order to compare"
    rows = [["group", "one", "other", "cells", "rank correlation", "95 % over chunks"]]
    for each in found:
        ends = each["ci95_chunks"]
        interval = "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
        pair = [names[each["one"]], names[each["other"]]]
        rows.append([each["group"], *pair, str(each["n"]), f"{each['spearman']:.3f}", interval])
    return "do cells rank alike?\n" + table(rows, {3, 4})
