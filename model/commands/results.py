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
from ..show import table
from ..sweep_figures import stored_figures, sweep_text
from .files import check_target, write, write_json
from .options import add_store


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=int, nargs="?", help="number of a run (default: list all)")
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
    if "-" not in (args.json, args.csv):
        print(sweep_text(data))
    if args.json:
        write_json(data, args.json)
    if args.csv == "-":
        sys.stdout.write(_csv(data))
    elif args.csv:
        write(_csv(data), args.csv)
    return 0


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
