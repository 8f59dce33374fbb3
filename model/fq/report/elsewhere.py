"""Whether cells rank alike in other runs, on another text or in longer chunks: words and a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from ..measure.agreement import agreement
from ..measure.cells import RANKED
from .axes import panels_of, value_axis
from .data import Entry, is_finite, kld, plain
from .svg import Chart, Ink

MOST = 6  # pairs of a group and a run, that are drawn


class Elsewhere:
    """This run beside others; ``data`` and ``others`` are `figures` of stored runs."""

    def __init__(self, data: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
        self._data, self._others = data, others
        self._found = [each for i, other in enumerate(others) for each in self._with(i, other)]

    def _with(self, i: int, other: dict[str, Any]) -> list[dict[str, Any]]:
        return [each | {"other": i} for each in agreement([self._data, other])]

    def lines(self) -> list[str]:
        """What is said of each group that another run has, too."""
        said = []
        for i, other in enumerate(self._others):
            mine = [each for each in self._found if each["other"] == i]
            if not mine:
                said.append(f"{_name(other)} shares no group of three cells or more with this run.")
            for each in mine:
                if math.isnan(each["spearman"]):
                    said.append(
                        f"{plain(each['group'])}: in {_name(other)} or here its cells all cost the same."
                    )
                    continue
                ends = each["ci95_chunks"]
                interval = "" if ends is None else f" ({ends[0]:.2f} to {ends[1]:.2f})"
                said.append(
                    f"{plain(each['group'])}: the rank correlation (Spearman) of its {each['n']} cells with "
                    f"those of {_name(other)} is {each['spearman']:.2f}{interval}."
                )
        return said

    def chart(self, ink: Ink) -> Chart | None:
        """Each cell's mean KL here and there."""
        shown = [each for each in self._found if not math.isnan(each["spearman"])][:MOST]
        if not shown:
            return None
        figure, axes = panels_of(len(shown), 2.6)
        data: list[list[Any]] = [["group", "cell", "mean_kld_here", "other_run", "mean_kld_there"]]
        for axis, each in zip(axes, shown, strict=True):
            other = self._others[each["other"]]
            here, there = (_cells(data, each["group"]) for data in (self._data, other))
            both = [(kld(here[name]), kld(there[name])) for name in here if name in there]
            data += [
                [plain(each["group"]), plain(name), kld(here[name]), other["run"], kld(there[name])]
                for name in here
                if name in there
            ]
            known = [(x, y) for x, y in both if x > 0 and y > 0]
            axis.plot([x for x, _ in known], [y for _, y in known], "o", color=ink.s0, markersize=3)
            everything = [value for pair in known for value in pair]
            ends = min(everything, default=1.0), max(everything, default=1.0)
            axis.plot(ends, ends, color=ink.muted, linewidth=0.9)
            value_axis(axis, "x", [x for x, _ in known], "mean KL here")
            value_axis(axis, "y", [y for _, y in known], f"in run {other['run']}")
            axis.set_title(f"{plain(each['group'])}: {each['spearman']:.2f}")
        return Chart(
            "elsewhere",
            "elsewhere",
            "The same cells elsewhere",
            "A point for each cell, its mean KL divergence here and in another run; above the line it costs "
            "more there. Beside the group's name: the rank correlation.",
            " ".join(self.lines()),
            figure,
            data,
        )


def _cells(data: dict[str, Any], group: str) -> dict[str, Entry]:
    return {
        entry["name"]: entry
        for entry in data["cells"]
        if entry["group"] == group and entry["kind"] in RANKED and is_finite(entry)
    }


def _name(data: dict[str, Any]) -> str:
    model, text = (plain(os.path.basename(data.get(key) or f"a {key}")) for key in ("model", "text"))
    return f"run {data['run']} ({model}, {text}, {data['n_ctx']} tokens per chunk)"
