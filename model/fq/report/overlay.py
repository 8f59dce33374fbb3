"""All groups of a run on one scale: for those who ask how far apart formats are, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .axes import (
    MARKERS,
    OUTSIDE,
    extremes,
    layer_axis,
    layer_of,
    panels_of,
    positions,
    shared_legend,
    value_axis,
    whiskers,
)
from .data import Entry, Group, kld, kld_interval, plain, site_of
from .downloads import CI95, SITE, ends, site_row
from .svg import N_SERIES, SERIES, Chart, Ink

MOST = 24  # series: more cannot be told apart
SYMBOLS = dict(zip(MARKERS, "●■▲◆▼★✚✖", strict=True))  # of the markers, in words beside the drawing
SPREAD = 0.5  # of a layer's width, over all series


@dataclass(frozen=True)
class _Series:
    """The single cells of a group, or of one point where it has several, by panel: a kind of site."""

    name: str
    panels: dict[str, list[Entry]]


def one_scale(groups: Sequence[Group], ink: Ink) -> Chart | None:
    """Each group a line with a colour and a mark of its own; None where there are no two."""
    every = [series for group in groups for series in _series_of(group)]
    shown = every[:MOST]
    if len(shown) < 2:
        return None
    kinds = list(dict.fromkeys(kind for series in shown for kind in series.panels))
    figure, axes = panels_of(len(kinds), 3.2, sharey=True)
    places = positions(groups)
    data: list[list[Any]] = [["group", "cell", *SITE, "mean_kld", *CI95]]
    everything: list[float] = []
    for axis, kind in zip(axes, kinds, strict=True):
        for i, series in enumerate(shown):
            entries = series.panels.get(kind, [])
            everything += _draw(
                axis, i, (i / (len(shown) - 1) - 0.5) * SPREAD, series.name, entries, places, ink
            )
            data += [
                [series.name, plain(entry["name"]), *site_row(entry), kld(entry), *ends(kld_interval(entry))]
                for entry in entries
            ]
    for axis, kind in zip(axes, kinds, strict=True):
        value_axis(axis, "y", everything, "mean KL divergence", log=True)
        layer_axis(axis, places)
        axis.set_title(kind)
        if axis.get_subplotspec().colspan.start:
            axis.set_ylabel("")
    shared_legend(figure, axes)
    left_out = f" Of {len(every)} only the first {MOST} are drawn." if len(every) > MOST else ""
    found = "; ".join(f"{group.name}: {extremes(group)}" for group in groups)
    return Chart(
        "one-scale",
        "layers",
        "All groups on one scale",
        "The mean KL divergence of each site alone, as in the figures above, with 95 % intervals over chunks "
        f"and one logarithmic scale for all; what is exactly 0 is not on it.{left_out}",
        f"Lines by layer, one for each of {len(shown)} groups, on one scale. {found}.",
        figure,
        data,
        series=[(SYMBOLS[_marker(i)], f"var(--s{i % N_SERIES})", one.name) for i, one in enumerate(shown)],
        on_demand=True,
    )


def _series_of(group: Group) -> list[_Series]:
    points = list(dict.fromkeys(site_of(entry)[2] for entry in group.singles))
    found = []
    for point in points:
        panels: dict[str, list[Entry]] = {}
        for kinds, entries in group.panels.items():
            mine = [entry for entry in entries if site_of(entry)[2] == point]
            if mine:
                kind = " and ".join(each.partition(".")[0] for each in kinds.split(" and "))
                panels.setdefault(kind, []).extend(mine)
        found.append(_Series(group.name + (f", {point}" if len(points) > 1 else ""), panels))
    return found


def _marker(i: int) -> str:
    """Another one for each of the series that share a colour."""
    return MARKERS[(i + i // N_SERIES) % len(MARKERS)]


def _draw(
    axis: Any, i: int, shift: float, name: str, entries: Sequence[Entry], places: Any, ink: Ink
) -> list[float]:
    """What is drawn of it; no line to what is in no layer."""
    known = [entry for entry in entries if math.isfinite(kld(entry)) and kld(entry) > 0]
    found: list[float] = []
    for outside in (False, True):
        some = [entry for entry in known if (layer_of(entry) in OUTSIDE) == outside]
        if not some:
            continue
        values, intervals = [kld(entry) for entry in some], [kld_interval(entry) for entry in some]
        drawn = axis.errorbar(
            [places[layer_of(entry)] + shift for entry in some],
            values,
            whiskers(values, intervals),
            fmt=_marker(i),
            linestyle="none" if outside else "-",
            color=ink.series(i),
            markersize=3.2,
            linewidth=0.7,
            elinewidth=0.9,
            label=name,
        )
        for artist in (drawn.lines[0], *drawn.lines[2]):
            artist.set_gid(f"{SERIES}{i}")
        found += [*values, *(end for interval in intervals if interval for end in interval if end > 0)]
    return found
