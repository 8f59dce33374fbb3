"""A sweep as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from .charts import charts
from .data import between, plain, significant
from .elsewhere import Elsewhere
from .pages import Part, in_order, pngs_of, render, sections_of
from .provenance import provenance
from .tables import at_a_glance, cell_tables
from .verdict import in_short_and_in_full

SECTIONS = {
    "units": "Steps, units and engines",
    "layers": "KL divergence by layer",
    "heat": "Layer × format",
    "perplexity": "Perplexity ratio",
    "who": "Who pays",
    "elsewhere": "The same cells elsewhere",
    "sites": "Errors and distributions by site",
}


def _norms_alone(data: dict[str, Any]) -> bool:
    """Of values that are no norm's, the points have no name."""
    sites = (site for entry in data["cells"] for site in entry["sites"])
    return all(site["point"] is not None for site in sites)


def report_html(data: dict[str, Any], elsewhere: Elsewhere | None = None, more: Sequence[Part] = ()) -> str:
    """The page; the same for the same figures and the same matplotlib.

    data       `figures` of a stored run, with ``run``, its number, and ``started``
    elsewhere  it beside other runs
    more       parts of other sources

    Raises FqError where matplotlib is missing.
    """
    model = plain(os.path.basename(data["model"]))
    sections = sections_of(_parts(data, elsewhere, more), f"fq-run-{data['run']}")
    first, in_full = in_short_and_in_full(data, elsewhere)
    tables = cell_tables(data)
    entries = [(section["key"], section["title"]) for section in sections]
    entries += [("figures", "All figures")] * bool(tables) + [("provenance", "Provenance")]
    return render(
        "page.html",
        title=f"{model}: what rounding its {'norms' if _norms_alone(data) else 'values'} costs",
        data=data,
        baseline=_baseline(data),
        text=plain(os.path.basename(data.get("text") or "a text")),
        verdict=first,
        in_full=in_full,
        glance=at_a_glance(data) if data["n_chunks"] else None,
        sections=sections,
        entries=entries,
        tables=tables,
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


def pngs(
    data: dict[str, Any], elsewhere: Elsewhere | None = None, more: Sequence[Part] = ()
) -> dict[str, bytes]:
    """Each chart of the page by its file's name, KEY.png, in the light. Raises FqError as `report_html`."""
    return pngs_of(_parts(data, elsewhere, more))


def _parts(data: dict[str, Any], elsewhere: Elsewhere | None, more: Sequence[Part]) -> list[Part]:
    return in_order(Part(partial(charts, data, elsewhere=elsewhere), SECTIONS), more)
