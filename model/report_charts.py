"""The report's charts. Each function draws one; `charts` says which a run has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .report_data import (
    Entry,
    Group,
    Interval,
    between,
    groups_of,
    kind_of,
    kld,
    kld_interval,
    number,
    plain,
    ppl_change,
    ppl_interval,
    signed,
    significant,
    site_of,
    sites_text,
)
from .report_svg import Chart, Ink

WIDTH = 9.2  # inches
PANELS = 8  # at most so many in one chart: more do not fit on a printed page
LOG_FROM = 25.0  # largest over smallest from which an axis is logarithmic
MARKERS = "os^Dv*PX"


def charts(data: dict[str, Any], ink: Ink) -> Iterator[Chart]:
    """One after another, each to be written within `report_svg.style` before the next is drawn."""
    groups = [group for group in groups_of(data) if group.singles]
    formats = [group for group in groups if not group.is_noise]
    if len([group for group in groups if group.whole]) > 1:
        yield _together([group for group in groups if group.whole], ink)
    for i, group in enumerate(formats):
        yield _by_layer(f"layers-{i + 1}", group, ink)
        if group.cumulative:
            yield _cumulative(f"cumulative-{i + 1}", group, ink)
    yield _heat_map(groups, ink)
    for i, page in enumerate(_pages(formats)):
        yield _perplexity(f"perplexity-{i + 1}", page, ink)
    kinds = dict.fromkeys(kind for group in formats for kind in group.kinds)
    for i, kind in enumerate(kinds):
        yield _errors(f"errors-{i + 1}", kind, formats, ink)
    panels = [(group, kind) for group in groups for kind in group.kinds]
    for i, part in enumerate(_pages(panels)):
        yield _distributions(f"distribution-{i + 1}", part, ink)


def _pages(panels: Sequence[Any]) -> list[Any]:
    return [panels[i : i + PANELS] for i in range(0, len(panels), PANELS)]


# ---------------------------------------------------------------- parts


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _panels(n: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """n axes, two side by side; one alone takes the width."""
    columns = min(n, 2)
    rows = math.ceil(n / columns)
    figure = _figure(rows * height)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[n:]:
        axis.remove()
    return figure, list(axes[:n])


def _positions(groups: Sequence[Group]) -> dict[int | None, int]:
    """Where a layer stands on the axis; output_norm, which has none, after a gap."""
    layers = {site_of(entry)[1] for group in groups for entry in group.singles}
    known = sorted(layer for layer in layers if layer is not None)
    places: dict[int | None, int] = {layer: layer for layer in known}
    if None in layers:
        places[None] = known[-1] + 2 if known else 0
    return places


def _layer_axis(axis: Any, places: dict[int | None, int], more: Sequence[tuple[float, str]] = ()) -> None:
    known = [layer for layer in places if layer is not None]
    # as many labels as there is room for
    points = axis.get_position().width * WIDTH * 72
    step = next((s for s in (1, 2, 5, 10, 20, 50) if len(known) / s * 17 <= points), 100)
    ticks: list[tuple[float, str]] = [(layer, str(layer)) for layer in known if not layer % step]
    if None in places:
        ticks.append((places[None], "out"))
    ticks += more
    axis.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
    axis.set_xlabel("layer")
    ends = [*places.values(), *(at for at, _ in more)]
    axis.set_xlim(min(ends) - 0.7, max(ends) + 0.7)
    axis.tick_params(axis="x", length=0)


def _tick(value: float, _: int = 0) -> str:
    text = f"{value:g}".replace("e-0", "e-").replace("e+0", "e")
    return f"−{text[1:]}" if text.startswith("-") else text


def _value_axis(axis: Any, which: str, values: Sequence[float], what: str, *, log: bool | None = None) -> bool:
    """Name and scale an axis for ``values``; returns whether it is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [v for v in values if math.isfinite(v) and v > 0]
    if log is None:
        log = bool(positive) and max(positive) / min(positive) > LOG_FROM
    log = log and bool(positive)
    if log:
        getattr(axis, f"set_{which}scale")("log")
        low, high = math.log10(min(positive)), math.log10(max(positive))
        pad = 0.06 * (high - low) + 0.05
        getattr(axis, f"set_{which}lim")(10 ** (low - pad), 10 ** (high + pad))
    of = getattr(axis, f"{which}axis")
    if log:
        of.set_major_locator(LogLocator(subs=(1,) if high - low > 1.5 else (1, 2, 5)))
        of.set_minor_formatter(NullFormatter())
    of.set_major_formatter(FuncFormatter(_tick))
    getattr(axis, f"set_{which}label")(f"{what}, log scale" if log else what)
    return log


