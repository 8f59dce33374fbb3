"""The tables of an estimate's page."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from fq_kernels import get_format

from .data import between, kl_text, plain

Cell = Mapping[str, Any]
DEAREST = 20  # cells that a table names


def tables(data: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for spec in data["formats"]:
        cells = [cell for cell in data["cells"] if cell["format"] == spec]
        known = [cell for cell in cells if cell["mean_kld"] is not None]
        most = max(known, key=lambda cell: cell["mean_kld"], default=None)
        bits = get_format(spec).bits_per_value
        row = [spec, "" if bits is None else f"{bits:g}"]
        if most is None:
            row += ["", "not finite", "", ""]
        else:
            row += [kl_text(median(cell["mean_kld"] for cell in known)), kl_text(most["mean_kld"])]
            row += [_interval(most), plain(most["site"])]
        rows.append([*row, str(sum(cell["mark"] is not None for cell in cells) or "")])
    head = ["format", "bits", "median KL", "largest KL", "95 %", "of", "marked"]
    found = [{"title": "Formats", "head": head, "rows": rows}]
    sound = [cell for cell in data["cells"] if cell["mean_kld"] and not cell["mark"]]
    sound.sort(key=lambda cell: -cell["mean_kld"])
    rows = [
        [plain(f"{cell['site']}={cell['format']}"), kl_text(cell["mean_kld"]), _interval(cell)]
        + [kl_text(cell[part]) for part in ("along", "cross", "blocks")]
        for cell in sound[:DEAREST]
    ]
    head = ["cell", "mean KL", "95 %", "along the value", "cross term", "in blocks"]
    found.append({"title": f"The {len(rows)} dearest that are not marked", "head": head, "rows": rows})
    rows = [
        [
            plain(f"{one['site']}={one['format']}"),
            kl_text(one["mean_kld"]),
            kl_text(one["exact"]),
            f"{one['ratio']:.2f}",
            one["mark"] or "",
        ]
        for one in sorted(data["verified"], key=lambda one: -one["exact"])
    ]
    head = ["cell", "estimate", "exact", "exact / estimate", "mark"]
    if rows:
        found.append({"title": "Measured exactly", "head": head, "rows": rows})
    rows = [
        [
            plain(f"{' + '.join(one['sites'])} in {one['format']}"),
            kl_text(one["mean_kld"]),
            " + ".join(kl_text(kld) for kld in one["alone"]),
            "" if one["over_sum"] is None else f"{one['over_sum']:.2f}",
            between(one["over_sum_ci95"], "{:.2f}".format) if one["over_sum_ci95"] else "",
        ]
        for one in data["pairs"]
    ]
    head = ["two together", "mean KL", "alone", "over their sum", "95 %"]
    if rows:
        found.append({"title": "Two sites at a time, measured exactly", "head": head, "rows": rows})
    return found


def _interval(cell: Cell) -> str:
    return between(cell["mean_kld_ci95"], kl_text) if cell["mean_kld_ci95"] else ""
