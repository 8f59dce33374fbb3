"""A sensitivity run's figures as text for people."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fq_kernels import get_format

from ..measure.estimates import MARKS, MIN_VERIFIED
from ..measure.inference import MIN_CHUNKS
from ..words import table
from .show import chunks_text, few_chunks_text

MOST_SITES = 10  # of a format that is asked for alone


def sensitivity_text(data: dict[str, Any]) -> str:
    lines = [
        f"model  {os.path.basename(data['model'])}",
        f"text   {data['text']}: {data['n_tokens']} tokens; {chunks_text(data)}",
        f"estimate  {data['n_sites']} sites in {len(data['formats'])} formats, "
        f"by {data['samples']} labels a token",
    ]
    if not data["n_chunks"]:
        return "\n".join([*lines, "no chunk has ended: there are no figures"])
    lines += ["", _formats_table(data)]
    if len(data["formats"]) <= 3:
        for spec in data["formats"]:
            lines += ["", f"dearest in {spec}", _sites_table(data, spec)]
    marks = Counter(cell["mark"] for cell in data["cells"] if cell["mark"])
    if marks:
        lines += ["", f"{sum(marks.values())} of {len(data['cells'])} cells are marked, not to be trusted:"]
        lines += [f"  {marks[name]:5d}  {why}" for name, why in MARKS.items() if marks[name]]
    lines += _verified_text(data) + _pairs_text(data)
    if data["model_error"] is None or data["n_chunks"] < MIN_CHUNKS:
        lines += ["", f"there are intervals from {MIN_CHUNKS} chunks and {MIN_VERIFIED} verified cells on"]
    return "\n".join([*lines, *few_chunks_text(data["n_chunks"])])


def _pairs_text(data: Mapping[str, Any]) -> list[str]:
    if not data["pairs"]:
        return []
    rows = [["two together", "mean KL", "alone", "over their sum", "95 %"]]
    for one in data["pairs"]:
        both = f"{one['sites'][0]} + {one['sites'][1]} in {one['format']}"
        alone = " + ".join(f"{kld:.3e}" for kld in one["alone"])
        over = "" if one["over_sum"] is None else f"{one['over_sum']:.2f}"
        ends = one["over_sum_ci95"]
        rows.append(
            [both, f"{one['mean_kld']:.3e}", alone, over, f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else ""]
        )
    return ["", table(rows, {1, 3})]


def _formats_table(data: Mapping[str, Any]) -> str:
    rows = [["format", "bits", "median KL", "largest KL", "95 %", "of", "marked"]]
    for spec in data["formats"]:
        cells = [cell for cell in data["cells"] if cell["format"] == spec]
        known = [cell for cell in cells if cell["mean_kld"] is not None]
        bits = get_format(spec).bits_per_value
        row = [spec, "" if bits is None else f"{bits:g}"]
        if known:
            most = max(known, key=lambda cell: cell["mean_kld"])
            row += [f"{median(cell['mean_kld'] for cell in known):.2e}", f"{most['mean_kld']:.2e}"]
            row += [_interval(most["mean_kld_ci95"]), most["site"]]
        else:
            row += ["", "not finite", "", ""]
        rows.append([*row, str(sum(cell["mark"] is not None for cell in cells) or "")])
    return table(rows, {1, 2, 3, 6})


def _sites_table(data: Mapping[str, Any], spec: str) -> str:
    rows = [["rank", "site", "mean KL", "95 %", "along", "in blocks", "SQNR, dB", "mark"]]
    cells = [cell for cell in data["cells"] if cell["format"] == spec and cell["mean_kld"] is not None]
    for cell in sorted(cells, key=lambda cell: cell["rank"])[:MOST_SITES]:
        kld = cell["mean_kld"]
        shares = [f"{100 * cell[part] / kld:.0f} %" if kld else "" for part in ("along", "blocks")]
        sqnr = "" if cell["sqnr_db"] is None else f"{cell['sqnr_db']:.1f}"
        row = [str(cell["rank"]), cell["site"], f"{kld:.3e}", _interval(cell["mean_kld_ci95"]), *shares]
        rows.append([*row, sqnr, cell["mark"] or ""])
    return table(rows, {0, 2, 4, 5, 6})


def estimate_cells_text(data: Mapping[str, Any]) -> str:
    """Some cells, each with all that is known of it."""
    exact = {(one["site"], one["format"]): one for one in data["verified"]}
    rows = [["cell", "mean KL", "95 %", "along", "cross", "blocks", "by token", "gain", "SQNR, dB"]]
    rows[0] += ["exact", "mark"]
    for cell in data["cells"]:
        figures = (cell[key] for key in ("along", "cross", "blocks", "by_token", "gain"))
        parts = ["" if x is None else f"{x:.2e}" for x in figures]
        kld = "not finite" if cell["mean_kld"] is None else f"{cell['mean_kld']:.3e}"
        row = [f"{cell['site']}={cell['format']}", kld, _interval(cell["mean_kld_ci95"]), *parts]
        row.append("" if cell["sqnr_db"] is None else f"{cell['sqnr_db']:.1f}")
        one = exact.get((cell["site"], cell["format"]))
        rows.append([*row, f"{one['exact']:.3e}" if one else "", cell["mark"] or ""])
    return table(rows, {1, 3, 4, 5, 6, 7, 8, 9})


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.2e} to {ends[1]:.2e}"


def _verified_text(data: Mapping[str, Any]) -> list[str]:
    """The cells that were measured too, and what they say of the estimate."""
    if not data["verified"]:
        return []
    rows = [["measured exactly", "estimate", "exact", "exact / estimate"]]
    for cell in sorted(data["verified"], key=lambda cell: -cell["exact"]):
        rows.append(
            [
                f"{cell['site']}={cell['format']}",
                f"{cell['mean_kld']:.3e}",
                f"{cell['exact']:.3e}",
                f"{cell['ratio']:.2f}",
            ]
        )
    lines = ["", table(rows, {1, 2, 3})]
    if (error := data["model_error"]) is not None:
        low, high = error["ratio_ci95"]
        lines.append(
            f"exact / estimate of one more like most, 95 %: {low:.2f} to {high:.2f}; "
            "wider the more a cell hangs on few tokens; every interval has it in it"
        )
    return lines