def _whiskers(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]]:
    """Lengths below and above, 0 where there is no interval."""
    return [
        [0.0 if i is None else max(v - i[0], 0.0) for v, i in zip(values, intervals, strict=True)],
        [0.0 if i is None else max(i[1] - v, 0.0) for v, i in zip(values, intervals, strict=True)],
    ]


def _legend(axis: Any, n: int) -> None:
    if n > 1:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=min(n, 6), borderaxespad=0.1, fontsize=7.5)


def _series(group: Group) -> list[tuple[str, Sequence[Entry], int | None]]:
    """(label, cells, colour) of a group's kinds and of the noise beside them, which has no colour."""
    several = len(group.kinds) > 1

    def of_kind(of: Group, kind: str) -> list[Entry]:
        return [entry for entry in of.singles if kind_of(entry) == kind]

    found: list[tuple[str, Sequence[Entry], int | None]] = []
    for i, kind in enumerate(group.kinds):
        found.append((f"{kind} " * several + plain(group.spec), of_kind(group, kind), i))
        if group.noise:
            found.append((f"{kind} " * several + "noise of the same length", of_kind(group.noise, kind), None))
    return found


def _extremes(entries: Sequence[Entry]) -> str:
    ordered = sorted(entries, key=lambda entry: -kld(entry) if math.isfinite(kld(entry)) else -math.inf)

    def one(entry: Entry) -> str:
        interval = kld_interval(entry)
        around = "" if interval is None else f" ({between(interval)})"
        return f"{significant(kld(entry))}{around} at {sites_text([entry])}"

    return f"largest {one(ordered[0])}, smallest {one(ordered[-1])}"


# ---------------------------------------------------------------- KL


def _together(groups: Sequence[Group], ink: Ink) -> Chart:
    figure = _figure(0.75 + 0.24 * len(groups))
    axis = figure.subplots()
    wholes = [group.whole for group in groups if group.whole]
    values = [kld(entry) for entry in wholes]
    intervals = [kld_interval(entry) for entry in wholes]
    places = list(range(len(groups)))
    for group, at, value, interval in zip(groups, places, values, intervals, strict=True):
        colour = ink.muted if group.is_noise else ink.s0
        axis.plot([value], [at], "D" if group.is_noise else "o", color=colour, markersize=4.5)
        if interval is not None:
            axis.plot(interval, [at, at], color=colour, linewidth=2.2, alpha=0.6)
    _value_axis(axis, "x", [*values, *(end for i in intervals if i for end in i)], "mean KL divergence")
    axis.set_yticks(places, [plain(group.name) for group in groups])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(True, axis="x")
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0, labelcolor=ink.text)
    figures = "; ".join(
        f"{plain(group.name)} {significant(value)} ({between(interval)})"
        for group, value, interval in zip(groups, values, intervals, strict=True)
    )
    return Chart(
        "together",
        "layers",
        "Mean KL divergence, all sites of a group together",
        "A point and its 95 % interval for each group.",
        f"Mean KL divergence of each group with all its sites rounded together: {figures}.",
        figure,
    )


