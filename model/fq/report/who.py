"""The report's charts of whose the KL divergence is: of few tokens, of one chunk, or of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..measure.who_pays import FEW
from .axes import MARKERS, figure_of, panels_of, shared_legend
from .data import Entry, Group, finite, is_finite, kld, plain
from .downloads import CI95, ends
from .svg import Chart, Ink
from .unit_charts import of_norms, short
from .units import name_of

MOST_LINES = 8
MOST_ROWS = 40
DEAREST = 5  # single cells of a group, at most
SHARES = {"0.1%": "^", "1%": "o", "10%": "D"}  # of the tokens with the largest, and their marks


def dearest(group: Group, n: int) -> list[Entry]:
    """Of its single cells, or of its parts, the n of the largest mean KL."""
    return sorted(filter(is_finite, group.singles or group.parts), key=kld, reverse=True)[:n]


def who_pays(groups: Sequence[Group], ink: Ink) -> Iterator[Chart]:
    """Of the groups, all their sites together, and of units and profiles: mean KL by place and confidence."""
    named: list[tuple[str, Entry]] = []
    for group in groups:
        if group.control is not None or of_norms(group):
            continue
        if group.whole is not None:
            named.append((group.name, group.whole))
        else:
            named += [(name_of(entry), entry) for entry in sorted(group.parts, key=kld, reverse=True)]
    known = [
        (name, entry["comparison"]["who_pays"], finite(kld(entry)))
        for name, entry in named
        if entry["comparison"].get("who_pays")
    ][:MOST_LINES]
    if not known:
        return
    confident = all(found.get("confidence") for _, found, _ in known)
    figure, axes = panels_of(2 if confident else 1, 1.9 + 0.15 * len(known))
    data: list[list[Any]] = [["cell", "by", "from", "to", "tokens", "mean_kld", *CI95, "over_mean_of_all"]]
    for i, (name, found, mean) in enumerate(known):
        look = {
            "marker": MARKERS[i % len(MARKERS)],
            "color": ink.series(i),
            "markersize": 3,
            "linewidth": 0.9,
        }
        label = f"{short(name, 48)} (top 1 %: {100 * found['top']['1%']:.0f} %)"
        parts = [("position", axes[0], [(part["from"] + part["to"]) / 2 for part in found["position"]])]
        if confident:
            parts.append(("confidence", axes[1], list(range(len(found["confidence"])))))
        for key, axis, at in parts:
            points = [(x, p["mean_kld"] / mean) for x, p in zip(at, found[key], strict=True) if p["n"]]
            axis.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
            for p in filter(lambda p: p["n"], found[key]):
                about = [name, key, p["from"], p["to"], p["n"], p["mean_kld"]]
                data.append([*about, *ends(p["mean_kld_ci95_chunks"]), p["mean_kld"] / mean])
    for axis in axes:
        axis.axhline(1, color=ink.muted, linewidth=0.9)
        axis.set_ylim(bottom=0)
    axes[0].set_xlabel("token of the chunk")
    axes[0].set_ylabel("mean KL / that of all")
    if confident:
        bins = known[0][1]["confidence"]
        axes[1].set_xticks(range(len(bins)), [f"{p['from']:g}–{p['to']:g}" for p in bins])
        axes[1].set_xlabel("the baseline's probability of its top token")
    shared_legend(figure, axes)
    shares = "; ".join(f"{name} {100 * found['top']['1%']:.1f} %" for name, found, _ in known)
    told = "Mean KL divergence by place in the chunk and by how sure the baseline is, over the mean of all."
    yield Chart(
        "who-pays",
        "who",
        "Whose the KL divergence is",
        f"{told} Beside each name: the share that the 1 % of tokens with the largest have.",
        f"{told} Share of the 1 % of tokens with the largest: {shares}.",
        figure,
        data,
    )


def few_tokens(groups: Sequence[Group], ink: Ink) -> Iterator[Chart]:
    """Of each group, all its sites together and those that cost most alone: which share few tokens have."""
    mine = [group for group in groups if group.control is None]
    n = max(1, min(DEAREST, MOST_ROWS // max(len(mine), 1) - 2))
    cells: dict[str, Entry] = {}
    for group in mine:
        if group.together:
            cells.setdefault(f"{group.name}, together", group.together)
        known = [entry for entry in group.singles or group.parts if entry["comparison"].get("who_pays")]
        carried = sorted(known, key=_of_few, reverse=True)[:1]
        cells |= {plain(entry["name"]): entry for entry in (*dearest(group, n), *carried)}
    rows = {name: e for name, e in cells.items() if e["comparison"].get("who_pays")}
    rows = dict(list(rows.items())[:MOST_ROWS])
    if not rows:
        return
    figure = figure_of(1.0 + 0.2 * len(rows))
    axis = figure.subplots()
    data: list[list[Any]] = [["cell", "largest_chunk", *(f"top_{name}" for name in SHARES)]]
    for at, (name, entry) in enumerate(rows.items()):
        c = entry["comparison"]
        chunk = finite(c["largest_chunk"]["times_mean"]) / len(c["chunks"]["mean_kld"])
        shares = [chunk, *(c["who_pays"]["top"][top] for top in SHARES)]
        data.append([name, *shares])
        axis.plot([0, 100], [at, at], color=ink.grid, linewidth=0.6, zorder=0)
        for i, (share, mark) in enumerate(zip(shares, "s" + "".join(SHARES.values()), strict=True)):
            label = "the largest chunk" if i == 0 else f"the top {list(SHARES)[i - 1][:-1]} % of tokens"
            axis.plot([100 * share], [at], mark, color=ink.series(i), markersize=4, label=label)
    axis.axvline(50, color=ink.muted, linewidth=0.8, linestyle="--")
    axis.set_xlim(-1, 101)
    axis.set_xlabel("share of the cell's summed KL divergence, %")
    axis.set_yticks(range(len(rows)), [short(name) for name in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(False)
    axis.tick_params(axis="y", length=0, labelcolor=ink.text)
    shared_legend(figure, [axis])
    n_chunks = len(next(iter(rows.values()))["comparison"]["chunks"]["mean_kld"])
    most = max(rows, key=lambda name: _of_few(rows[name]))
    yield Chart(
        "few-tokens",
        "who",
        "How much of it few tokens have",
        f"Of each group all sites together, the {n} that cost most alone, and the one whose KL divergence "
        "is most that of few tokens: the share of the sum that the tokens with the largest have, and that of "
        f"the largest chunk, which would be {100 / n_chunks:.3g} % were all chunks alike. The line is half.",
        f"Dots on a scale from 0 to 100 % for each of {len(rows)} cells. The most that 1 % of the tokens "
        f"have is {100 * _of_few(rows[most]):.1f} %, in {most}.",
        figure,
        data,
    )


def _of_few(entry: Entry) -> float:
    return float(entry["comparison"]["who_pays"]["top"][FEW])
