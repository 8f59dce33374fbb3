"""fq results."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import FqError
from ..measure.agreement import agreement, agreement_text
from ..measure.cells import label_of
from ..measure.who_pays import who_pays_text
from ..results.compare import Side, compare_cells, compare_runs, compare_text
from ..results.compare_estimates import compare_estimate, compare_estimate_text
from ..results.export import csv_text, need_pyarrow, parquet_bytes
from ..results.runs import Results, stored_figures
from ..run.finite import not_finite_text
from ..words import ascii_safe, table
from . import stores
from .files import check_outputs, write, write_json
from .options import add_store, store_files
from .show import comparison_text
from .show_sensitivity import estimate_cells_text, sensitivity_text
from .show_sweep import sweep_text
from .stores import run_number

COMPARE, RANK = "compare", "rank"
MOST_NAMED = 20  # cells, in an error


def add_options(parser: argparse.ArgumentParser) -> None:
    usages = (
        *("[RUN]", "compare RUN[:CELL] RUN[:CELL] ...", "rank RUN RUN ..."),
        *("merge OUT STORE[:RUN] ...", "check [RUN ...]", "delete RUN ..."),
    )
    parser.usage = "\n       ".join(f"%(prog)s [option ...] {usage}" for usage in usages)
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="*",
        help="number of a run (default: list all); compare, or rank, and several; merge and files of shards, "
        "of which OUT gets all; check, or delete, and runs",
    )
    parser.add_argument(
        "--cell",
        metavar="CELL",
        action="append",
        help="show llama-perplexity's full table of this cell: its name, what its table calls it, or a "
        "part that no other name has; may be repeated",
    )
    parser.add_argument("--json", metavar="FILE", help="write it as JSON to FILE, or - for stdout")
    parser.add_argument("--csv", metavar="FILE", help="write a line per cell to FILE, or - for stdout")
    parser.add_argument(
        "--parquet", metavar="FILE", help="write what --csv writes as Parquet to FILE; needs pyarrow"
    )
    add_store(parser)


def main(args: argparse.Namespace) -> int:
    if args.run and args.run[0] in stores.ACTIONS:
        for option in ("cell", "csv", "parquet"):
            if getattr(args, option):
                raise FqError(f"--{option} needs the number of a run")
        return stores.main(args)
    number = run_number(args.run[0]) if args.run and args.run[0] not in (COMPARE, RANK) else None
    if number is not None and len(args.run) > 1:
        raise FqError(f"one run at a time, or fq results compare {' '.join(args.run)}")
    for option in ("cell", "csv", "parquet"):
        if number is None and getattr(args, option):
            raise FqError(f"--{option} needs the number of a run")
    _check_outputs(args)
    with Results(args.store, must_exist=True) as store:
        data: dict[str, Any]
        if not args.run:
            kind, data = "results", {"runs": store.list()}
            text = _list_text(data["runs"])
        elif args.run[0] == RANK:
            kind, (data, text) = "rank", _rank(store, args.run[1:])
        elif number is None:
            kind, data, text = _compare(store, args.run[1:])
        else:
            data = stored_figures(store, number)
            kind = "sensitivity" if "estimate" in data else "sweep"
            if kind == "sensitivity":
                if args.cell:
                    names = {f"{cell['site']}={cell['format']}": cell for cell in data["cells"]}
                    wanted = [_cell_name(name, dict.fromkeys(names, ""), number) for name in args.cell]
                    data["cells"] = [names[name] for name in wanted]
                text = estimate_cells_text(data) if args.cell else sensitivity_text(data)
            elif args.cell:
                cells = {cell["name"]: cell for cell in data["cells"]}
                labels = {name: label_of(cell) for name, cell in cells.items()}
                data["cells"] = [cells[_cell_name(name, labels, data["run"])] for name in args.cell]
                groups = {cell["group"] for cell in data["cells"]}
                data["groups"] = [group for group in data["groups"] if group["name"] in groups]
                text = _cells_text(data["cells"])
            else:
                text = sweep_text(data)
    # files first, whatever becomes of stdout
    if args.csv and args.csv != "-":
        write(csv_text(data), args.csv)
    if args.parquet:
        write(parquet_bytes(data), args.parquet)
    if args.csv == "-":
        sys.stdout.write(csv_text(data))
    if args.json:
        write_json(kind, data, args.json)
    if "-" not in (args.json, args.csv):
        print("\n".join(map(ascii_safe, text.split("\n"))))
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    outputs = {f"--{name}": getattr(args, name) for name in ("json", "csv", "parquet")}
    check_outputs(outputs, store_files("the store", args.store))
    if args.parquet == "-":
        raise FqError("--parquet -: takes a file")
    if args.parquet:
        need_pyarrow()


def _cell_name(wanted: str, labels: Mapping[str, str], run: int) -> str:
    """The name of a cell, else the only one whose label in a table it is, or whose name contains it."""
    names = list(labels)
    # other realisations of a cell have its name and a number: they are named whole
    found = [name for name in names if name == wanted]
    found = found or [name for name in names if labels[name] == wanted]
    found = found or [name for name in names if wanted in name and " #" not in name]
    if len(found) == 1:
        return found[0]
    if not names:
        raise FqError(f"run {run}: no chunk has ended in every cell")
    which = "is in the names of several cells" if found else "is no cell"
    few, more = (found or names)[:MOST_NAMED], len(found or names) - MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    raise FqError(f"{wanted!r} {which} of run {run}: {', '.join(few)}{rest}")


def _rank(store: Results, wanted: Sequence[str]) -> tuple[dict[str, Any], str]:
    numbers = [run_number(text) for text in wanted]
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise FqError("rank needs two different runs or more: fq results rank 1 2")
    if any(store.get(number).asked for number in numbers):
        raise FqError("rank takes sweeps; an estimate's order is compared by fq results compare")
    runs = [stored_figures(store, number) for number in numbers]
    found = agreement(runs)
    names = [f"run {number}" for number in numbers]
    return {"runs": numbers, "agreement": found}, agreement_text(found, names)


def _compare(store: Results, wanted: Sequence[str]) -> tuple[str, dict[str, Any], str]:
    """The kind of document, its figures, and as text."""
    if len(wanted) < 2:
        raise FqError("compare needs two runs or more: fq results compare 1 2, or 1:CELL 1:CELL")
    numbers, colons, cells = zip(*(text.partition(":") for text in wanted), strict=True)
    runs = [run_number(number) for number in numbers]
    if any(store.get(number).asked for number in runs):
        return "compare-estimate", *_compare_estimate(store, runs, colons)
    sides = {number: Side(number, store.get(number), store.load(number)) for number in dict.fromkeys(runs)}
    if not any(colons):
        if len(sides) < len(runs):
            raise FqError("compare needs different runs, or a CELL of each")
        data = compare_runs([sides[number] for number in runs])
        return "compare", data, compare_text(data)
    if not all(colons):
        raise FqError("compare takes a CELL of each run, or of none")
    pairs = []
    for number, cell in zip(runs, cells, strict=True):
        side = sides[number]
        pairs.append((side, _cell_name(cell, {c.name: label_of(vars(c)) for c in side.run.cells}, number)))
    data = compare_cells(pairs)
    return "compare", data, compare_text(data)


def _compare_estimate(
    store: Results, runs: Sequence[int], colons: Sequence[str]
) -> tuple[dict[str, Any], str]:
    if len(runs) != 2 or len(set(runs)) < 2 or any(colons):
        raise FqError("an estimate is compared whole, with one other run: fq results compare 1 2")
    one, other = sorted(runs, key=lambda number: store.get(number).asked is None)  # an estimate first
    data = compare_estimate(*((store.get(number), stored_figures(store, number)) for number in (one, other)))
    return data, compare_estimate_text(data)


def _cells_text(cells: list[dict[str, Any]]) -> str:
    texts = []
    for cell in cells:
        lost = not_finite_text(cell["name"], cell["not_finite"]) if cell["not_finite"] else cell["name"]
        who = "\n".join(who_pays_text(cell["comparison"]["who_pays"]))
        texts.append(f"{lost}\n\n{comparison_text(cell['comparison'])}\n\n====== Who pays ======\n{who}")
    return "\n\n".join(texts)


def _list_text(runs: Any) -> str:
    rows = [["run", "started", "model", "text", "cells", "chunks", "ended"]]
    for run in runs:
        if run["damaged"] is not None:
            rows.append([str(run["run"]), *[""] * 5, "damaged"])
            continue
        ended = "all" if run["ended"] == run["of"] else f"{100 * run['ended'] // run['of']} %"
        model, text = os.path.basename(run["model"]), os.path.basename(run["text"] or "")
        counts = [str(run["n_cells"]), str(run["n_chunks_asked"])]
        rows.append([str(run["run"]), run["started"], model, text, *counts, ended])
    return table(rows, {0, 4, 5, 6})