def _by_layer(key: str, group: Group, ink: Ink) -> Chart:
    figure = _figure(2.5)
    axis = figure.subplots()
    places = _positions([group])
    series = _series(group)
    width = 0.8 / len(series)
    tips, everything = {}, []
    for j, (label, entries, colour) in enumerate(series):
        at = [places[site_of(entry)[1]] + (j - (len(series) - 1) / 2) * width for entry in entries]
        values = [kld(entry) for entry in entries]
        intervals = [kld_interval(entry) for entry in entries]
        fill = ink.muted if colour is None else ink.series(colour)
        bars = axis.bar(
            at,
            values,
            width * 0.92,
            label=label,
            color="none" if colour is None else fill,
            edgecolor=fill,
            linewidth=0.7 if colour is None else 0,
            hatch="////" if colour is None else None,
        )
        if any(intervals):
            axis.errorbar(
                at, values, _whiskers(values, intervals), fmt="none", ecolor=ink.text, elinewidth=0.8, capsize=1.2
            )
        for i, (bar, entry) in enumerate(zip(bars, entries, strict=True)):
            bar.set_gid(f"tip-{j}-{i}")
            tips[f"tip-{j}-{i}"] = (
                f"{plain(entry['name'])}: mean KL {significant(kld(entry), 4)}, {between(kld_interval(entry))}"
            )
        everything += [v for v in values if v > 0] + [end for i in intervals if i for end in i if end > 0]
    log = _value_axis(axis, "y", everything, "mean KL divergence")
    _layer_axis(axis, places)
    axis.set_title(plain(group.name))
    _legend(axis, len(series))
    first = [entry for entry in group.singles if entry.get("rank", [0])[0] == 1]
    shared = "First place: " + sites_text(first) if 0 < len(first) < len(group.singles) else "No site stands out"
    return Chart(
        key,
        "layers",
        f"Mean KL divergence by layer: {plain(group.name)}",
        f"Each bar rounds one site alone; lines are 95 % intervals over chunks. {shared}."
        + (" The scale is logarithmic: bars have no zero." if log else ""),
        f"Bars of the mean KL divergence of each site of {plain(group.name)} rounded alone: "
        f"{_extremes(group.singles)}. {shared}. "
        + (f"Noise of the same length beside them: {_extremes(group.noise.singles)}." if group.noise else ""),
        figure,
        tips,
    )


def _cumulative(key: str, group: Group, ink: Ink) -> Chart:
    figure = _figure(2.3)
    axis = figure.subplots()
    cells = [group.singles[0], *group.cumulative, *([group.together] if group.together else [])]
    at = [len(entry["sites"]) for entry in cells]
    values = [kld(entry) for entry in cells]
    single, sums = [kld(entry) for entry in group.singles], []
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
    _value_axis(axis, "y", [*values, *sums], "mean KL divergence", log=False)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sites rounded, from the first on")
    axis.set_title(plain(group.name))
    _legend(axis, 2)
    return Chart(
        key,
        "layers",
        f"Mean KL divergence of the first sites together: {plain(group.name)}",
        "The first sites up to each, with the 95 % interval, and what the single ones add up to.",
        f"A line from {significant(values[0])} with one site to {significant(values[-1])} with {at[-1]}; the "
        f"single ones add up to {significant(sums[-1])}.",
        figure,
    )


def _heat_map(groups: Sequence[Group], ink: Ink) -> Chart:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, NullFormatter

    places = _positions(groups)
    rows = [(group, kind) for group in groups for kind in group.kinds]
    several = len({kind for _, kind in rows}) > 1
    values = [kld(entry) for group in groups for entry in group.singles]
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    low, high = min(positive), max(positive)
    norm = LogNorm(low, high if high > low else 2 * low)
    colours = colormaps["cividis"]
    figure = _figure(0.85 + 0.23 * len(rows))
    axis = figure.subplots()
    tips = {}
    for y, (group, kind) in enumerate(rows):
        for entry in group.singles:
            if kind_of(entry) != kind:
                continue
            x, value = places[site_of(entry)[1]], kld(entry)
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
            tips[f"tip-{y}-{x}"] = f"{plain(entry['name'])}: mean KL {significant(value, 4)}"
            axis.add_patch(cell)
            if entry.get("rank", [0])[0] == 1 and ok and len(group.singles) > 1:
                axis.plot([x], [y], "o", markersize=3.2, color="white" if norm(value) < 0.55 else "black")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_yticks(
        range(len(rows)),
        [f"{kind} " * several + plain(group.spec) for group, kind in rows],
    )
    _layer_axis(axis, places)
    axis.set_xlim(min(places.values()) - 0.5, max(places.values()) + 0.5)
    axis.tick_params(axis="y", length=0, labelcolor=ink.text)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(norm, colours.resampled(32)), ax=axis, pad=0.015, aspect=max(6, 4 * len(rows)), fraction=0.05
    )
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_tick))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)
    bar.set_label("mean KL")
    found = "; ".join(f"{plain(group.name)}: {_extremes(group.singles)}" for group in groups)
    return Chart(
        "heat-map",
        "heat",
        "Mean KL divergence, layer × format",
        "Brighter is worse, on a logarithmic scale. A dot marks the first place of each group, several dots a "
        "place that is shared.",
        f"A heat map of the mean KL divergence of each site alone. {found}.",
        figure,
        tips,
    )


