"""What the report's charts are made of: axes by layer, scales, series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .data import (
    Control,
    Entry,
    Group,
    Interval,
    between,
    kind_of,
    kl_text,
    kld,
    kld_interval,
    minus,
    site_of,
)
from .svg import Ink

WIDTH = 9.2  # inches
MARKERS = "os^Dv*PX"
FEWEST = 8  # layers that an axis has room for at least: one bar alone is no wall
LOG_FROM = 25.0  # largest over smallest from which an axis is logarithmic


def figure_of(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def panels_of(n: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """n axes, two side by side; one alone takes the width."""
    columns = min(n, 2)
    rows = math.ceil(n / columns)
    figure = figure_of(rows * height)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[n:]:
        axis.remove()
    return figure, list(axes[:n])


# what has no layer
EMBEDDING, OUTPUT = "emb", "out"
OUTSIDE = {EMBEDDING: "inp_embd", OUTPUT: "output_norm"}
Places = dict[int | str, int]


def layer_of(entry: Entry) -> int | str:
    """Of a single cell's site, or what stands for it where it is in none."""
    kind, layer, _ = site_of(entry)
    if layer is not None:
        return layer
    return EMBEDDING if kind == OUTSIDE[EMBEDDING] else OUTPUT


def positions(groups: Sequence[Group]) -> Places:
    """Where a layer stands on the axis; what is in none, before the first or after the last, beyond a gap."""
    layers = {layer_of(entry) for group in groups for entry in group.singles}
    known = sorted(layer for layer in layers if isinstance(layer, int))
    places: Places = {layer: layer for layer in known}
    if EMBEDDING in layers:
        places[EMBEDDING] = known[0] - 2 if known else 0
    if OUTPUT in layers:
        places[OUTPUT] = known[-1] + 2 if known else 2 * (EMBEDDING in layers)
    return places


def layer_axis(axis: Any, places: Places, more: Sequence[tuple[float, str]] = ()) -> None:
    known = [layer for layer in places if isinstance(layer, int)]
    # as many labels as there is room for
    points = axis.get_position().width * WIDTH * 72
    span = known[-1] - known[0] + 1 if known else 1
    step = next((s for s in (1, 2, 5, 10, 20, 50) if span / s * 17 <= points), 100)
    ticks: list[tuple[float, str]] = [(layer, str(layer)) for layer in known if not layer % step]
    ticks += [(at, layer) for layer, at in places.items() if isinstance(layer, str)]
    ticks += more
    axis.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
    axis.set_xlabel("layer")
    ends = [*places.values(), *(at for at, _ in more)]
    pad = max(0.7, (FEWEST - (max(ends) - min(ends))) / 2)
    axis.set_xlim(min(ends) - pad, max(ends) + pad)
    axis.tick_params(axis="x", length=0)


def tick(value: float, at: int = 0) -> str:
    """``0.5``, ``2e-4``"""
    text = f"{value:.6g}"
    if value and not 1e-2 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.5e}".partition("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return minus(text)


def value_axis(axis: Any, which: str, values: Sequence[float], what: str, *, log: bool | None = None) -> bool:
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
        of.set_major_locator(LogLocator(subs=_subs(high - low)))
        of.set_minor_formatter(NullFormatter())
    of.set_major_formatter(FuncFormatter(tick))
    getattr(axis, f"set_{which}label")(f"{what}, log scale" if log else what)
    return log


def _subs(decades: float) -> tuple[int, ...]:
    if decades > 2.5:
        return (1,)
    return (1, 3) if decades > 1.2 else (1, 2, 5)


def whiskers(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]]:
    """Lengths below and above, 0 where there is no interval."""
    return [
        [0.0 if i is None else max(v - i[0], 0.0) for v, i in zip(values, intervals, strict=True)],
        [0.0 if i is None else max(i[1] - v, 0.0) for v, i in zip(values, intervals, strict=True)],
    ]


def legend(axis: Any) -> None:
    """Above the axis, where there is more than one series to tell apart."""
    handles, labels = _by_label([axis])
    if len(labels) > 1:
        # many would reach the title, on the left: above it then
        y = 1 if len(labels) <= 4 else 1.1
        axis.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, y), ncols=6, borderaxespad=0.1)


def shared_legend(figure: Any, axes: Sequence[Any]) -> None:
    """Above all panels, a series of the same name once."""
    handles, labels = _by_label(axes)
    if len(labels) > 1:
        fit = int(WIDTH * 72 / (5 * max(map(len, labels)) + 45))
        figure.legend(handles, labels, loc="outside upper left", ncols=max(1, min(fit, len(labels))))


def _by_label(axes: Sequence[Any]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


@dataclass(frozen=True)
class Series:
    """Cells that are drawn alike: of a kind, in the page's ``colour``, or of a control, muted."""

    label: str
    entries: Sequence[Entry]
    colour: int | None
    control: Control | None = None

    def fill(self, ink: Ink) -> str:
        return ink.muted if self.colour is None else ink.series(self.colour)

    @property
    def marker(self) -> str:
        return self.control.marker if self.control else MARKERS[(self.colour or 0) % len(MARKERS)]


def series_of(group: Group, kinds: Sequence[str]) -> list[Series]:
    """Each of its kinds and the controls beside it.

    kinds  in the order of the colours
    """

    def of_kind(of: Group, kind: str) -> list[Entry]:
        return [entry for entry in of.singles if kind_of(entry) == kind]

    found = []
    for kind in group.kinds:
        label = kind if len(kinds) > 1 else "rounded"
        found.append(Series(label, of_kind(group, kind), kinds.index(kind)))
        for control, beside in group.controls:
            found.append(Series(control.label, of_kind(beside, kind), None, control))
    return found


def extremes(group: Group) -> str:
    ordered = sorted(group.singles, key=lambda entry: -kld(entry) if math.isfinite(kld(entry)) else -math.inf)

    def one(entry: Entry) -> str:
        interval = kld_interval(entry)
        around = "" if interval is None else f" ({between(interval)})"
        return f"{kl_text(kld(entry))}{around} at {group.text([entry])}"

    return f"largest {one(ordered[0])}, smallest {one(ordered[-1])}"
