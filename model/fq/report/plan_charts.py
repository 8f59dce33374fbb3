"""A plan as a part of a page: which format each site has, and what any budget buys."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from string import ascii_letters
from typing import Any

from ..measure.estimates import site_parts
from .axes import OUTSIDE, Places, figure_of, layer_axis, value_axis
from .data import between, finite, kl_text, listed, plain
from .downloads import CI95, ends
from .pages import Part
from .svg import Chart, Ink

NONE = "no rounding"
SECTION = {"plan": "The plan"}


def plan_part(data: dict[str, Any]) -> Part:
    """data is what `given.read_plan` returns."""
    return Part(partial(_charts, data), SECTION, {"plan": _said(data)}, leads=True)


def _said(data: dict[str, Any]) -> list[str]:
    plan = data["plan"]
    lines = [
        f"{len(plan['sites'])} sites, {plan['cost']:.4g} for a value on average, in bits or as of --costs; "
        f"predicted mean KL divergence {_with(plan['mean_kld'], plan['mean_kld_ci95'])}. What keeps it from "
        f"being cheaper, or better: {plain(data['binds'])}."
    ]
    if checked := data["validated"]:
        cells = "; ".join(
            f"{plain(one['name'])} predicted {_with(one['predicted'], one['predicted_ci95'])}, measured "
            f"{_with(one['mean_kld'], one['mean_kld_ci95_chunks'])}"
            for one in checked["cells"]
        )
        text = plain(os.path.basename(checked["text"]))
        lines.append(f"Measured on {text}, held out, {checked['n_chunks']} chunks: {cells}.")
        if over := checked["uniform_over_plan"]:
            low, high = over["ci95"]
            lines.append(
                f"The uniform format costs {over['ratio']:.3g} ({low:.3g} to {high:.3g}) times the plan's KL."
            )
    else:
        lines.append("It was not measured: fq plan --validate FILE does, on another text.")
    return [*lines, f"Made by: {plain(data['command'])}"]


def _with(value: float | None, interval: Sequence[float] | None) -> str:
    return f"{kl_text(value)} ({between(None if interval is None else (interval[0], interval[1]))})"


def _charts(data: dict[str, Any], ink: Ink) -> Iterator[Chart]:
    yield _map(data["plan"]["sites"], ink)
    yield _front(data, ink)


def _map(sites: Sequence[dict[str, Any]], ink: Ink) -> Chart:
    """A letter and a colour for each format, the cheapest first; rows are kinds of site."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch, Rectangle

    cost = {one["format"]: one["cost"] for one in sites}
    formats = sorted(cost, key=lambda spec: (cost[spec], spec or ""))
    letters = dict(zip(formats, ascii_letters[26:] + ascii_letters[:26], strict=False))
    colours = {spec: colormaps["cividis"](i / max(len(formats) - 1, 1)) for i, spec in enumerate(formats)}
    kinds: dict[str, int] = {}
    layers: Places = {}
    for one in sites:
        kind, layer, point = site_parts(one["site"])
        kinds.setdefault(f"{kind}.{point}" if point else kind, len(kinds))
        if layer is not None:
            layers[layer] = layer
    alone = max(layers.values(), default=0) + 2  # of what is in no layer
    figure = figure_of(1.3 + 0.23 * len(kinds) + 0.17 * math.ceil(len(formats) / 5))
    axis = figure.subplots()
    rows: list[list[Any]] = [["site", "kind", "layer", "format", "cost_of_a_value", "mean_kld"]]
    tips = {}
    for i, one in enumerate(sites):
        kind, layer, point = site_parts(one["site"])
        name, spec = f"{kind}.{point}" if point else kind, one["format"]
        x, y = alone if layer is None else layer, kinds[name]
        cell = Rectangle(
            (x - 0.5, y - 0.5), 1, 1, facecolor=colours[spec], edgecolor=ink.ground, linewidth=0.8
        )
        cell.set_gid(f"tip-{i}")
        tips[f"tip-{i}"] = f"{plain(one['site'])}: {plain(spec or NONE)}, mean KL {kl_text(one['mean_kld'])}"
        axis.add_patch(cell)
        axis.text(
            x,
            y,
            letters.get(spec, "?"),
            ha="center",
            va="center_baseline",
            fontsize=6.5,
            color=letter_on(colours[spec]),
        )
        rows.append(
            [plain(one["site"]), plain(name), layer, plain(spec or NONE), one["cost"], one["mean_kld"]]
        )
    outside = any(site_parts(one["site"])[1] is None for one in sites)
    layer_axis(axis, layers or {0: 0}, [(alone, "no layer")] if outside else [])
    axis.set_xlim(min(layers.values(), default=alone) - 0.5, max([alone] * outside or layers.values()) + 0.5)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.set_yticks(range(len(kinds)), list(map(plain, kinds)))
    axis.tick_params(axis="y", length=0, labelcolor=ink.text)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    names = [f"{letters.get(spec, '?')} {plain(spec or NONE)}, {cost[spec]:.3g}" for spec in formats]
    handles = [Patch(facecolor=colours[spec], edgecolor=ink.muted, linewidth=0.5) for spec in formats]
    figure.legend(handles, names, loc="outside upper left", ncols=min(5, len(formats)))
    counts = {spec: sum(one["format"] == spec for one in sites) for spec in formats}
    said = ", ".join(
        f"{plain(spec or NONE)} at {n}" for spec, n in sorted(counts.items(), key=lambda item: -item[1])
    )
    return Chart(
        "plan-map",
        "plan",
        "The format of each site",
        "A letter for each format, the cheapest first, with what a value costs in it; brighter is dearer. "
        f"What is in no layer, such as {listed([*OUTSIDE.values()])}, stands on the right.",
        f"A map of {len(kinds)} kinds of site by layer. Of {len(sites)} sites: {said}.",
        figure,
        rows,
        tips,
    )