# ---------------------------------------------------------------- perplexity


def _perplexity(key: str, groups: Sequence[Group], ink: Ink) -> Chart:
    figure, axes = _panels(len(groups), 2.0)
    said = []
    for axis, group in zip(axes, groups, strict=True):
        places = _positions([group])
        series = _series(group)
        wholes: list[tuple[Entry | None, int | None]] = [(group.together, 0)]
        if group.noise:
            wholes.append((group.noise.together, None))
        end = max(places.values()) + 2
        axis.axhline(0, color=ink.muted, linewidth=0.9)
        for j, (label, entries, colour) in enumerate(series):
            shift = (j - (len(series) - 1) / 2) * 0.8 / len(series)
            points = [(places[site_of(entry)[1]] + shift, entry) for entry in entries]
            _dots(axis, points, colour, ink, label)
        for j, (whole, colour) in enumerate(wholes):
            if whole is not None:
                _dots(axis, [(end + (j - (len(wholes) - 1) / 2) * 0.5, whole)], colour, ink, None)
        _value_axis(axis, "y", [], "change of PPL, %", log=False)
        _layer_axis(axis, places, [(end, "all")] if group.together else [])
        axis.set_title(plain(group.name), pad=12 if len(series) > 1 else None)
        if len(series) > 1:
            axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=4, fontsize=7, handletextpad=0.1,
                        columnspacing=0.9, borderpad=0)  # fmt: skip
        if group.whole:
            said.append(
                f"{plain(group.name)} {signed(ppl_change(group.whole))} % "
                f"({between(ppl_interval(group.whole), signed)})"
            )
    return Chart(
        key,
        "perplexity",
        "Perplexity ratio by layer",
        "Change of the perplexity against the unrounded model, (ratio − 1) in %, with 95 % intervals over chunks; "
        "one that crosses the line at 0 resolves no change. Each panel has a scale of its own.",
        f"Change of the perplexity by layer, with intervals. All together: {'; '.join(said)}.",
        figure,
    )


def _dots(
    axis: Any, points: Sequence[tuple[float, Entry]], colour: int | None, ink: Ink, label: str | None
) -> None:
    at, entries = [x for x, _ in points], [entry for _, entry in points]
    values = [ppl_change(entry) for entry in entries]
    fill = ink.muted if colour is None else ink.series(colour)
    axis.errorbar(
        at,
        values,
        _whiskers(values, [ppl_interval(entry) for entry in entries]),
        fmt="D" if colour is None else MARKERS[colour % len(MARKERS)],
        color=fill,
        markersize=2.2 if colour is None else 3,
        elinewidth=1,
        label=label,
    )


# ---------------------------------------------------------------- sites


def _share(site: dict[str, Any], count: str) -> float:
    return 100 * number(site[count]) / site["elements"] if site["elements"] else math.nan


_ERRORS: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("SQNR, dB", lambda site: number(site["sqnr_db"])),
    ("largest |error|", lambda site: number(site["max_abs_error"])),
    ("mean |error|", lambda site: number(site["mean_abs_error"])),
    ("bias: mean error", lambda site: number(site["mean_error"])),
    ("out of range, % of elements", lambda site: _share(site, "out_of_range")),
    ("changed, % of elements", lambda site: _share(site, "changed")),
)


