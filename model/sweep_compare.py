"""Runs that are kept, side by side: the mean KL of each cell in each run, and whether they differ.

Two runs over the same chunks (model, text and context agree) are compared chunk by chunk, so that
what makes a chunk hard for both cancels: the ratio of their mean KLs with an interval for which
the same chunks are drawn in both. Where something differs there are the two intervals alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .results import Run
from .show import table
from .statistics import bootstrap_ci95, bootstrap_ratio_ci95
from .sweep import CONTROL, CellChunk

ENOUGH_CHUNKS = 8


@dataclass(frozen=True)
class Side:
    """One of the runs compared: its number, and what each of its cells left of each chunk."""

    number: int
    run: Run
    finished: Mapping[tuple[int, int], CellChunk]

    def klds(self, cell: str) -> dict[int, np.ndarray]:
        """The cell's KL divergences, by chunk."""
        i = [c.name for c in self.run.cells].index(cell)
        return {chunk: left.paired.kld for (j, chunk), left in sorted(self.finished.items()) if j == i}


def not_paired(a: Run, b: Run) -> str | None:
    """Why the chunks of two runs are not the same; None where they are."""
    reasons = []
    for what, one, other in (
        ("models", a.model_sha256, b.model_sha256),
        ("texts", a.text_sha256, b.text_sha256),
    ):
        if one != other:
            reasons.append(f"their {what} differ (SHA-256 {one[:12]}…, {other[:12]}…)")
    for key, what in (("n_ctx", "tokens per chunk"), ("n_tokens", "tokens of the text")):
        if a.settings[key] != b.settings[key]:
            reasons.append(f"they have {a.settings[key]} and {b.settings[key]} {what}")
    return "; ".join(reasons) or None


def otherwise_unlike(a: Run, b: Run) -> str | None:
    """What makes the baselines of two paired runs different; None if nothing does."""
    unlike = [
        f"{key} ({a.settings.get(key)}, {b.settings.get(key)})"
        for key in ("activations", "batch")
        if a.settings.get(key) != b.settings.get(key)
    ]
    return " and ".join(unlike) or None


def compare_runs(sides: Sequence[Side]) -> dict[str, Any]:
    """Each run against the first, for every cell that it shares with it by name."""
    first, others = sides[0], sides[1:]
    names = [cell.name for cell in first.run.cells if cell.kind != CONTROL]
    cells = []
    for name in names:
        having = [side for side in others if any(cell.name == name for cell in side.run.cells)]
        if having:
            cells.append({"name": name} | _cell([(side, name) for side in (first, *having)]))
    return _about(sides) | {"cells": cells}


def compare_cells(pairs: Sequence[tuple[Side, str]]) -> dict[str, Any]:
    """Each (run, name of a cell) against the first of them."""
    sides = list({side.number: side for side, _ in pairs}.values())
    return _about(sides) | {"cells": [_cell(pairs)]}


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
        chunks = [c for c in of_chunk if c in common] if with_first else list(of_chunk)
        mean = np.array([of_chunk[c].mean() for c in chunks])
        entry: dict[str, Any] = {
            "run": side.number,
            "cell": name,
            "n_chunks": len(chunks),
            "mean_kld": float(mean.mean()) if chunks else None,
            "mean_kld_ci95_chunks": bootstrap_ci95(mean),
        }
        means.append(mean)
        if len(means) > 1:
            entry |= {"paired": with_first, "ratio": None, "ratio_ci95_chunks": None}
            if with_first and len(mean) and means[0].mean() > 0:
                entry["ratio"] = float(mean.mean() / means[0].mean())
                entry["ratio_ci95_chunks"] = bootstrap_ratio_ci95(mean, means[0])
            same = with_first and len(mean) > 0 and all((klds[0][c] == of_chunk[c]).all() for c in chunks)
            entry["verdict"] = "equal" if same else _verdict(entry, entries[0])
        entries.append(entry)
    return {"of_runs": entries}


def _verdict(entry: dict[str, Any], first: dict[str, Any]) -> str:
    """Of a mean KL against the first run's, by the interval of the ratio, else by the two intervals."""
    if ratio := entry["ratio_ci95_chunks"]:
        return "larger" if ratio[0] > 1 else "smaller" if ratio[1] < 1 else "not resolved"
    mine, its = entry["mean_kld_ci95_chunks"], first["mean_kld_ci95_chunks"]
    if mine is None or its is None:
        return "too few chunks"
    return "larger" if mine[0] > its[1] else "smaller" if mine[1] < its[0] else "not resolved"


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
        how = f"not paired with run {first}: {why}. There are their intervals alone, and no ratio"
        lines.append(f"run {run['run']} is " + (how if why else f"paired with run {first}, chunk by chunk"))
        if run["unlike"]:
            lines.append(f"their baselines differ, too, in {run['unlike']}")
    if not data["cells"]:
        return "\n".join([*lines, f"no cell of run {first} is in another of them"])
    rows = [["cell", "run", "chunks", "mean KL", "95 % over chunks", "ratio", "95 % of the ratio", "KL is"]]
    for cell in data["cells"]:
        for i, entry in enumerate(cell["of_runs"]):
            kld, ratio = entry["mean_kld"], entry.get("ratio")
            rows.append(
                [
                    entry["cell"] if i == 0 or entry["cell"] != cell["of_runs"][0]["cell"] else "",
                    str(entry["run"]),
                    str(entry["n_chunks"]),
                    "" if kld is None else f"{kld:.3e}",
                    _interval(entry["mean_kld_ci95_chunks"], ".2e"),
                    "" if ratio is None else f"{ratio:.4g}",
                    _interval(entry.get("ratio_ci95_chunks"), ".4g"),
                    entry.get("verdict", ""),
                ]
            )
    note = (
        "KL is: of this line against the first of its cell; resolved where the ratio's interval leaves out 1"
    )
    if any(run["not_paired"] for run in data["runs"]):
        note += ",\nor, not paired, where the two intervals do not overlap"
    if any(entry["n_chunks"] < ENOUGH_CHUNKS for cell in data["cells"] for entry in cell["of_runs"]):
        note += f"\nintervals over fewer than {ENOUGH_CHUNKS} chunks are rather too narrow"
    return "\n".join([*lines, "", table(rows, {1, 2, 3, 4, 5, 6}), "", note])


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"
