"""An estimate of every site in every format as a page of plots and tables."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..measure.estimates import MARKS
from .axes import figure_of, panels_of, tick, value_axis
from .data import kl_text, plain
from .downloads import CI95, ends
from .pages import Part, in_order, pngs_of, render, sections_of
from .provenance import provenance
from .sensitivity_tables import tables
from .svg import Chart, Ink

Cell = Mapping[str, Any]
SECTIONS = {"kinds": "Kinds of site × formats", "sites": "Sites × formats", "verified": "Measured exactly"}
LEFT_OUT = 0.05  # of the cells, those of least KL, that share the darkest colour


def sensitivity_html(data: dict[str, Any], more: Sequence[Part] = ()) -> str:
    """The page; data is `sensitivity_figures` of a stored run, with ``run``, its number, and ``started``;
    more are parts of other sources.

    Raises FqError where matplotlib is missing.
    """
    sections = sections_of(_parts(data, more), f"fq-run-{data['run']}")
    entries = [(section["key"], section["title"]) for section in sections]
    marks = Counter(cell["mark"] for cell in data["cells"] if cell["mark"])
    return render(
        "sensitivity.html",
        title=f"{plain(os.path.basename(data['model']))}: what rounding each of its sites would cost",
        data=data,
        text=plain(os.path.basename(data.get("text") or "a text")),
        sections=sections,
        entries=[*entries, ("figures", "Figures"), ("provenance", "Provenance")],
        marks=[(marks[name], name, why) for name, why in MARKS.items() if marks[name]],
        tables=tables(data),
        provenance=provenance(data),
        command=plain(data.get("command") or ""),
    )


def pngs(data: dict[str, Any], more: Sequence[Part] = ()) -> dict[str, bytes]:
    """Each chart of the page by its file's name, KEY.png, in the light."""
    return pngs_of(_parts(data, more))


def _parts(data: dict[str, Any], more: Sequence[Part]) -> list[Part]:
    return in_order(Part(partial(charts, data), SECTIONS), more)


def charts(data: dict[str, Any], ink: Ink) -> Iterator[Chart]:
    """One after another, each to be written within `svg.style` before the next is drawn."""
    kinds: dict[str, list[Cell]] = {}
    for cell in data["cells"]:
        kinds.setdefault(kind_of(cell), []).append(cell)
    known = [cell["mean_kld"] for cell in data["cells"] if cell["mean_kld"]]
    if not known:
        return
    yield _of_kinds(kinds, data["formats"], ink)
    # those of many layers, two side by side on the same scale
    scale = _scale(known)
    several = [name for name, cells in kinds.items() if len({cell["site"] for cell in cells}) > 1]
    for i in range(0, len(several), 2):
        some = {name: kinds[name] for name in several[i : i + 2]}
        yield _of_sites(f"sites-{i // 2 + 1}", some, data["formats"], scale, ink)
    if data["verified"]:
        yield _verified(data, ink)


def _scale(known: Sequence[float]) -> tuple[float, float]:
    """Few cells that cost next to nothing would take most of the colours."""
    ordered = sorted(known)
    return ordered[math.floor(LEFT_OUT * len(ordered))], ordered[-1]


def kind_of(cell: Cell) -> str:
    return f"{cell['kind']}.{cell['point']}" if cell["point"] else str(cell["kind"])


def _of_kinds(kinds: Mapping[str, Sequence[Cell]], formats: Sequence[str], ink: Ink) -> Chart:
    """All layers of a kind together, as if costs added up."""
    sums = []
    for spec in formats:
        row = []
        for cells in kinds.values():
            mine = [cell["mean_kld"] for cell in cells if cell["format"] == spec]
            row.append(math.nan if None in mine else math.fsum(mine))
        sums.append(row)
    figure = figure_of(1.5 + 0.155 * len(formats))
    axis = figure.subplots()
    _heat_map(figure, axis, sums, formats, None, ink)
    axis.set_xticks(range(len(kinds)), list(kinds), rotation=55, ha="right", rotation_mode="anchor")
    flat = [x for row in sums for x in row if math.isfinite(x) and x > 0]
    return Chart(
        "kinds",
        "kinds",
        "Estimated mean KL divergence of all layers of a kind of site, by format",
        "Sums over the layers, on a logarithmic scale; brighter is worse, and blank where a format leaves "
        "what is not finite or does not fit.",
        f"A heat map of {len(kinds)} kinds of site and {len(formats)} formats, from {kl_text(min(flat))} "
        f"to {kl_text(max(flat))}."
        if flat
        else "An empty heat map.",
        figure,
        [
            ["kind", "format", "sum_of_mean_kld"],
            *(
                [plain(kind), plain(spec), x]
                for spec, row in zip(formats, sums, strict=True)
                for kind, x in zip(kinds, row, strict=True)
            ),
        ],
    )