def _errors(key: str, kind: str, groups: Sequence[Group], ink: Ink) -> Chart:
    mine = [group for group in groups if kind in group.kinds]
    places = _positions(mine)
    figure, axes = _panels(len(_ERRORS), 1.75)
    said = []
    names = [group.name if len({g.sites for g in mine}) > 1 else group.spec for group in mine]
    for axis, (what, figure_of) in zip(axes, _ERRORS, strict=True):
        everything = []
        for i, group in enumerate(mine):
            entries = [entry for entry in group.singles if kind_of(entry) == kind]
            values = [figure_of(entry["sites"][0]) for entry in entries]
            axis.plot(
                [places[site_of(entry)[1]] for entry in entries],
                values,
                marker=MARKERS[i % len(MARKERS)],
                color=ink.series(i),
                markersize=2.8,
                linewidth=0.9,
                label=plain(names[i]),
            )
            known = [value for value in values if math.isfinite(value)]
            everything += known
            if what.startswith("SQNR") and known:
                said.append(f"{plain(names[i])} {significant(min(known))} to {significant(max(known))} dB")
        if what.startswith("bias"):
            axis.axhline(0, color=ink.muted, linewidth=0.9)
        spread = "error|" in what and all(value > 0 for value in everything)
        _value_axis(axis, "y", everything, "", log=None if spread else False)
        if not what.startswith(("bias", "SQNR")) and axis.get_yscale() == "linear":
            axis.set_ylim(0, 1.08 * max(everything, default=0) or 1)
        axis.set_title(what + (", log scale" if axis.get_yscale() == "log" else ""))
        axis.set_ylabel("")
        _layer_axis(axis, places)
    if len(mine) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(mine), 6), fontsize=7.5)
    return Chart(
        key,
        "sites",
        f"Rounding errors by layer: {kind}",
        "Of each site rounded alone, counted over every element that passed it. SQNR: signal over rounding error.",
        f"Small panels of the rounding error at each {kind} by layer. SQNR: {'; '.join(said) or 'none'}.",
        figure,
    )


def _distributions(key: str, panels: Sequence[tuple[Group, str]], ink: Ink) -> Chart:
    figure, axes = _panels(len(panels), 2.0, sharey=True)
    names = ("max", "99.9%", "99%", "90%", "median", "10%", "1%")
    found = {
        (group.name, kind): [
            (site_of(entry)[1], {name: number(entry["comparison"]["kld"][name]) for name in names})
            for entry in group.singles
            if kind_of(entry) == kind
        ]
        for group, kind in panels
    }
    positive = [v for cells in found.values() for _, kl in cells for v in kl.values() if v > 0]
    floor = min((v for v in positive if math.isfinite(v)), default=1e-12)
    said = []
    for axis, (group, kind) in zip(axes, panels, strict=True):
        places, cells = _positions([group]), found[group.name, kind]
        at = [places[layer] for layer, _ in cells]
        colour = ink.muted if group.is_noise else ink.s0

        def of(name: str, cells: Any = cells) -> list[float]:
            return [max(kl[name], floor) for _, kl in cells]

        axis.vlines(at, of("1%"), of("99%"), color=colour, linewidth=0.9)
        axis.vlines(at, of("10%"), of("90%"), color=colour, linewidth=3.2)
        axis.plot(at, of("median"), "_", color=ink.ground, markersize=4, markeredgewidth=1.4)
        axis.plot(at, of("99.9%"), "_", color=ink.text, markersize=3.5, markeredgewidth=0.9)
        axis.plot(at, of("max"), "x", color=ink.text, markersize=2.4, markeredgewidth=0.7)
        _value_axis(axis, "y", [*positive], "KL of a token", log=True)
        _layer_axis(axis, places)
        axis.set_title(plain(group.name) + (f": {kind}" if len(group.kinds) > 1 else ""))
        medians = [kl["median"] for _, kl in cells]
        said.append(f"{plain(group.name)} {kind} {significant(min(medians))} to {significant(max(medians))}")
    return Chart(
        key,
        "sites",
        "Distribution of the KL divergence over tokens",
        "Of each site alone: thick 10–90 %, the gap in it the median, thin 1–99 %, dash 99.9 %, cross the largest. "
        "All panels share one logarithmic scale.",
        f"Percentiles of the KL divergence of single tokens, by layer. Medians: {'; '.join(said)}.",
        figure,
    )
