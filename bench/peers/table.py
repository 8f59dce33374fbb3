"""The figures as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.harness import quartiles

from .measure import Row

COLUMNS = {
    "model": "---",
    "what": "---",
    "threads": "--:",
    "fq": "--:",
    "llama.cpp": "--:",
    "fq / llama.cpp": "--:",
    "asked for": "---",
}
SIGNS = {">=": "≥", "<=": "≤"}


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Median (lower quartile–upper quartile)."""
    low, middle, high = map(figure, quartiles(np.asarray(values)))
    return f"{middle} ({low}–{high})"


def cells(row: Row) -> list[str]:
    low, middle, high = row.ratio
    asked = ""
    if row.bar is not None:
        sign, bound = row.bar.split()
        asked = f"{SIGNS[sign]} {bound}: {'holds' if row.holds else 'DOES NOT HOLD'}"
    return [
        row.model,
        f"{row.what}, {row.unit}",
        str(row.threads),
        spread(row.ours),
        spread(row.theirs),
        f"{middle:.2f} ({low:.2f}–{high:.2f})",
        asked,
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [list(COLUMNS), list(COLUMNS.values()), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(rows: Sequence[Row]) -> list[str]:
    """Of the perplexity runs: that both did the same, and on what llama.cpp spent its time."""
    lines = []
    for row in rows:
        if "ppl_ours" not in row.about:
            continue
        phases = row.about["seconds_theirs"]
        parts = ", ".join(f"{name.removesuffix('_s')} {seconds:.2f}" for name, seconds in phases.items())
        lines.append(
            f"{row.what}, {row.threads} threads: PPL {row.about['ppl_ours']:.4f}, "
            f"llama.cpp {row.about['ppl_theirs']:.4f}; its seconds: {parts}"
        )
    return lines


def markdown(about: dict[str, str], rows: Sequence[Row]) -> str:
    head = "".join(f"- {name}: {value}\n" for name, value in about.items())
    tail = "".join(f"- {line}\n" for line in notes(rows))
    return f"{head}\n{table(rows)}\n" + (f"\n{tail}" if tail else "")
