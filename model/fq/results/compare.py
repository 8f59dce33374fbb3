"""Runs that are kept, side by side: the mean KL of each cell in each run, and whether they differ.

Two runs over the same chunks (model, text and context agree) are compared chunk by chunk, so that
what makes a chunk hard for both cancels: the ratio of their mean KLs, its interval and its test.
Where something differs there are the two intervals and Welch's test. p is adjusted over all
that is shown (see inference).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fq_kernels import default_fpu

from ..measure.cells import CONTROL, CellChunk
from ..measure.inference import (
    ENOUGH_CHUNKS,
    LEVEL,
    MIN_CHUNKS,
    chunks_needed,
    holm,
    positive_interval,
    ratio_test,
    welch_test,
)
from ..words import table
from .run import OF_A_CHUNK, Run

# of each setting `OF_A_CHUNK`
UNLIKE = {
    "n_tokens": "they have {} and {} tokens of the text",
    "n_ctx": "they have {} and {} tokens per chunk",
    "scored": "they score other tokens of a chunk ({}, {})",
    "baseline": "their baselines have different rules, or one's is the exact model",
    "base_model_sha256": "their baselines are different files, or one's is the model itself",
}


@dataclass(frozen=True)
class Side:
    """One of the runs compared: its number, and what each of its cells left of each chunk."""

    number: int
    run: Run
    finished: Mapping[tuple[int, int], CellChunk]

    def klds(self, cell: str) -> dict[int, np.ndarray]:
        """The cell's KL divergences, by the chunk's place in the text, which is their order."""
        i = [c.name for c in self.run.cells].index(cell)
        place = self.run.settings["chunk_indices"]
        found = {place[chunk]: left.paired.kld for (j, chunk), left in self.finished.items() if j == i}
        return dict(sorted(found.items()))


def not_paired(a: Run, b: Run) -> str | None:
    """Why the chunks of two runs are not the same; None where they are."""
    reasons = []
    for what, one, other in (
        ("models", a.model_sha256, b.model_sha256),
        ("texts", a.text_sha256, b.text_sha256),
    ):
        if one != other:
            reasons.append(f"their {what} differ (SHA-256 {one[:12]}…, {other[:12]}…)")
    for key in OF_A_CHUNK:
        if a.setting(key) != b.setting(key):
            reasons.append(UNLIKE[key].format(a.setting(key), b.setting(key)))
    if not reasons and not set(a.settings["chunk_indices"]) & set(b.settings["chunk_indices"]):
        seeds = " and ".join(str(side.settings.get("chunk_seed", "none")) for side in (a, b))
        reasons.append(f"they have no chunk of the text in common (chunk seeds {seeds})")
    return "; ".join(reasons) or None


def otherwise_unlike(a: Run, b: Run) -> str | None:
    """What makes the baselines of two paired runs different; None if nothing does."""
    ours, others = a.setting("activations"), b.setting("activations")
    return None if ours == others else f"activations ({ours}, {others})"


@default_fpu()
def compare_runs(sides: Sequence[Side]) -> dict[str, Any]:
    """Each run against the first, for every cell that it shares with it by name."""
    first, others = sides[0], sides[1:]
    names = [cell.name for cell in first.run.cells if cell.kind != CONTROL]
    cells = []
    for name in names:
        having = [side for side in others if any(cell.name == name for cell in side.run.cells)]
        if having:
            cells.append({"name": name} | _cell([(side, name) for side in (first, *having)]))
    _adjust(cells)
    return _about(sides) | {"cells": cells}


@default_fpu()
def compare_cells(pairs: Sequence[tuple[Side, str]]) -> dict[str, Any]:
    """Each (run, name of a cell) against the first of them."""
    sides = list({side.number: side for side, _ in pairs}.values())
    cells = [_cell(pairs)]
    _adjust(cells)
    return _about(sides) | {"cells": cells}


def _about(sides: Sequence[Side]) -> dict[str, Any]:
    about = []
    for side in sides:
        settings = side.run.settings
        about.append(
            {
                "run": side.number,
                "model": settings["model"],
                "model_sha256": side.run.model_sha256,
                "text": settings.get("text"),
                "text_sha256": side.run.text_sha256,
                "n_ctx": settings["n_ctx"],
                "n_chunks_asked": settings["n_chunks_asked"],
                "not_paired": not_paired(sides[0].run, side.run),
                "unlike": otherwise_unlike(sides[0].run, side.run),
            }
        )
    return {"runs": about}


def _cell(pairs: Sequence[tuple[Side, str]]) -> dict[str, Any]:
    """One line of the comparison. Runs that are paired are compared over the chunks that all of them have."""
    klds = [side.klds(name) for side, name in pairs]
    paired = [not_paired(pairs[0][0].run, side.run) is None for side, _ in pairs]
    common = set.intersection(*(set(k) for k, p in zip(klds, paired, strict=True) if p))
    means: list[np.ndarray] = []
    entries: list[dict[str, Any]] = []
    for (side, name), of_chunk, with_first in zip(pairs, klds, paired, strict=True):
        chunks = [c for c in of_chunk if not with_first or c in common]
        mean = np.array([of_chunk[c].mean() for c in chunks])
        entry: dict[str, Any] = {
            "run": side.number,
            "cell": name,
            "n_chunks": len(chunks),
            "mean_kld": float(mean.mean()) if chunks else None,
            "mean_kld_ci95_chunks": positive_interval(mean),
        }
        means.append(mean)
        if len(means) > 1:
            entry |= {"paired": with_first} | _against(mean, means[0], with_first)
            if with_first and len(mean) > 0 and all((klds[0][c] == of_chunk[c]).all() for c in chunks):
                entry["verdict"] = "equal"
        entries.append(entry)
    return {"of_runs": entries}


def _against(mine: np.ndarray, first: np.ndarray, paired: bool) -> dict[str, Any]:
    """The ratio of two cells' mean KLs, from those of their chunks, and p of its being 1."""
    found: dict[str, Any] = dict.fromkeys(
        ("ratio", "ratio_ci95_chunks", "p", "p_adjusted", "chunks_needed", "verdict")
    )
    if not (np.isfinite(mine).all() and np.isfinite(first).all()):
        return found | {"verdict": "not finite"}
    if paired and len(mine) and first.mean() > 0:
        found["ratio"] = float(mine.mean() / first.mean())
    if _none_beside(first, mine) or _none_beside(mine, first):
        # no chance decides between nothing at all and something in each chunk
        found |= {"p": 0.0, "t": math.inf if mine.any() else -math.inf}
    elif test := (ratio_test if paired else welch_test)(mine, first):
        found |= {"p": test.p, "t": test.t, "test": test}
        if paired:
            found["ratio_ci95_chunks"] = test.interval
    return found


