"""A sweep's cells as rows of a table: CSV and Parquet, with the same columns."""

from __future__ import annotations

import csv
import io
from typing import Any

from .errors import FqError

INTEGERS, TEXTS = {"rank", "rank_worst"}, {"name", "kind", "group"}


def rows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per cell: the comparison's single figures, and both ends of its intervals.

    The additivity ratio stands in the row of all sites together.
    """
    groups, rows = {group["name"]: group for group in data["groups"]}, []
    for cell in data["cells"]:
        best, worst = cell.get("rank", (None, None))
        row = {key: cell[key] for key in ("name", "kind", "group")} | {"rank": best, "rank_worst": worst}
        of_group = groups.get(cell["group"], {}) if cell["kind"] == "together" else {}
        additivity = {key: of_group.get(key) for key in ("additivity", "additivity_ci95_chunks")}
        for key, value in (cell["comparison"] | additivity).items():
            if key.endswith("_ci95_chunks"):
                row[f"{key}_low"], row[f"{key}_high"] = value or (None, None)
            elif not isinstance(value, dict):
                row[key] = value
        rows.append(row)
    return rows


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
    """A Parquet file. Texts are strings, ranks int64, figures float64; what is missing is null."""
    import pyarrow
    from pyarrow import parquet

    rows = rows_of(data)

    def type_of(key: str) -> Any:
        if key in TEXTS:
            return pyarrow.string()
        return pyarrow.int64() if key in INTEGERS else pyarrow.float64()

    schema = pyarrow.schema([(key, type_of(key)) for key in (rows[0] if rows else ())])
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), out)
    return out.getvalue()
