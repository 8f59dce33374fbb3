"""fq report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FqError
from ..results.runs import Results, stored_figures
from .files import check_outputs, write
from .options import add_store, store_files

if TYPE_CHECKING:
    from ..report.pages import Part


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
    parser.add_argument(
        "--plan", metavar="FILE", help="the plan that fq plan --json wrote of this estimate, on its page"
    )
    parser.add_argument(
        "--ranges", metavar="FILE", help="what fq ranges --json wrote of the run's model, on the page, too"
    )
    add_store(parser)


def main(args: argparse.Namespace) -> int:
    from ..report import page, sensitivity, svg
    from ..report.elsewhere import Elsewhere

    with svg.style(svg.FOR_PNG):
        pass  # where matplotlib is missing nothing is begun
    with Results(args.store, must_exist=True) as store:
        number = store.newest() if args.run is None else args.run
        output = args.output or f"fq-report-{number}.html"
        given = {"the plan": args.plan, "the ranges": args.ranges}
        inputs = store_files("the store", args.store) | {what: path for what, path in given.items() if path}
        check_outputs({"-o": output}, inputs)
        data = stored_figures(store, number)
        (about,) = store.list(number)
        data["started"] = about["started"]
        beside = args.beside or []
        if number in beside or len(set(beside)) < len(beside):
            raise FqError(f"--beside takes other runs than {number}, each once")
        if beside and any(store.get(each).asked for each in (number, *beside)):
            raise FqError("--beside takes sweeps; an estimate is put beside one by fq results compare")
        elsewhere = Elsewhere(data, [stored_figures(store, other) for other in beside]) if beside else None
    more = _more(args, data)
    if args.png:
        try:
            os.makedirs(args.png, exist_ok=True)
        except OSError as e:
            raise FqError(f"--png {args.png}: {e.strerror}") from None
    if "estimate" in data:
        html = sensitivity.sensitivity_html(data, more)
        pngs = sensitivity.pngs(data, more) if args.png else {}
    else:
        html = page.report_html(data, elsewhere, more)
        pngs = page.pngs(data, elsewhere, more) if args.png else {}
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


def _more(args: argparse.Namespace, data: dict[str, Any]) -> list[Part]:
    """What other commands have found of the run, or of its model."""
    from ..report import given, plan_charts, ranges

    more = []
    if args.plan is not None:
        if "estimate" not in data:
            raise FqError(f"--plan: run {data['run']} is a sweep; a plan is of an estimate (fq sensitivity)")
        more.append(plan_charts.plan_part(given.read_plan(args.plan, data["run"])))
    if args.ranges is not None:
        more.append(ranges.part_of(given.read_ranges(args.ranges, data["model"])))
    return more
