"""A sweep as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import svg
from .charts import charts
from .data import between, plain, significant
from .elsewhere import Elsewhere
from .tables import at_a_glance, cell_tables, provenance
from .verdict import verdict

SECTIONS = {
    "units": "Steps, units and engines",
    "layers": "KL divergence by layer",
    "heat": "Layer × format",
    "perplexity": "Perplexity ratio",
    "who": "Who pays",
    "elsewhere": "The same cells elsewhere",
    "sites": "Errors and distributions by site",
}


def render(template: str, **what: Any) -> str:
    """One of the templates beside this module, filled in and escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(light=svg.LIGHT, dark=svg.DARK, **what)


def _norms_alone(data: dict[str, Any]) -> bool:
    """Of values that are no norm's, the points have no name."""
    sites = (site for entry in data["cells"] for site in entry["sites"])
    return all(site["point"] is not None for site in sites)


def report_html(data: dict[str, Any], elsewhere: Elsewhere | None = None) -> str:
    """The page; the same for the same figures and the same matplotlib.

    data       `figures` of a stored run, with ``run``, its number, and ``started``
    elsewhere  it beside other runs

    Raises FqError where matplotlib is missing.
    """
    model = plain(os.path.basename(data["model"]))
    return render(
        "page.html",
        title=f"{model}: what rounding its {'norms' if _norms_alone(data) else 'values'} costs",
        data=data,
        baseline=_baseline(data),
        text=plain(os.path.basename(data.get("text") or "a text")),
        verdict=verdict(data, elsewhere),
        glance=at_a_glance(data) if data["n_chunks"] else None,
        sections=_sections(data, elsewhere),
        tables=cell_tables(data),
        provenance=provenance(data),
        command=plain(data.get("command") or ""),
    )


def _baseline(data: dict[str, Any]) -> str:
    """The unrounded model's perplexity with its interval over chunks."""
    if not data["n_chunks"]:
        return ""
    interval = data.get("ppl_base_ci95_chunks")
    around = f" ({between(interval, lambda x: significant(x, 4))})" if interval else ""
    return significant(data["ppl_base"], 6) + around


def _sections(data: dict[str, Any], elsewhere: Elsewhere | None) -> list[dict[str, Any]]:
    from markupsafe import Markup

    drawn: Mapping[str, list[dict[str, Any]]] = {key: [] for key in SECTIONS}
    with svg.style(svg.FOR_PAGE):
        for chart in charts(data, svg.FOR_PAGE, elsewhere):
            # matplotlib and ElementTree have escaped what stands in it
            drawn[chart.section].append({"chart": chart, "svg": Markup(svg.svg(chart))})
    return [
        {"key": key, "title": title, "charts": drawn[key]} for key, title in SECTIONS.items() if drawn[key]
    ]


def pngs(data: dict[str, Any], elsewhere: Elsewhere | None = None) -> dict[str, bytes]:
    """Each chart of the page by its file's name, KEY.png, in the light. Raises FqError as `report_html`."""
    found = {}
    with svg.style(svg.FOR_PNG):
        for chart in charts(data, svg.FOR_PNG, elsewhere):
            found[f"{chart.key}.png"] = svg.png(chart)
    return found
