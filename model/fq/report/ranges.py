"""The ranges of a model's values as a page of plots and a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from .axes import figure_of, shared_legend, value_axis
from .data import plain
from .pages import Part, render, sections_of
from .ranges_table import HEAD, row_of
from .svg import Chart, Ink

Site = dict[str, Any]
# whose largest and smallest normal numbers are drawn; fp8_e5m2's have f16's exponents
SHOWN = {"f16": "f16, fp8_e5m2", "fp8_e4m3fn": "fp8_e4m3fn"}
SECTIONS = {
    "exponents": "Exponents",
    "magnitudes": "Magnitudes by layer",
    "outliers": "Outlier channels",
    "squares": "What norms sum",
}


def ranges_html(data: dict[str, Any]) -> str:
    """The page; data is `Ranges.result` with ``text`` and ``command``.

    Raises FqError where matplotlib is missing.
    """
    sections = sections_of([Part(partial(charts, data), SECTIONS)], "fq-ranges")
    entries = [(section["key"], section["title"]) for section in sections]
    return render(
        "ranges.html",
        title=f"{plain(os.path.basename(data['model']))}: how large its values are",
        text=plain(os.path.basename(data["text"])),
        command=plain(data.get("command") or ""),
        data=data,
        sections=sections,
        entries=[*entries, ("figures", "All figures")],
        table={"title": "All figures", "head": HEAD, "rows": [row_of(site) for site in data["sites"]]},
    )


def part_of(data: dict[str, Any]) -> Part:
    """Of a page that is of something else."""
    titles = {key: f"Ranges: {title[:1].lower()}{title[1:]}" for key, title in SECTIONS.items()}
    about = (
        f"{plain(os.path.basename(data['text']))}: {data['n_chunks']} chunks of {data['n_ctx']} tokens, each "
        "chunk's first token told apart. fq ranges -o FILE writes them with their table."
    )
    return Part(partial(charts, data), titles, {next(iter(SECTIONS)): [about]})


def charts(data: dict[str, Any], ink: Ink) -> Iterator[Chart]:
    """One after another, each to be written within `svg.style` before the next is drawn."""
    groups: dict[str, list[Site]] = {}
    for site in data["sites"]:
        groups.setdefault(_group(site), []).append(site)
    for i, (name, sites) in enumerate(groups.items()):
        yield _exponents(f"exponents-{i + 1}", name, sites, ink)
    for i, (name, sites) in enumerate(groups.items()):
        if len(sites) > 1:  # of one the table says it all
            yield _magnitudes(f"magnitudes-{i + 1}", name, sites, ink)
    for i, (name, sites) in enumerate(groups.items()):
        if any(site["channels"]["n_outliers"] for site in sites):
            yield _outliers(f"outliers-{i + 1}", name, sites, ink)
    summing = {
        name: sites for name, sites in groups.items() if "sum_of_squares" in sites[0] and len(sites) > 1
    }
    for i, (name, sites) in enumerate(summing.items()):
        yield _squares(f"squares-{i + 1}", name, sites, ink)


def _group(site: Site) -> str:
    return plain(site["kind"] if site["point"] is None else f"{site['kind']}.{site['point']}")


def _label(site: Site) -> str:
    return "" if site["layer"] is None else str(site["layer"])


def _layers(axis: Any, sites: Sequence[Site], which: str) -> None:
    step = max(1, math.ceil(len(sites) / 32))
    at = range(0, len(sites), step)
    getattr(axis, f"set_{which}ticks")(list(at), [_label(sites[i]) for i in at])
    getattr(axis, f"set_{which}label")("layer" if sites[0]["layer"] is not None else "")


def _exponents(key: str, name: str, sites: list[Site], ink: Ink) -> Chart:
    import numpy as np

    from fq_kernels import get_format

    low = min((min(site["rest"]["exponents"], default=0) for site in sites), default=0)
    high = max(max((*site["rest"]["exponents"], *site["first"]["exponents"]), default=0) for site in sites)
    shares = np.full((len(sites), high - low + 1), np.nan)
    for row, site in zip(shares, sites, strict=True):
        for exponent, count in site["rest"]["exponents"].items():
            row[exponent - low] = count / site["rest"]["values"]
    figure = figure_of(0.9 + 0.14 * max(len(sites), 4))
    axis = figure.subplots()
    mesh = axis.imshow(
        np.log10(shares),
        extent=(low - 0.5, high + 0.5, len(sites) - 0.5, -0.5),
        aspect="auto",
        interpolation="none",  # one pixel a share, which the browser enlarges
        cmap="cividis",
        vmin=-7,
        vmax=0,
    )
    firsts = [max(site["first"]["exponents"], default=None) for site in sites]
    marked = [(e, y) for y, e in enumerate(firsts) if e is not None]
    if marked:
        axis.plot(*zip(*marked, strict=True), "o", color=ink.s1, markersize=3, label="first tokens")
    for i, (spec, label) in enumerate(SHOWN.items()):
        fmt = get_format(spec)
        assert fmt.largest and fmt.smallest_normal
        colour = ink.series((0, 3)[i])
        for end, number in enumerate((fmt.largest, fmt.smallest_normal)):
            place = math.floor(math.log2(number)) + (0.5 if end == 0 else -0.5)
            if low - 1 <= place <= high + 1:
                what = "largest" if end == 0 else "smallest normal"
                axis.axvline(
                    place, linestyle=("--", ":")[i], color=colour, linewidth=1.2, label=f"{label}: {what}"
                )
    axis.set_ylim(len(sites) - 0.5, -0.5)
    axis.set_xlabel("exponent: floor of log2 of the magnitude")
    axis.set_title(name)
    axis.grid(False)
    _layers(axis, sites, "y")
    bar = figure.colorbar(mesh, ax=axis, pad=0.015, fraction=0.05)
    bar.set_ticks([0, -2, -4, -6], labels=["all", "1e−2", "1e−4", "1e−6"])
    bar.outline.set_visible(False)
    bar.set_label("share of values")
    shared_legend(figure, [axis])
    return Chart(
        key,
        "exponents",
        f"Exponents of {name}",
        "Share of the values of each exponent, each chunk's first token left out; a dot is the largest "
        "exponent of these tokens. Lines are the ends of formats: beyond a largest values are cut, below a "
        "smallest normal number they lose bits.",
        f"A heat map of exponents from {low} to {high} over {len(sites)} sites.",
        figure,
        [
            ["site", "exponent", "values", "share", "first_tokens_largest_exponent"],
            *(
                [plain(site["site"]), exponent, count, count / site["rest"]["values"], first]
                for site, first in zip(sites, firsts, strict=True)
                for exponent, count in site["rest"]["exponents"].items()
            ),
        ],
    )


def _magnitudes(key: str, name: str, sites: list[Site], ink: Ink) -> Chart:
    figure = figure_of(2.5)
    axis = figure.subplots()
    at = range(len(sites))
    lines = {
        "largest": [site["rest"]["largest"] for site in sites],
        "99.9 %": [site["rest"]["percentiles"]["99.9"] for site in sites],
        "median": [site["rest"]["percentiles"]["50"] for site in sites],
        "first tokens' largest": [
            site["first"]["largest"] if site["first"]["rows"] else None for site in sites
        ],
    }
    for i, (label, values) in enumerate(lines.items()):
        there = [(x, v) for x, v in zip(at, values, strict=True) if v]
        if there:
            axis.plot(
                *zip(*there, strict=True),
                "os^D"[i] + "-",
                color=ink.series(i),
                markersize=3,
                linewidth=1,
                label=label,
            )
    value_axis(axis, "y", [v for values in lines.values() for v in values if v], "magnitude", log=True)
    axis.set_title(name)
    _layers(axis, sites, "x")
    shared_legend(figure, [axis])
    largest = max(sites, key=lambda site: max(site["rest"]["largest"], site["first"]["largest"]))
    most = max(largest["rest"]["largest"], largest["first"]["largest"])
    return Chart(
        key,
        "magnitudes",
        f"Magnitudes of {name}",
        f"The largest of all is {most:.4g}, at {largest['site']}.",
        f"Lines by layer; the largest value is {most:.4g} at {largest['site']}.",
        figure,
        [
            ["site", *lines],
            *map(list, zip([plain(site["site"]) for site in sites], *lines.values(), strict=True)),
        ],
    )


def _outliers(key: str, name: str, sites: list[Site], ink: Ink) -> Chart:
    figure = figure_of(2.3)
    axis = figure.subplots()
    tips = {}
    for x, site in enumerate(sites):
        for place, each in enumerate(site["channels"]["outliers"]):
            share = each["tokens"] / max(site["rest"]["rows"], 1)
            (point,) = axis.plot(
                [x],
                [each["times_median"]],
                "o",
                color=ink.s0,
                markersize=2 + 5 * math.sqrt(share),
                alpha=0.75,
            )
            point.set_gid(f"tip-{x}-{place}")
            tips[f"tip-{x}-{place}"] = (
                f"{site['site']}, channel {each['channel']}: up to {each['times_median']:.0f} times the "
                f"median, {each['tokens']} tokens"
            )
    shown = ("channel", "times_median", "tokens")
    ratios = [each["times_median"] for site in sites for each in site["channels"]["outliers"]]
    value_axis(axis, "y", ratios, "largest over median", log=True)
    axis.set_title(name)
    _layers(axis, sites, "x")
    axis.set_xlim(-0.7, len(sites) - 0.3)
    found: dict[int, int] = {}
    for site in sites:
        for each in site["channels"]["outliers"]:
            found[each["channel"]] = found.get(each["channel"], 0) + 1
    often = sorted(found, key=lambda c: (-found[c], c))[:4]
    said = ", ".join(f"{c} ({found[c]} of {len(sites)} sites)" for c in often)
    return Chart(
        key,
        "outliers",
        f"Outlier channels of {name}",
        "How far a channel was over its token's median at most; larger dots are outliers on more tokens. "
        f"Most often: channels {said}.",
        f"Dots by layer; the channels seen most often are {said}.",
        figure,
        [
            ["site", "channel", "largest_over_median", "tokens", "of_tokens"],
            *(
                [plain(site["site"]), *(each[key] for key in shown), site["rest"]["rows"]]
                for site in sites
                for each in site["channels"]["outliers"]
            ),
        ],
        tips,
    )


def _squares(key: str, name: str, sites: list[Site], ink: Ink) -> Chart:
    figure = figure_of(2.3)
    axis = figure.subplots()
    rest = [site["sum_of_squares"]["rest"] for site in sites]
    there = [(x, s["smallest"], s["largest"]) for x, s in enumerate(rest) if s["smallest"]]
    if there:
        places, low, high = zip(*there, strict=True)
        axis.fill_between(places, low, high, color=ink.s0, alpha=0.3, linewidth=0, label="all other tokens")
        axis.plot(places, high, color=ink.s0, linewidth=1)
        axis.plot(places, low, color=ink.s0, linewidth=1)
    firsts = [(x, site["sum_of_squares"]["first"]["largest"]) for x, site in enumerate(sites)]
    firsts = [(x, value) for x, value in firsts if value]
    if firsts:
        axis.plot(*zip(*firsts, strict=True), "D", color=ink.s1, markersize=3, label="first tokens")
    sums = [s["smallest"] for s in rest] + [s["largest"] for s in rest] + [value for _, value in firsts]
    value_axis(axis, "y", [v for v in sums if v], "sum of squares", log=True)
    axis.set_title(name)
    _layers(axis, sites, "x")
    shared_legend(figure, [axis])
    smallest = min((s["smallest"] for s in rest if s["smallest"]), default=0.0)
    largest = max(
        max(site["sum_of_squares"][part]["largest"] for part in ("rest", "first")) for site in sites
    )
    return Chart(
        key,
        "squares",
        f"Sums of squares of {name}",
        f"What the norm's accumulator holds in the end: from {smallest:.4g} to {largest:.4g}.",
        f"A band by layer, from {smallest:.4g} to {largest:.4g}.",
        figure,
        [
            ["site", "smallest", "largest", "first_tokens_largest"],
            *(
                [
                    plain(site["site"]),
                    of["smallest"],
                    of["largest"],
                    site["sum_of_squares"]["first"]["largest"],
                ]
                for site, of in zip(sites, rest, strict=True)
            ),
        ],
    )