def letter_on(colour: Sequence[float]) -> str:
    """Black or white: which of them the colour, sRGB from 0 to 1, is farther from, by WCAG's luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _front(data: dict[str, Any], ink: Ink) -> Chart:
    figure = figure_of(3.2)
    axis = figure.subplots()
    rows: list[list[Any]] = [["what", "name", "cost_of_a_value", "mean_kld", *CI95]]
    checked = (data["validated"] or {"cells": []})["cells"]
    drawn = (
        ("what any budget buys, predicted", data["front"], "o-", ink.s0, "mean_kld_ci95"),
        ("a uniform format, predicted", data["uniform"], "x", ink.muted, "mean_kld_ci95"),
        ("this plan, predicted", [data["plan"]], "D", ink.s1, "mean_kld_ci95"),
        ("measured on held-out text", checked, "s", ink.s2, "mean_kld_ci95_chunks"),
    )
    values = []
    for what, plans, mark, colour, interval in drawn:
        for one in plans:
            name = plain(one.get("format") or one.get("name") or "")
            rows.append([what, name, one["cost"], one["mean_kld"], *ends(one[interval])])
        known = [one for one in plans if finite(one["mean_kld"]) > 0]  # 0 is on no logarithmic axis
        values += [one["mean_kld"] for one in known]
        if not known:
            continue
        axis.plot(
            [one["cost"] for one in known],
            [one["mean_kld"] for one in known],
            mark,
            color=colour,
            markersize=4,
            linewidth=1,
            label=what,
        )
        for one in known:
            if one[interval] and mark != "x":
                axis.plot([one["cost"]] * 2, one[interval], color=colour, linewidth=1)
                values += [end for end in one[interval] if end > 0]
    value_axis(axis, "y", values, "mean KL divergence", log=True)
    axis.set_xlabel("cost of a value, in bits or as of --costs")
    axis.legend(loc="upper right")
    best = data["plan"]
    return Chart(
        "plan-front",
        "plan",
        "What any budget buys",
        "Plans and uniform formats by what a value costs on average and the mean KL divergence; lines are "
        "95 % intervals, of what is measured over chunks.",
        f"A front of {len(data['front'])} plans. This one costs {best['cost']:.4g} for a value at "
        f"{_with(best['mean_kld'], best['mean_kld_ci95'])}.",
        figure,
        rows,
    )
