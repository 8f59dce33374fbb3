"""Whose KL divergence a mean is: of few tokens or of all, by place, and by how sure the baseline is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fq_kernels import exp

from ..words import table
from .inference import positive_interval

TOP = {"0.1%": 0.001, "1%": 0.01, "10%": 0.1}
FEW = "1%"  # of the tokens, which carry a mean
CARRIED = 0.5  # from this share on
# of the baseline's probability of the text's token, from and below
CONFIDENCE = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
PARTS = 4  # of a chunk's scored tokens, in order


def who_pays(kld: Sequence[np.ndarray], nll_base: Sequence[np.ndarray]) -> dict[str, Any] | None:
    """Of each chunk's tokens, as written to JSON; None where one is not finite, or all are 0.

    top         the share of the summed KL that the tokens with the largest have
    position    by place among the scored tokens of a chunk, counted from 1: n, mean KL, its interval over
                chunks, its share of the sum
    confidence  the same by the probability that the baseline gives the text's token
    """
    klds = np.stack(kld)
    total = float(klds.sum())
    if not np.isfinite(klds).all() or not total > 0:
        return None
    sizes = np.sort(klds, axis=None)[::-1]
    top = {name: float(sizes[: max(round(part * sizes.size), 1)].sum()) / total for name, part in TOP.items()}
    n = klds.shape[1]
    edges = [round(n * i / PARTS) for i in range(PARTS + 1)]
    everywhere = np.ones(klds.shape, np.bool_)
    place = np.arange(n)[np.newaxis]
    p = exp(-np.stack(nll_base))
    return {
        "top": top,
        "position": [
            {"from": begin + 1, "to": end} | _some(klds, everywhere & (place >= begin) & (place < end), total)
            for begin, end in pairwise(edges)
            if end > begin
        ],
        "confidence": [
            {"from": low, "to": high} | _some(klds, (p >= low) & ((p < high) | (high == 1.0)), total)
            for low, high in pairwise(CONFIDENCE)
        ],
    }


def _some(klds: np.ndarray, mask: np.ndarray, total: float) -> dict[str, Any]:
    """Of the tokens that the mask has; the interval takes the chunks that have any."""
    n = int(mask.sum())
    means = np.array([row[some].mean() for row, some in zip(klds, mask, strict=True) if some.any()])
    return {
        "n": n,
        "mean_kld": float(klds[mask].mean()) if n else None,
        "mean_kld_ci95_chunks": positive_interval(means) if n else None,
        "share": float(klds[mask].sum()) / total,
    }


def who_pays_rows(found: dict[str, Any]) -> list[tuple[str, int, float | None, Any, float]]:
    """(of which tokens, how many, mean KL, its interval, share of the sum), in the order that people read."""
    rows = []
    for part in found["position"]:
        rows.append((f"scored tokens {part['from']} to {part['to']} of a chunk", part))
    for part in found["confidence"]:
        rows.append((f"the baseline's p of the text's token {part['from']:g} to {part['to']:g}", part))
    return [(name, p["n"], p["mean_kld"], p["mean_kld_ci95_chunks"], p["share"]) for name, p in rows]


def who_pays_text(found: dict[str, Any] | None) -> list[str]:
    """As lines for people."""
    if found is None:
        return ["no token's KL divergence is above 0, or one is not finite"]
    shares = ", ".join(f"the top {name[:-1]} % of tokens {100 * s:.1f} %" for name, s in found["top"].items())
    lines = [f"of the KL divergence {shares}"]
    if is_carried_by_few(found):
        lines.append(f"the mean is carried by few tokens: {FEW[:-1]} % of them have half of it or more")
    rows = [["", "tokens", "mean KL", "95 % over chunks", "share"]]
    for name, n, kld, interval, share in who_pays_rows(found):
        ends = "" if interval is None else f"{interval[0]:.2e} to {interval[1]:.2e}"
        rows.append([name, str(n), "" if kld is None else f"{kld:.3e}", ends, f"{100 * share:.1f} %"])
    return [*lines, table(rows, {1, 2, 4})]


def is_carried_by_few(found: dict[str, Any] | None) -> bool:
    return found is not None and float(found["top"][FEW]) >= CARRIED
