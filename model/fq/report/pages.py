"""What the report's pages share: the templates, sections of figures, and the same figures as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import svg
from .downloads import csv_url, svg_url
from .svg import Chart, Ink

Charts = Callable[[Ink], Iterable[Chart]]  # one after another: each is written before the next is drawn
Section = dict[str, Any]


def render(template: str, **what: Any) -> str:
    """One of the templates beside this module, filled in and escaped; ``sections`` as of `sections_of`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [each["chart"] for section in what["sections"] for each in section["charts"]]
    return environment.get_template(template).render(
        light=svg.LIGHT,
        dark=svg.DARK,
        n_series=max((len(chart.series) for chart in drawn), default=0),
        **what,
    )


@dataclass(frozen=True)
class Part:
    """Of a page: sections that come from one source.

    titles  by the key of a chart's section, in order
    lines   what is said of a section before its charts
    leads   whether it comes before what the page is of
    """

    charts: Charts
    titles: Mapping[str, str]
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    leads: bool = False


def in_order(own: Part, more: Iterable[Part]) -> list[Part]:
    more = list(more)
    return [*(part for part in more if part.leads), own, *(part for part in more if not part.leads)]


def sections_of(parts: Iterable[Part], stem: str) -> list[Section]:
    """Of a page, those that have a chart.

    stem  what the names of downloaded files begin with

    Raises FqError where matplotlib is missing.
    """
    found: list[Section] = []
    for part in parts:
        drawn: dict[str, list[dict[str, Any]]] = {key: [] for key in part.titles}
        with svg.style(svg.FOR_PAGE):
            for chart in part.charts(svg.FOR_PAGE):
                drawn[chart.section].append(_figure(chart, f"{stem}-{chart.key}"))
        found += [
            {"key": key, "title": title, "lines": part.lines.get(key, ()), "charts": drawn[key]}
            for key, title in part.titles.items()
            if drawn[key]
        ]
    return found


def _figure(chart: Chart, name: str) -> dict[str, Any]:
    from markupsafe import Markup

    text = svg.svg(chart)
    return {
        "chart": chart,
        "svg": Markup(text),  # matplotlib and ElementTree have escaped what stands in it
        "name": name,
        # these have no < > & or double quote
        "svg_url": Markup(svg_url(text)),
        "csv_url": Markup(csv_url(chart.data)),
    }


def pngs_of(parts: Iterable[Part]) -> dict[str, bytes]:
    """Each chart by its file's name, KEY.png, in the light. Raises FqError where matplotlib is missing."""
    found = {}
    with svg.style(svg.FOR_PNG):
        for part in parts:
            for chart in part.charts(svg.FOR_PNG):
                found[f"{chart.key}.png"] = svg.png(chart)
    return found
