"""The report's charts of perplexity, of rounding errors, and of the KL divergence's distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from .axes import (
    MARKERS,
    OUTSIDE,
    Series,
    layer_axis,
    layer_of,
    panels_of,
    positions,
    series_of,
    shared_legend,
    value_axis,
    whiskers,
)
from .data import Group, finite, kl_text, plain, ppl_change, ppl_interval, realisations, significant
from .downloads import CI95, SITE, ends, site_row
from .perplexity import ONE_ROUNDING, ppl_text
from .svg import Chart, Ink

SPREAD = 8.0  # largest over smallest from which errors of several formats need a logarithmic axis
SIZES = "largest |error|", "mean |error|"


def perplexity(key: str, groups: Sequence[Group], ink: Ink) -> Chart:
    kinds = list(dict.fromkeys(kind for group in groups for kind in group.kinds))
    figure, axes = panels_of(len(groups), 2.0)
    said = []
    data: list[list[Any]] = [["group", "cell", "what", "ppl_change_percent", *CI95]]
    for axis, group in zip(axes, groups, strict=True):
        places = positions([group])
        series = series_of(group, kinds)
        wholes = [Series("", [group.together] if group.together else [], 0)]
        for control, other in group.controls:
            wholes.append(Series("", [other.together] if other.together else [], None, control))
        end = max(places.values()) + 2
        axis.axhline(0, color=ink.muted, linewidth=0.9)
        for j, one in enumerate(series):
            shift = (j - (len(series) - 1) / 2) * 0.8 / len(series)
            _dots(axis, [places[layer_of(entry)] + shift for entry in one.entries], one, ink)
        for j, one in enumerate(wholes):
            _dots(axis, [end + (j - (len(wholes) - 1) / 2) * 0.5 for _ in one.entries], one, ink)
        for what, drawn in (("one site", series), ("all together", wholes)):
            for entry in chain.from_iterable(one.entries for one in drawn):
                change = [finite(ppl_change(entry)), *ends(ppl_interval(entry))]
                data.append([plain(entry["group"]), plain(entry["name"]), what, *change])
        value_axis(axis, "y", [], "change of PPL, %", log=False)
        layer_axis(axis, places, [(end, "all")] if group.together else [])
        axis.set_title(group.name)
        if group.whole:
            said.append(f"{group.name} {ppl_text(group.whole)}")
    shared_legend(figure, axes)
    return Chart(
        key,
        "perplexity",
        "Perplexity ratio by layer",
        "Change of the perplexity against the baseline, (ratio − 1) in %, with 95 % intervals over "
        f"chunks, {_of_what(groups)}. Each panel has a scale of its own.",
        f"Change of the perplexity by layer, with intervals. All together: {'; '.join(said)}.",
        figure,
        data,
    )


def _of_what(groups: Sequence[Group]) -> str:
    """Which source of variance the intervals hold."""
    beside = [group for _, group in chain.from_iterable(group.controls for group in groups)]
    wholes = [group.together for group in (*groups, *beside) if group.together]
    singles = [entry for group in (*groups, *beside) for entry in group.singles]
    drawn = sum(realisations(entry) is not None for entry in (*wholes, *singles))
    if not drawn:
        return f"{ONE_ROUNDING}: another realisation of it may lie outside them"
    if drawn == len(wholes) + len(singles):
        return "of the mean over several realisations"
    return f"of the mean over several realisations where there are some, else {ONE_ROUNDING}"


def _dots(axis: Any, at: Sequence[float], series: Series, ink: Ink) -> None:
    if not at:
        return
    values = [finite(ppl_change(entry)) for entry in series.entries]
    axis.errorbar(
        at,
        values,
        whiskers(values, [ppl_interval(entry) for entry in series.entries]),
        fmt=series.marker,
        color=series.fill(ink),
        markersize=2.2 if series.control else 3,
        elinewidth=1,
        label=series.label or None,
    )


# ---------------------------------------------------------------- sites


def _share(site: dict[str, Any], count: str) -> float:
    return 100 * finite(site[count]) / site["elements"] if site["elements"] else math.nan


def _bias(site: dict[str, Any]) -> float:
    size = finite(site["mean_abs_error"])
    return 100 * finite(site["mean_error"]) / size if size else math.nan


_ERRORS: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("SQNR, dB", lambda site: finite(site["sqnr_db"])),
    ("largest |error|", lambda site: finite(site["max_abs_error"])),
    ("mean |error|", lambda site: finite(site["mean_abs_error"])),
    ("bias: mean error, % of mean |error|", _bias),
    ("out of range, % of elements", lambda site: _share(site, "out_of_range")),
    ("changed, % of elements", lambda site: _share(site, "changed")),
)


def errors(key: str, kinds: str, groups: Sequence[Group], ink: Ink) -> Chart:
    mine = [group for group in groups if kinds in group.panels]
    places = positions(mine)
    figure, axes = panels_of(len(_ERRORS), 1.75)
    said = []
    names = [group.name if len({g.sites for g in mine}) > 1 else group.spec for group in mine]
    for axis, (what, value_of) in zip(axes, _ERRORS, strict=True):
        everything = []
        for i, group in enumerate(mine):
            entries = group.panels[kinds]
            values = [value_of(entry["sites"][0]) for entry in entries]
            look = {"marker": MARKERS[i % len(MARKERS)], "color": ink.series(i), "markersize": 2.8}
            points = [(layer_of(entry), value) for entry, value in zip(entries, values, strict=True)]
            # no line to what is in no layer
            for label, of in (
                (names[i], [(places[layer], y) for layer, y in points if layer not in OUTSIDE]),
                *((None, [(places[layer], y)]) for layer, y in points if layer in OUTSIDE),
            ):
                axis.plot([x for x, _ in of], [y for _, y in of], linewidth=0.9, label=label, **look)
            known = [value for value in values if math.isfinite(value)]
            everything += known
            if what.startswith("SQNR") and known:
                said.append(f"{names[i]} {significant(min(known))} to {significant(max(known))} dB")
        if what.startswith("bias"):
            axis.axhline(0, color=ink.muted, linewidth=0.9)
        positive = [value for value in everything if value > 0]
        spread = what in SIZES and bool(positive) and max(positive) > SPREAD * min(positive)
        value_axis(axis, "y", everything, "", log=spread)
        if everything and not any(everything):
            axis.text(0.5, 0.5, "0 at every site", transform=axis.transAxes, ha="center", color=ink.muted)
        if what[:4] not in ("bias", "SQNR") and axis.get_yscale() == "linear":
            axis.set_ylim(0, 1.08 * max(everything, default=0) or 1)
        axis.set_title(what + (", log scale" if axis.get_yscale() == "log" else ""))
        axis.set_ylabel("")
        layer_axis(axis, places)
    shared_legend(figure, axes)
    return Chart(
        key,
        "sites",
        f"Rounding errors by layer: {kinds}",
        "Of each site rounded alone, counted over every element that passed it. SQNR is the signal over the "
        "rounding error; a bias of 0 is an error that leans neither way.",
        f"Small panels of the rounding error at each {kinds} by layer. SQNR: {'; '.join(said) or 'none'}.",
        figure,
        [
            ["group", *SITE, *(what for what, _ in _ERRORS)],
            *(
                [group.name, *site_row(entry), *(value_of(entry["sites"][0]) for _, value_of in _ERRORS)]
                for group in mine
                for entry in group.panels[kinds]
            ),
        ],
    )


def distributions(key: str, panels: Sequence[tuple[Group, str]], ink: Ink) -> Chart:
    figure, axes = panels_of(len(panels), 2.0, sharey=True)
    names = ("max", "99.9%", "99%", "90%", "median", "10%", "1%")
    found = {
        (group.name, kinds): [
            (layer_of(entry), {name: finite(entry["comparison"]["kld"][name]) for name in names})
            for entry in group.panels[kinds]
        ]
        for group, kinds in panels
    }
    positive = [v for cells in found.values() for _, kl in cells for v in kl.values() if v > 0]
    floor = min((v for v in positive if math.isfinite(v)), default=1e-12)
    said = []
    for axis, (group, kinds) in zip(axes, panels, strict=True):
        places, cells = positions([group]), found[group.name, kinds]
        at = [places[layer] for layer, _ in cells]
        colour = ink.muted if group.control else ink.s0

        def of(name: str, cells: Any = cells) -> list[float]:
            return [max(kl[name], floor) for _, kl in cells]

        axis.vlines(at, of("1%"), of("99%"), color=colour, linewidth=0.9)
        axis.vlines(at, of("10%"), of("90%"), color=colour, linewidth=3.2)
        axis.plot(at, of("median"), "_", color=ink.ground, markersize=4, markeredgewidth=1.4)
        axis.plot(at, of("99.9%"), "_", color=ink.text, markersize=3.5, markeredgewidth=0.9)
        axis.plot(at, of("max"), "x", color=ink.text, markersize=2.4, markeredgewidth=0.7)
        value_axis(axis, "y", [*positive], "KL of a token", log=True)
        layer_axis(axis, places)
        axis.set_title(group.name + (f": {kinds}" if len(group.panels) > 1 else ""))
        if axis.get_subplotspec().colspan.start:
            axis.set_ylabel("")
        medians = [kl["median"] for _, kl in cells]
        said.append(f"{group.name} {kinds} {kl_text(min(medians))} to {kl_text(max(medians))}")
    return Chart(
        key,
        "sites",
        "Distribution of the KL divergence over tokens",
        "Of each site alone: thick 10–90 %, the gap in it the median, thin 1–99 %, dash 99.9 %, cross the "
        "largest. All panels share one logarithmic scale.",
        f"Percentiles of the KL divergence of single tokens, by layer. Medians: {'; '.join(said)}.",
        figure,
        [
            ["group", *SITE, *names],
            *(
                [group.name, *site_row(entry), *(finite(entry["comparison"]["kld"][name]) for name in names)]
                for group, kinds in panels
                for entry in group.panels[kinds]
            ),
        ],
    )