def _none_beside(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether one is exactly 0 in as many chunks as make the other known."""
    return len(one) >= MIN_CHUNKS and not one.any() and int(np.count_nonzero(other)) >= MIN_CHUNKS


def _adjust(cells: Sequence[dict[str, Any]]) -> None:
    """Say what is resolved, by p adjusted over all that is shown side by side."""
    shown = [entry for cell in cells for entry in cell["of_runs"] if "paired" in entry]
    asked = [entry for entry in shown if entry["p"] is not None and entry["verdict"] is None]
    for entry, p in zip(asked, holm([entry["p"] for entry in asked]), strict=True):
        entry["p_adjusted"] = p
        entry["verdict"] = "not resolved" if p >= LEVEL else "larger" if entry["t"] > 0 else "smaller"
        if p >= LEVEL:
            entry["chunks_needed"] = chunks_needed(entry["test"], len(asked))
    for cell in cells:
        first, *others = cell["of_runs"]
        for entry in others:
            few = min(first["n_chunks"], entry["n_chunks"]) < MIN_CHUNKS
            entry["verdict"] = entry["verdict"] or ("too few chunks" if few else "0 in nearly all chunks")
            entry.pop("t", None)
            entry.pop("test", None)


def compare_text(data: dict[str, Any]) -> str:
    first = data["runs"][0]["run"]
    lines = []
    for run in data["runs"]:
        lines.append(
            f"run {run['run']}  {os.path.basename(run['model'])}  {os.path.basename(run['text'] or '')}  "
            f"{run['n_chunks_asked']} chunks of {run['n_ctx']}"
        )
    for run in data["runs"][1:]:
        why = run["not_paired"]
        how = f"not paired with run {first}: {why}. There are their intervals and Welch's test, and no ratio"
        lines.append(f"run {run['run']} is " + (how if why else f"paired with run {first}, chunk by chunk"))
        if run["unlike"]:
            lines.append(f"their baselines differ, too, in {run['unlike']}")
    if not data["cells"]:
        return "\n".join([*lines, f"no cell of run {first} is in another of them"])
    rows = [
        [
            "cell",
            "run",
            "chunks",
            "mean KL",
            "95 % over chunks",
            "ratio",
            "95 % of the ratio",
            "p, adjusted",
            "KL is",
        ]
    ]
    for cell in data["cells"]:
        for i, entry in enumerate(cell["of_runs"]):
            kld, ratio = entry["mean_kld"], entry.get("ratio")
            rows.append(
                [
                    entry["cell"] if i == 0 or entry["cell"] != cell["of_runs"][0]["cell"] else "",
                    str(entry["run"]),
                    str(entry["n_chunks"]),
                    "" if kld is None else f"{kld:.3e}" if math.isfinite(kld) else "not finite",
                    _interval(entry["mean_kld_ci95_chunks"], ".2e"),
                    "" if ratio is None else f"{ratio:.4g}",
                    _interval(entry.get("ratio_ci95_chunks"), ".4g"),
                    "" if entry.get("p_adjusted") is None else f"{entry['p_adjusted']:.2g}",
                    _verdict_text(entry),
                ]
            )
    notes = [
        "KL is: of this line against the first of its cell; resolved by p, adjusted (Holm) over the lines\n"
        "of this table. Each interval holds by itself"
    ]
    counts = [entry["n_chunks"] for cell in data["cells"] for entry in cell["of_runs"]]
    if min(counts) < MIN_CHUNKS:
        notes.append(f"below {MIN_CHUNKS} chunks there is no interval, and nothing is resolved")
    elif min(counts) < ENOUGH_CHUNKS:
        notes.append(f"these are few chunks: {ENOUGH_CHUNKS} and more tell more")
    return "\n".join([*lines, "", table(rows, {1, 2, 3, 4, 5, 6, 7}), "", *notes])


def _verdict_text(entry: dict[str, Any]) -> str:
    needed = entry.get("chunks_needed")
    return str(entry.get("verdict", "")) + (f": some {needed} chunks would tell" if needed else "")


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"
