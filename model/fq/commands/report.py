"""fq report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import FqError
from ..results.runs import Results, stored_figures
from .files import check_outputs, write
from .options import add_store, store_files


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", type=int, nargs="?", help="number of a run (default: the newest)"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the HTML file, - for stdout (default fq-report-RUN.html)"
    )
    parser.add_argument("--png", metavar="DIR", help="write the plots alone, too, as PNG files in DIR")
    parser.add_argument(
        "--beside",
        metavar="RUN",
        type=int,
        action="append",
        help="another run of the store, as of another text or context: whether its cells rank alike; may be "
        "repeated",
    )
    add_store(parser)


def main(args: argparse.Namespace) -> int:
    from ..report import page, sensitivity, svg
    from ..report.elsewhere import Elsewhere

    with svg.style(svg.FOR_PNG):
        pass  # where matplotlib is missing nothing is begun
    with Results(args.store, must_exist=True) as store:
        runs = {run["run"]: run for run in store.list(args.run)}
        if not runs and args.run is None:
            raise FqError(f"{store.path}: there is no run in it")
        number = max(runs) if args.run is None else args.run
        output = args.output or f"fq-report-{number}.html"
        inputs = store_files("the store", args.store)
        check_outputs({"-o": output}, inputs)
        data = stored_figures(store, number)
        data["started"] = runs[number]["started"]
        beside = args.beside or []
        if number in beside or len(set(beside)) < len(beside):
            raise FqError(f"--beside takes other runs than {number}, each once")
        if beside and any(store.get(each).asked for each in (number, *beside)):
            raise FqError("--beside takes sweeps; an estimate is put beside one by fq results compare")
        elsewhere = Elsewhere(data, [stored_figures(store, other) for other in beside]) if beside else None
    if args.png:
        try:
            os.makedirs(args.png, exist_ok=True)
        except OSError as e:
            raise FqError(f"--png {args.png}: {e.strerror}") from None
    if "estimate" in data:
        html = sensitivity.sensitivity_html(data)
        pngs = sensitivity.pngs(data) if args.png else {}
    else:
        html = page.report_html(data, elsewhere)
        pngs = page.pngs(data, elsewhere) if args.png else {}
    targets = {name: os.path.join(args.png, name) for name in pngs}
    # only now are the plots' names known; nothing has been written
    check_outputs({"-o": output} | {f"--png's {name}": target for name, target in targets.items()}, inputs)
    if output == "-":
        sys.stdout.write(html)
    else:
        write(html, output)
    for name, png in pngs.items():
        write(png, targets[name])
    said = [output] * (output != "-")
    if args.png:
        said += [f"{len(pngs)} plots in {Path(args.png)}"]
    partial = f", partial: {data['n_chunks']} of {data['n_chunks_asked']} chunks" if data["partial"] else ""
    if said:
        print(f"fq: run {data['run']} of {args.store}{partial}: {', '.join(said)}", file=sys.stderr)
    return 0