def _of_sites(
    key: str,
    kinds: Mapping[str, Sequence[Cell]],
    formats: Sequence[str],
    scale: tuple[float, float],
    ink: Ink,
) -> Chart:
    figure, axes = panels_of(len(kinds), 0.9 + 0.125 * len(formats), sharey=True)
    found = []
    for axis, (name, cells) in zip(axes, kinds.items(), strict=True):
        layers = list(dict.fromkeys(cell["layer"] for cell in cells))
        place = {(cell["format"], cell["layer"]): cell for cell in cells}
        rows = [[place[spec, layer]["mean_kld"] or math.nan for layer in layers] for spec in formats]
        last = axis is axes[-1]
        _heat_map(figure, axis, rows, formats, scale, ink, bar=last, small=True)
        marked = [
            (x, y)
            for y, spec in enumerate(formats)
            for x, layer in enumerate(layers)
            if place[spec, layer]["mark"] and place[spec, layer]["mean_kld"]
        ]
        if marked:
            axis.plot(*zip(*marked, strict=True), "x", color=ink.s1, markersize=2.2, markeredgewidth=0.6)
        step = max(1, math.ceil(len(layers) / 15))
        axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axis.set_xlabel("layer")
        axis.set_title(name)
        most = max(cells, key=lambda cell: cell["mean_kld"] or 0.0)
        found.append(f"{name}: most in {most['site']}, {most['format']}, {kl_text(most['mean_kld'] or 0.0)}")
    return Chart(
        key,
        "sites",
        f"Estimated mean KL divergence of each site: {', '.join(kinds)}",
        "On one logarithmic scale in all charts of this section, whose darkest colour is "
        f"{kl_text(scale[0], 1)} and less; a cross is on what is marked: not to be trusted.",
        f"A heat map of layers and formats. {'; '.join(found)}.",
        figure,
        [
            ["site", "kind", "layer", "format", "mean_kld", *CI95, "mark"],
            *(
                [
                    plain(cell["site"]),
                    name,
                    cell["layer"],
                    plain(cell["format"]),
                    cell["mean_kld"],
                    *ends(cell["mean_kld_ci95"]),
                    cell["mark"],
                ]
                for name, cells in kinds.items()
                for cell in cells
            ),
        ],
    )


def _heat_map(
    figure: Any,
    axis: Any,
    rows: Sequence[Sequence[float]],
    formats: Sequence[str],
    scale: tuple[float, float] | None,
    ink: Ink,
    *,
    bar: bool = True,
    small: bool = False,
) -> None:
    """Of formats from top to bottom; scale is its ends, None: those of the values."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, NullFormatter

    values = np.array(rows, np.float64)
    values[~(values > 0)] = np.nan
    low, high = scale or (
        (float(np.nanmin(values)), float(np.nanmax(values))) if np.isfinite(values).any() else (1.0, 2.0)
    )
    norm = LogNorm(low, high if high > low else 2 * low)
    # one pixel a value, which the browser enlarges
    mesh = axis.imshow(values, aspect="auto", interpolation="none", cmap="cividis", norm=norm)
    size = {"labelsize": 6.5} if small else {"labelsize": 7}
    axis.set_yticks(range(len(formats)), list(formats))
    axis.tick_params(axis="both", length=0, labelcolor=ink.text, **size)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if bar:
        made = figure.colorbar(mesh, ax=axis, pad=0.015, fraction=0.05)
        made.ax.yaxis.set_major_formatter(FuncFormatter(tick))
        made.ax.yaxis.set_minor_formatter(NullFormatter())
        made.outline.set_visible(False)
        made.set_label("mean KL")


def _verified(data: dict[str, Any], ink: Ink) -> Chart:
    figure = figure_of(3.4)
    axis = figure.subplots()
    cells = [one for one in data["verified"] if one["mean_kld"] > 0 and one["exact"] > 0]
    x, y = [one["mean_kld"] for one in cells], [one["exact"] for one in cells]
    tips = {}
    for i, one in enumerate(cells):
        (dot,) = axis.plot([x[i]], [y[i]], "x" if one["mark"] else "o", color=ink.s0, markersize=4)
        dot.set_gid(f"tip-{i}")
        tips[f"tip-{i}"] = f"{plain(one['site'])}={plain(one['format'])}: {one['ratio']:.2f} of the estimate"
    value_axis(axis, "x", x + y, "estimate", log=True)
    value_axis(axis, "y", x + y, "measured exactly", log=True)
    both = [min(x + y), max(x + y)] if cells else [1.0, 1.0]
    axis.plot(both, both, color=ink.muted, linewidth=0.8)
    shown = ("mean_kld", "exact", "ratio", "mark")
    ratios = [one["ratio"] for one in cells]
    said = f"exact / estimate from {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "none above 0"
    return Chart(
        "verified",
        "verified",
        "Cells that were measured exactly, beside their estimates",
        f"On the line both are equal: {said}.",
        f"{len(cells)} points beside a diagonal; {said}.",
        figure,
        [
            ["site", "format", "estimate", "exact", "exact_over_estimate", "mark"],
            *([plain(one["site"]), plain(one["format"]), *(one[key] for key in shown)] for one in cells),
        ],
        tips,
    )
