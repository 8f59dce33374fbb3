"""The mean KL divergence of each site alone as a map of layers and formats, or of norms and steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .axes import OUTSIDE, extremes, figure_of, layer_axis, layer_of, positions, tick
from .data import Group, kl_text, kld, kld_interval, plain
from .downloads import CI95, SITE, ends, site_row
from .svg import Chart, Ink


def heat_map(groups: Sequence[Group], ink: Ink, key: str, what: str) -> Chart:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, NullFormatter

    places = positions(groups)
    rows = [(group, kinds, cells) for group in groups for kinds, cells in group.panels.items()]
    several = len({kinds for _, kinds, _ in rows}) > 1
    values = [kld(entry) for group in groups for entry in group.singles]
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    low, high = min(positive), max(positive)
    norm = LogNorm(low, high if high > low else 2 * low)
    colours = colormaps["cividis"]
    figure = figure_of(0.85 + 0.23 * len(rows))
    axis = figure.subplots()
    tips = {}
    data: list[list[Any]] = [["group", "cell", *SITE, "mean_kld", *CI95, "in_first_place"]]
    for y, (group, _, cells) in enumerate(rows):
        for entry in cells:
            x, value = places[layer_of(entry)], kld(entry)
            ok = math.isfinite(value) and value > 0
            cell = Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                facecolor=colours(norm(value)) if ok else "none",
                edgecolor=ink.ground if ok else ink.muted,
                linewidth=0.8,
                hatch=None if ok else "xxxx",
            )
            cell.set_gid(f"tip-{y}-{x}")
            tips[f"tip-{y}-{x}"] = f"{plain(entry['name'])}: mean KL {kl_text(value, 4)}"
            axis.add_patch(cell)
            told = len(group.order.first) < len(group.singles)
            first = told and any(entry is one for one in group.order.first)
            about = [group.name, plain(entry["name"]), *site_row(entry)]
            data.append([*about, value, *ends(kld_interval(entry)), int(first)])
            if ok and first:
                axis.plot([x], [y], "o", markersize=3.2, color="white" if norm(value) < 0.55 else "black")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_yticks(
        range(len(rows)),
        [f"{kinds.partition(' ')[0]} " * several + group.spec for group, kinds, _ in rows],
    )
    layer_axis(axis, places)
    axis.set_xlim(min(places.values()) - 0.5, max(places.values()) + 0.5)
    axis.tick_params(axis="y", length=0, labelcolor=ink.text)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(norm, colours.resampled(32)),
        ax=axis,
        pad=0.015,
        aspect=max(6, 4 * len(rows)),
        fraction=0.05,
    )
    bar.ax.yaxis.set_major_formatter(FuncFormatter(tick))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)
    bar.set_label("mean KL")
    found = "; ".join(f"{group.name}: {extremes(group)}" for group in groups)
    return Chart(
        key,
        "heat",
        f"Mean KL divergence, {what}",
        "Brighter is worse, on a logarithmic scale. A dot marks the first place of each group, several dots "
        "a place that is shared; none, that no order is resolved."
        + "".join(f" “{short}” is {name}." for short, name in OUTSIDE.items() if short in places),
        f"A heat map of the mean KL divergence of each site alone. {found}.",
        figure,
        data,
        tips,
    )
