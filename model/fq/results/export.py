"""A sweep's cells as rows of a table: CSV and Parquet, with the same columns."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from ..errors import FqError
from ..words import ascii_safe

ESTIMATE_FIGURES = ("rank", "along", "cross", "blocks", "by_token", "by_element", "gain", "sqnr_db")
TEXTS = {"mark", "name", "kind", "group", "site_kind", "point", "format", "options", "model", "chunk_order"}
INTEGERS = {"rank", "rank_worst", "layer", "n_ctx", "n_chunks", "realisations_n"}
UNSIGNED = {"chunk_seed"}


def rows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per cell: what it rounds, the comparison's single figures, and both ends of its intervals.

    The additivity ratio stands in the row of all sites together. What the sites of a cell do not
    share is None, and SQNR where there are several.
    """
    if "estimate" in data:
        return estimate_rows_of(data)
    run = _run(data)
    groups, rows = {group["name"]: group for group in data["groups"]}, []
    for cell in data["cells"]:
        best, worst = cell.get("rank", (None, None))
        row = {key: cell[key] for key in ("name", "kind", "group")} | _sites(cell["sites"])
        row |= {"rank": best, "rank_worst": worst}
        of_group = groups.get(cell["group"], {}) if cell["kind"] == "together" else {}
        additivity = {key: of_group.get(key) for key in ("additivity", "additivity_ci95_chunks")}
        largest = {"largest_chunk_times_mean": cell["comparison"]["largest_chunk"]["times_mean"]}
        figures = cell["comparison"] | largest | additivity | _realisations(cell.get("realisations"))
        paid = (figures.pop("who_pays", None) or {}).get("top", {})
        figures |= {f"top_{name}_share": paid.get(f"{name}%") for name in ("0.1", "1", "10")}
        for key, value in figures.items():
            if key.endswith(("_ci95_chunks", "_ci95")):
                row[f"{key}_low"], row[f"{key}_high"] = value or (None, None)
            elif not isinstance(value, dict):
                row[key] = value
        sites = cell["sites"]
        rows.append(row | {"sqnr_db": sites[0]["sqnr_db"] if len(sites) == 1 else None} | run)
    return rows


def estimate_rows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an estimate, a row per site and format, with what was measured exactly beside it."""
    run = _run(data)
    exact = {(one["site"], one["format"]): one["exact"] for one in data["verified"]}
    rows = []
    for cell in data["cells"]:
        low, high = cell["mean_kld_ci95"] or (None, None)
        name, _, options = cell["format"].partition(":")
        row = {"name": f"{cell['site']}={cell['format']}", "site_kind": cell["kind"], "format": name}
        row |= {"options": options, "layer": cell["layer"], "point": cell["point"]}
        row |= {"mean_kld": cell["mean_kld"], "mean_kld_ci95_low": low, "mean_kld_ci95_high": high}
        row |= {key: cell[key] for key in ESTIMATE_FIGURES}
        rows.append(row | {"exact": exact.get((cell["site"], cell["format"])), "mark": cell["mark"]} | run)
    return rows


def _run(data: dict[str, Any]) -> dict[str, Any]:
    """What all rows share. A file's name need be neither UTF-8 nor printable."""
    run = {"model": ascii_safe(os.path.basename(data["model"]))}
    keys = ("n_ctx", "n_chunks", "chunk_order", "chunk_seed")
    return run | {key: data[key] for key in keys if key in data}


def _realisations(found: dict[str, Any] | None) -> dict[str, Any]:
    keys = ("n", "ln_ppl_ratio", "ln_ppl_ratio_ci95", "p_adjusted")
    return {f"realisations_{key}": (found or {}).get(key) for key in keys}


def _sites(sites: list[dict[str, Any]]) -> dict[str, Any]:
    """What the sites of a cell have in common; ``options`` as a rule writes them, the mode among them."""
    found: list[dict[str, Any]] = []
    for site in sites:
        name, _, options = site["format"].partition(":")
        mode = [] if site["mode"] == "every" else [site["mode"]]
        texts = {"format": name, "options": ",".join([*filter(None, [options]), *mode])}
        found.append({"site_kind": site["kind"], "layer": site["layer"], "point": site["point"]} | texts)
    keys = ("site_kind", "layer", "point", "format", "options")
    values = {key: {one[key] for one in found} for key in keys}
    return {key: next(iter(those)) if len(those) == 1 else None for key, those in values.items()}


def csv_text(data: dict[str, Any]) -> str:
    rows, out = rows_of(data), io.StringIO()
    if rows:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def need_pyarrow() -> None:
    """Raises FqError naming what to install."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise FqError("--parquet needs the package pyarrow: pip install pyarrow") from None


def parquet_bytes(data: dict[str, Any]) -> bytes:
    """A Parquet file. Texts are strings, ranks and counts integers, figures float64; None is null."""
    import pyarrow
    from pyarrow import parquet

    rows = rows_of(data)

    def type_of(key: str) -> Any:
        if key in TEXTS:
            return pyarrow.string()
        if key in UNSIGNED:
            return pyarrow.uint64()
        return pyarrow.int64() if key in INTEGERS else pyarrow.float64()

    schema = pyarrow.schema([(key, type_of(key)) for key in (rows[0] if rows else ())])
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), out)
    return out.getvalue()
