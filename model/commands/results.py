"""fq results."""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import FqError
from ..results import Results
from ..show import comparison_text, table
from ..sweep_compare import Side, compare_cells, compare_runs, compare_text
from ..sweep_figures import stored_figures, sweep_text
from .files import check_target, write, write_json
from .options import add_store

COMPARE = "compare"


def add_options(parser: argparse.ArgumentParser) -> None:
    usages = "[RUN [CELL ...]]", "compare RUN[:CELL] RUN[:CELL] ..."
    parser.usage = "\n       ".join(f"%(prog)s [option ...] {usage}" for usage in usages)
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="number of a run (default: list all); or compare, and several"
    )
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
    if args.csv and args.run in (None, COMPARE):
        raise FqError("--csv needs the number of a run")
    with Results(args.store, must_exist=True) as store:
        if args.run is None:
            data: Any = store.list()
            text = _list_text(data)
        elif args.run == COMPARE:
            data = _compare(store, args.cell)
            text = compare_text(data)
        else:
            data = stored_figures(store, _number(args.run))
            if args.cell:
                cells = {cell["name"]: cell for cell in data["cells"]}
                data["cells"] = [cells[_cell_name(name, list(cells), data["run"])] for name in args.cell]
                del data["groups"]
            text = _cells_text(data["cells"]) if args.cell else sweep_text(data)
    if "-" not in (args.json, args.csv):
        print(text)
    if args.json:
        write_json(data, args.json)
    if args.csv == "-":
        sys.stdout.write(_csv(data))
    elif args.csv:
        write(_csv(data), args.csv)
    return 0


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise FqError(f"RUN must be the number of a run, not {text!r}; fq results lists them")
    return int(text)


def _cell_name(wanted: str, names: Sequence[str], run: int) -> str:
    """The name of a cell, else the only one that contains it."""
    found = [wanted] if wanted in names else [name for name in names if wanted in name]
    if len(found) == 1:
        return found[0]
    if not names:
        raise FqError(f"run {run}: no chunk has ended in every cell")
    which = "is in the names of several cells" if found else "is no cell"
    raise FqError(f"{wanted!r} {which} of run {run}: {', '.join(found or names)}")


def _compare(store: Results, wanted: Sequence[str]) -> dict[str, Any]:
    if len(wanted) < 2:
        raise FqError("compare needs two runs or more: fq results compare 1 2, or 1:CELL 1:CELL")
    numbers, colons, cells = zip(*(text.partition(":") for text in wanted), strict=True)
    runs = [_number(number) for number in numbers]
    sides = {number: Side(number, store.get(number), store.load(number)) for number in dict.fromkeys(runs)}
    if not any(colons):
        if len(sides) < len(runs):
            raise FqError("compare needs different runs, or a CELL of each")
        return compare_runs([sides[number] for number in runs])
    if not all(colons):
        raise FqError("compare takes a CELL of each run, or of none")
    pairs = []
    for number, cell in zip(runs, cells, strict=True):
        side = sides[number]
        pairs.append((side, _cell_name(cell, [c.name for c in side.run.cells], number)))
    return compare_cells(pairs)


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
