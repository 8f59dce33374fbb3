"""The report's charts of steps, units and profiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .axes import MARKERS, figure_of, value_axis
from .data import Group, between, finite, is_finite, kl_text, kld, kld_interval
from .downloads import CI95, ends
from .svg import Chart, Ink
from .units import name_of

MOST_ROWS = 40  # of a chart; what costs most comes first
EACH_NORM = ", each norm"


def of_norms(group: Group) -> Group | None:
    """The group of a unit in each norm alone, as one whose norms are single cells; None: it is another."""
    if not group.parts or group.parts[0]["kind"] != "norm":
        return None
    return replace(group, name=group.name.removesuffix(EACH_NORM), singles=group.parts, parts=[])


def unit_charts(groups: Sequence[Group], ink: Ink) -> Iterator[Chart]:
    """Of each group of steps, of units, or of profiles."""
    mine = [group for group in groups if group.parts and group.parts[0]["kind"] != "norm"]
    for i, group in enumerate(mine):
        yield _side_by_side(f"units-{i + 1}", group, ink)


def _side_by_side(key: str, group: Group, ink: Ink) -> Chart:
    """A row for each of its parts, for what the rest of a unit costs, and for all together."""
    what = group.parts[0]["kind"]
    together = [group.together] if group.together else []
    known = sorted(filter(is_finite, group.parts), key=kld, reverse=True)
    rest = sorted(filter(is_finite, group.without), key=kld, reverse=True)
    rows = [
        *((entry, ink.s0, MARKERS[0]) for entry in known),
        *((entry, ink.s1, MARKERS[1]) for entry in rest),
        *((entry, ink.s2, MARKERS[2]) for entry in together if is_finite(entry)),
    ]
    left_out, rows = max(len(rows) - MOST_ROWS, 0), rows[:MOST_ROWS]
    figure = figure_of(0.85 + 0.21 * len(rows))
    axis = figure.subplots()
    values, around = [finite(kld(entry)) for entry, *_ in rows], []
    for at, (entry, colour, _) in enumerate(rows):
        if (interval := kld_interval(entry)) is not None:
            axis.plot(interval, [at, at], color=colour, linewidth=2.2, alpha=0.6)
            around += [end for end in interval if end > 0]
    edge = (
        min((value for value in (*values, *around) if value > 0), default=1.0) / 2
    )  # left of all the others
    for at, (entry, colour, marker) in enumerate(rows):
        axis.plot([kld(entry) or edge], [at], marker, color=colour, markersize=4.5)
    value_axis(axis, "x", [*values, *around, *([edge] if 0 in values else [])], "mean KL")
    axis.set_yticks(range(len(rows)), [short(name_of(entry)) for entry, *_ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(True, axis="x")
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0, labelcolor=ink.text)
    said = "; ".join(
        f"{name_of(entry)} {kl_text(kld(entry))} ({between(kld_interval(entry))})" for entry, *_ in rows
    )
    also = "; squares: all steps but one; triangle: all of them" if together else ""
    zero = " What stands at the left edge is exactly 0." if 0 in values else ""
    more = f" {left_out} that cost less are in the table alone." if left_out else ""
    return Chart(
        key,
        "units",
        f"Mean KL divergence by {what}" + ("" if what in ("unit", "profile") else f": {group.name}"),
        f"Circles: each {what}{' alone' if together else ''}{also}. Lines are 95 % intervals over chunks; "
        f"each holds by itself.{zero}{more}",
        f"Mean KL divergence of each {what}: {said}.",
        figure,
        [
            ["cell", "what", "mean_kld", *CI95],
            *(
                [name_of(entry), entry["kind"], value, *ends(kld_interval(entry))]
                for (entry, *_), value in zip(rows, values, strict=True)
            ),
        ],
    )


def short(name: str, most: int = 64) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
