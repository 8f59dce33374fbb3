"""fq report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import FqError
from ..results import Results
from ..sweep_figures import stored_figures
from .files import check_target, write
from .options import add_store


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", type=int, nargs="?", help="number of a run (default: the newest)"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the HTML file, - for stdout (default fq-report-RUN.html)"
    )
    parser.add_argument("--png", metavar="DIR", help="write the plots alone, too, as PNG files in DIR")
    add_store(parser)


def main(args: argparse.Namespace) -> int:
    from ..report import page, svg

    with svg.style(svg.FOR_PNG):
        pass  # where matplotlib is missing nothing is begun
    with Results(args.store, must_exist=True) as store:
        runs = {run["run"]: run for run in store.list()}
        if not runs:
            raise FqError(f"{store.path}: there is no run in it")
        data = stored_figures(store, max(runs) if args.run is None else args.run)
        data["started"] = runs[data["run"]]["started"]
    output = args.output or f"fq-report-{data['run']}.html"
    check_target("-o", output)
    if args.png:
        try:
            os.makedirs(args.png, exist_ok=True)
        except OSError as e:
            raise FqError(f"--png {args.png}: {e.strerror}") from None
    html = page.report_html(data)
    if output == "-":
        sys.stdout.write(html)
    else:
        write(html, output)
    said = [output] * (output != "-")
    if args.png:
        said += [f"{len(page.write_pngs(data, args.png))} plots in {Path(args.png)}"]
    partial = f", partial: {data['n_chunks']} of {data['n_chunks_asked']} chunks" if data["partial"] else ""
    if said:
        print(f"fq: run {data['run']} of {args.store}{partial}: {', '.join(said)}", file=sys.stderr)
    return 0
