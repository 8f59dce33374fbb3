"""What the report's pages share: the templates, sections of figures, and the same figures as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


def sections_of(charts: Charts, titles: Mapping[str, str], stem: str) -> list[Section]:
    """Of a page, in the order of titles, those that have a chart.

    titles  by the key of a chart's section
    stem    what the names of downloaded files begin with

    Raises FqError where matplotlib is missing.
    """
    drawn: dict[str, list[dict[str, Any]]] = {key: [] for key in titles}
    with svg.style(svg.FOR_PAGE):
        for chart in charts(svg.FOR_PAGE):
            drawn[chart.section].append(_figure(chart, f"{stem}-{chart.key}"))
    return [{"key": key, "title": title, "charts": drawn[key]} for key, title in titles.items() if drawn[key]]


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


def pngs_of(charts: Charts) -> dict[str, bytes]:
    """Each chart by its file's name, KEY.png, in the light. Raises FqError where matplotlib is missing."""
    found = {}
    with svg.style(svg.FOR_PNG):
        for chart in charts(svg.FOR_PNG):
            found[f"{chart.key}.png"] = svg.png(chart)
    return found
