"""fq results."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from typing import Any

from ..errors import FqError
from ..results import Results
from ..show import comparison_text, table
from ..sweep_figures import stored_figures, sweep_text
from .files import check_target, write, write_json
from .options import add_store


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=int, nargs="?", help="number of a run (default: list all)")
    parser.add_argument(
        "cell",
        metavar="CELL",
        nargs="*",
        help="show llama-perplexity's full table of this cell: its name, or a part that no other name has",
    )
    parser.add_argument("--json", metavar="FILE", help="write it as JSON to FILE, or - for stdout")
    parser.add_argument("--csv", metavar="FILE", help="write a line per cell to FILE, or - for stdout")
    add_store(parser)


def main(args: argparse.Namespace) -> int:
    for option in ("json", "csv"):
        check_target(f"--{option}", getattr(args, option))
    with Results(args.store, must_exist=True) as store:
        if args.run is None:
            if args.csv:
                raise FqError("--csv needs the number of a run")
            runs = store.list()
            if args.json != "-":
                print(_list_text(runs))
            if args.json:
                write_json(runs, args.json)
            return 0
        data = stored_figures(store, args.run)
    if args.cell:
        data["cells"] = [_cell(data, name) for name in args.cell]
        del data["groups"]
    if "-" not in (args.json, args.csv):
        print(_cells_text(data["cells"]) if args.cell else sweep_text(data))
    if args.json:
        write_json(data, args.json)
    if args.csv == "-":
        sys.stdout.write(_csv(data))
    elif args.csv:
        write(_csv(data), args.csv)
    return 0


def _cell(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The cell of this name, else the only one whose name contains it."""
    cells: dict[str, dict[str, Any]] = {cell["name"]: cell for cell in data["cells"]}
    if name in cells:
        return cells[name]
    found = [known for known in cells if name in known]
    if len(found) == 1:
        return cells[found[0]]
    if not cells:
        raise FqError(f"run {data['run']}: no chunk has ended in every cell")
    which = "is in the names of several cells" if found else "is no cell"
    raise FqError(f"{name!r} {which} of run {data['run']}: {', '.join(found or cells)}")


def _cells_text(cells: list[dict[str, Any]]) -> str:
    return "\n\n".join(f"{cell['name']}\n\n{comparison_text(cell['comparison'])}" for cell in cells)


def _list_text(runs: Any) -> str:
    rows = [["run", "started", "model", "text", "cells", "chunks", "ended"]]
    for run in runs:
        ended = "all" if run["ended"] == run["of"] else f"{100 * run['ended'] // run['of']} %"
        model, text = os.path.basename(run["model"]), os.path.basename(run["text"] or "")
        counts = [str(run["n_cells"]), str(run["n_chunks_asked"])]
        rows.append([str(run["run"]), run["started"], model, text, *counts, ended])
    return table(rows, {0, 4, 5, 6})


def _csv(data: dict[str, Any]) -> str:
    """A line per cell: the comparison's single figures, and both ends of its intervals."""
    lines = []
    for cell in data["cells"]:
        best, worst = cell.get("rank", (None, None))
        line = {key: cell[key] for key in ("name", "kind", "group")} | {"rank": best, "rank_worst": worst}
        for key, value in cell["comparison"].items():
            if key.endswith("_ci95_chunks"):
                line[f"{key}_low"], line[f"{key}_high"] = value or (None, None)
            elif not isinstance(value, dict):
                line[key] = value
        lines.append(line)
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return out.getvalue()
