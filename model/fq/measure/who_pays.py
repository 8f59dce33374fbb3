"""Whose KL divergence a mean is: of few tokens or of all, by place, and by how sure the baseline is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fq_kernels import exp

from ..words import table
from .inference import ratio_test

TOP = {"0.1%": 0.001, "1%": 0.01, "10%": 0.1}
FEW = "1%"  # of the tokens, which carry a mean
CARRIED = 0.5  # from this share on
# of a probability, from and below
P_EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
PARTS = 4  # of a chunk's scored tokens, in order
FIRST = (1, 4)  # where all are scored, up to which of them stand apart
LARGEST = 10  # tokens that are named


def who_pays(
    kld: Sequence[np.ndarray],
    nll_base: Sequence[np.ndarray],
    p_top_base: Sequence[np.ndarray],
    first_scored: int = 0,
) -> dict[str, Any] | None:
    """Of each chunk's tokens, as written to JSON; None where one is not finite, or below 0, or all are 0.

    first_scored  the position of a chunk, from 0, that the first one has

    top         the share of the summed KL that the tokens with the largest have
    largest     these tokens, a few: chunk (its position among these, from 0), token (its place in the chunk,
                from 1), KL, share of the sum. A token stands for what is predicted after it
    position    by place in the chunk, from 1: n, mean KL, its interval over chunks, its share of the sum. The
                first token, BOS where the model adds it, and the next few are apart, if they are scored
    confidence  the same by the probability that the baseline gives to its top token; None where a version
                did not keep it
    text        the same by the probability that it gives to the text's token
    """
    klds = np.stack(kld)
    total = float(klds.sum())
    if not 0 < total < np.inf or klds.min() < 0:
        return None
    n = klds.shape[1]
    order = np.argsort(-klds, axis=None, kind="stable")
    sizes = klds.ravel()[order]
    top = {name: float(sizes[: max(round(part * sizes.size), 1)].sum()) / total for name, part in TOP.items()}
    largest = [
        {"chunk": int(i) // n, "token": first_scored + 1 + int(i) % n, "kld": float(klds.flat[i])}
        | {"share": float(klds.flat[i]) / total}
        for i in order[:LARGEST]
    ]
    first = [edge for edge in FIRST if first_scored == 0 and edge < n]
    parts = [e for i in range(1, PARTS + 1) if (e := round(n * i / PARTS)) > max(first, default=0)]
    edges = sorted({0, *first, *parts})
    everywhere = np.ones(klds.shape, np.bool_)
    place = np.arange(n)[np.newaxis]

    def by(p: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"from": low, "to": high} | _some(klds, (p >= low) & ((p < high) | (high == 1.0)), total)
            for low, high in pairwise(P_EDGES)
        ]

    p_top = np.stack(p_top_base)
    return {
        "top": top,
        "largest": largest,
        "position": [
            {"from": first_scored + begin + 1, "to": first_scored + end}
            | _some(klds, everywhere & (place >= begin) & (place < end), total)
            for begin, end in pairwise(edges)
        ],
        "confidence": by(p_top) if np.isfinite(p_top).all() else None,
        "text": by(exp(-np.stack(nll_base))),
    }


def _some(klds: np.ndarray, mask: np.ndarray, total: float) -> dict[str, Any]:
    """Of the tokens that the mask has. Chunks differ in how many these are, so that the mean is a ratio."""
    n = int(mask.sum())
    sums = np.array([row[some].sum() for row, some in zip(klds, mask, strict=True)])
    test = ratio_test(sums, mask.sum(axis=1).astype(np.float64))
    return {
        "n": n,
        "mean_kld": float(klds[mask].mean()) if n else None,
        "mean_kld_ci95_chunks": None if test is None else test.interval,
        "share": float(klds[mask].sum()) / total,
    }


def who_pays_parts(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(of which tokens, what is said of them), in the order that people read."""
    parts = []
    for part in found["position"]:
        one = part["from"] == part["to"]
        parts.append((f"token {part['from']}" if one else f"tokens {part['from']} to {part['to']}", part))
    for whose, of in (("its top token", found.get("confidence")), ("the text's token", found.get("text"))):
        for part in of or []:
            parts.append((f"baseline's p of {whose} {part['from']:g} to {part['to']:g}", part))
    return parts


def who_pays_text(found: dict[str, Any] | None, words: Sequence[tuple[str, str]] = ()) -> list[str]:
    """As lines for people; words: of the largest tokens, the text before each and what came."""
    if found is None:
        return ["no token's KL divergence is above 0, or one is not finite"]
    shares = ", ".join(f"the top {name[:-1]} % of tokens {100 * s:.1f} %" for name, s in found["top"].items())
    lines = [f"of the KL divergence {shares}"]
    if is_carried_by_few(found):
        lines.append(f"the mean is carried by few tokens: {FEW[:-1]} % of them have half of it or more")
    rows = [["", "tokens", "mean KL", "95 % over chunks", "share"]]
    for name, part in who_pays_parts(found):
        kld, interval = part["mean_kld"], part["mean_kld_ci95_chunks"]
        ends = "" if interval is None else f"{interval[0]:.2e} to {interval[1]:.2e}"
        name += " of a chunk" if name.startswith("token") else ""
        shown = "" if kld is None else f"{kld:.3e}"
        rows.append([name, str(part["n"]), shown, ends, f"{100 * part['share']:.1f} %"])
    largest = [["KL", "share", "chunk", "after token", ""]]
    named = found.get("largest", [])
    for token, (before, came) in zip(named, words or [("", "")] * len(named), strict=True):
        kld, share = f"{token['kld']:.3e}", f"{100 * token['share']:.1f} %"
        shown = f"{before!r} comes {came!r}" if came else ""
        largest.append([kld, share, str(token["chunk"] + 1), str(token["token"]), shown])
    return [*lines, table(rows, {1, 2, 4}), "", "the tokens with the largest:", table(largest, {0, 1, 2, 3})]


def is_carried_by_few(found: dict[str, Any] | None) -> bool:
    return found is not None and float(found["top"][FEW]) >= CARRIED
