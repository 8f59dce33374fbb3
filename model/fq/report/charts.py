"""The report's charts: which a run has, and those of the KL divergence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .axes import (
    extremes,
    figure_of,
    layer_axis,
    layer_of,
    legend,
    positions,
    series_of,
    value_axis,
    whiskers,
)
from .data import Group, between, finite, groups_of, kl_text, kld, kld_interval, plain
from .downloads import CI95, SITE, ends, site_row
from .elsewhere import Elsewhere
from .heat import heat_map
from .overlay import one_scale
from .site_charts import distributions, errors, perplexity
from .svg import Chart, Ink
from .unit_charts import of_norms, unit_charts
from .who import few_tokens, who_pays

POINTWISE = "Each holds by itself: what is ordered is told by the paired tests above, not by overlaps."
PANELS = 8  # at most so many in one chart: more do not fit on a printed page


def charts(data: dict[str, Any], ink: Ink, elsewhere: Elsewhere | None = None) -> Iterator[Chart]:
    """One after another, each to be written within `svg.style` before the next is drawn."""
    everything = groups_of(data)
    yield from unit_charts(everything, ink)
    norms = [by_norm for group in everything if (by_norm := of_norms(group))]
    for i, group in enumerate(norms):
        yield _by_layer(f"norms-{i + 1}", group, ink, "has the unit in one norm alone")
    if norms:
        yield heat_map(norms, ink, "heat-map-norms", "norm × step")
    yield from who_pays(everything, ink)
    yield from few_tokens(everything, ink)
    if elsewhere is not None and (chart := elsewhere.chart(ink)):
        yield chart
    groups = [group for group in everything if group.singles]
    formats = [group for group in groups if not group.control]
    if not groups:
        return
    if len([group for group in groups if group.whole]) > 1:
        yield _together([group for group in groups if group.whole], ink)
    for i, group in enumerate(formats):
        yield _by_layer(f"layers-{i + 1}", group, ink)
        if group.cumulative and not group.behind:  # it has their sum
            yield _cumulative(f"cumulative-{i + 1}", group, ink)
    if chart := one_scale(groups, ink):
        yield chart
    yield heat_map(groups, ink, "heat-map", "layer × format")
    for i, page in enumerate(_pages(formats)):
        yield perplexity(f"perplexity-{i + 1}", page, ink)
    kinds = dict.fromkeys(kinds for group in formats for kinds in group.panels)
    for i, kind in enumerate(kinds):
        yield errors(f"errors-{i + 1}", kind, formats, ink)
    panels = [(group, kinds) for group in groups for kinds in group.panels]
    for i, part in enumerate(_pages(panels)):
        yield distributions(f"distribution-{i + 1}", part, ink)


def _pages(panels: Sequence[Any]) -> list[Any]:
    return [panels[i : i + PANELS] for i in range(0, len(panels), PANELS)]


# ---------------------------------------------------------------- KL


def _together(groups: Sequence[Group], ink: Ink) -> Chart:
    figure = figure_of(0.75 + 0.24 * len(groups))
    axis = figure.subplots()
    wholes = [group.whole for group in groups if group.whole]
    values = [finite(kld(entry)) for entry in wholes]
    intervals = [kld_interval(entry) for entry in wholes]
    places = list(range(len(groups)))
    for group, at, value, interval in zip(groups, places, values, intervals, strict=True):
        colour = ink.muted if group.control else ink.s0
        marker = group.control.marker if group.control else "o"
        axis.plot([value], [at], marker, color=colour, markersize=4.5)
        if interval is not None:
            axis.plot(interval, [at, at], color=colour, linewidth=2.2, alpha=0.6)
    value_axis(axis, "x", [*values, *(end for i in intervals if i for end in i)], "mean KL divergence")
    axis.set_yticks(places, [group.name for group in groups])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(True, axis="x")
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0, labelcolor=ink.text)
    figures = "; ".join(
        f"{group.name} {kl_text(value)} ({between(interval)})"
        for group, value, interval in zip(groups, values, intervals, strict=True)
    )
    return Chart(
        "together",
        "layers",
        "Mean KL divergence, all sites of a group together",
        f"A point and its 95 % interval over chunks for each group. {POINTWISE}",
        f"Mean KL divergence of each group with all its sites rounded together: {figures}.",
        figure,
        [
            ["group", "mean_kld", *CI95],
            *(
                [group.name, value, *ends(interval)]
                for group, value, interval in zip(groups, values, intervals, strict=True)
            ),
        ],
    )


def _by_layer(key: str, group: Group, ink: Ink, what: str = "rounds one site alone") -> Chart:
    figure = figure_of(2.5)
    axis = figure.subplots()
    places = positions([group])
    series = series_of(group, group.kinds)
    width = 0.8 / len(series)
    tips, everything = {}, []
    rows: list[list[Any]] = [["series", "cell", *SITE, "mean_kld", *CI95]]
    for j, one in enumerate(series):
        entries = [entry for entry in one.entries if math.isfinite(kld(entry))]
        at = [places[layer_of(entry)] + (j - (len(series) - 1) / 2) * width for entry in entries]
        values = [kld(entry) for entry in entries]
        intervals = [kld_interval(entry) for entry in entries]
        fill = one.fill(ink)
        bars = axis.bar(
            at,
            values,
            width * 0.92,
            label=one.label,
            color=(fill, one.control.opacity) if one.control else fill,
            edgecolor=fill,
            linewidth=0.6 if one.control else 0,
        )
        if any(intervals):
            axis.errorbar(
                at,
                values,
                whiskers(values, intervals),
                fmt="none",
                ecolor=ink.text,
                elinewidth=0.8,
                capsize=1.2,
            )
        for i, (bar, entry) in enumerate(zip(bars, entries, strict=True)):
            bar.set_gid(f"tip-{j}-{i}")
            around = between(kld_interval(entry))
            tips[f"tip-{j}-{i}"] = f"{plain(entry['name'])}: mean KL {kl_text(kld(entry), 4)}, {around}"
        rows += [
            [one.label, plain(entry["name"]), *site_row(entry), value, *ends(interval)]
            for entry, value, interval in zip(entries, values, intervals, strict=True)
        ]
        everything += [v for v in values if v > 0] + [end for i in intervals if i for end in i if end > 0]
    log = value_axis(axis, "y", everything, "mean KL divergence")
    layer_axis(axis, places)
    axis.set_title(group.name)
    legend(axis)
    first = group.order.first
    shared = f"First place: {group.text(first)}." if 0 < len(first) < len(group.singles) else ""
    return Chart(
        key,
        "layers",
        f"Mean KL divergence by layer: {group.name}",
        f"Each bar {what}; lines are 95 % intervals over chunks. {POINTWISE} {shared}".rstrip()
        + (" The scale is logarithmic: bars have no zero." if log else ""),
        f"Bars of the mean KL divergence of {group.name}, one {'norm' if group.of_norms else 'site'} alone: "
        + " ".join(
            [
                f"{extremes(group)}.",
                *([shared] if shared else []),
                *(f"Beside them {control.label}: {extremes(other)}." for control, other in group.controls),
            ]
        ),
        figure,
        rows,
        tips,
    )


def _cumulative(key: str, group: Group, ink: Ink) -> Chart:
    figure = figure_of(2.3)
    axis = figure.subplots()
    cells = [group.singles[0], *group.cumulative, *([group.together] if group.together else [])]
    at = [len(entry["sites"]) for entry in cells]
    values = [finite(kld(entry)) for entry in cells]
    single, sums = [finite(kld(entry)) for entry in group.singles], []
    for n in at:
        sums.append(math.fsum(single[:n]))
    known = [(n, i) for n, i in zip(at, map(kld_interval, cells), strict=True) if i]
    axis.fill_between(
        [n for n, _ in known],
        [i[0] for _, i in known],
        [i[1] for _, i in known],
        color=ink.s0,
        alpha=0.25,
        linewidth=0,
    )
    axis.plot(at, values, "o-", color=ink.s0, markersize=3, linewidth=1.2, label="rounded together")
    axis.plot(at, sums, "--", color=ink.s1, linewidth=1.2, label="sum of the single ones")
    value_axis(axis, "y", [*values, *sums], "mean KL divergence", log=False)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sites rounded, from the first on")
    axis.set_title(group.name)
    legend(axis)
    return Chart(
        key,
        "layers",
        f"Mean KL divergence of the first sites together: {group.name}",
        "The first sites up to each, with the 95 % interval, and what the single ones add up to.",
        f"A line from {kl_text(values[0])} with one site to {kl_text(values[-1])} with {at[-1]}; the "
        f"single ones add up to {kl_text(sums[-1])}.",
        figure,
        [
            ["sites_rounded", "mean_kld", *CI95, "sum_of_singles"],
            *(
                [n, value, *ends(kld_interval(entry)), total]
                for n, entry, value, total in zip(at, cells, values, sums, strict=True)
            ),
        ],
    )
