"""fq pareto."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import FqError
from ..measure.inference import MIN_CHUNKS
from ..measure.pareto import QUANTITIES, Priced, cheapest, pareto_set, priced, read_prices
from ..results.runs import Results, stored_figures
from ..words import table
from .files import check_outputs, write, write_json
from .options import add_store, store_files

PICTURES = (".png", ".svg")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", type=int, nargs="?", help="number of a run (default: the newest)"
    )
    parser.add_argument(
        "--prices",
        metavar="FILE",
        required=True,
        help="CSV with the columns item and price; items: "
        + "; ".join(f"{item}, {what}" for item, what in QUANTITIES.items()),
    )
    parser.add_argument(
        "--budget", metavar="KL", type=float, help="name the cheapest unit whose mean KL is surely below this"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write a picture to FILE, .png or .svg")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE, or - for stdout")
    add_store(parser)


def main(args: argparse.Namespace) -> int:
    if args.output and os.path.splitext(args.output)[1].lower() not in PICTURES:
        raise FqError(f"-o {args.output}: must end in {' or '.join(PICTURES)}")
    if args.budget is not None and not args.budget > 0:
        raise FqError(f"--budget must be above 0, not {args.budget:g}")
    inputs = store_files("the store", args.store) | {"the prices": args.prices}
    check_outputs({"-o": args.output, "--json": args.json}, inputs)
    prices = read_prices(Path(args.prices))
    with Results(args.store, must_exist=True) as store:
        number = store.newest() if args.run is None else args.run
        data = stored_figures(store, number)
    if "estimate" in data:
        raise FqError(f"run {number} is an estimate (fq plan takes those): name a run of units by its number")
    if data.get("baseline") or data.get("base_model"):
        raise FqError(
            f"run {number} is beside another baseline than the exact model: name a run of units by its number"
        )
    units = priced(data["cells"], prices)
    best = pareto_set(units)
    pick = None if args.budget is None else cheapest(units, args.budget)
    if args.output:
        from ..report.pareto import picture

        kind = os.path.splitext(args.output)[1][1:].lower()
        write(picture(units, best, pick, args.budget, kind), args.output)
        print(f"fq: run {number} of {args.store}: {args.output}", file=sys.stderr)
    if args.json != "-":
        print(_text(units, best, pick, args.budget, prices))
    if args.json:
        chosen = {each.unit for each in best}
        write_json(
            "pareto",
            {
                "run": number,
                "prices": prices,
                "budget": args.budget,
                "cheapest": None if pick is None else pick.unit,
                "units": [each._asdict() | {"pareto": each.unit in chosen} for each in units],
            },
            args.json,
        )
    return 0


def _text(
    units: Sequence[Priced],
    best: Sequence[Priced],
    pick: Priced | None,
    budget: float | None,
    prices: Mapping[str, float],
) -> str:
    rows = [["", "cost", "mean KL", "95 % over chunks", *(item.replace("_", " ") for item in prices), "unit"]]
    for number, each in enumerate(best, 1):
        ends = each.interval
        interval = "" if ends is None or each.kld == 0 else f"{ends[0]:.2e} to {ends[1]:.2e}"
        of = [f"{each.quantities[item]:g}" for item in prices]
        rows.append([str(number), f"{each.cost:.6g}", f"{each.kld:.3e}", interval, *of, each.unit])
    lines = [f"{len(best)} of {len(units)} units are beaten by no other in cost and mean KL at once", ""]
    lines.append(table(rows, {0, 1, 2, *range(4, 4 + len(prices))}))
    if free := [item.replace("_", " ") for item in QUANTITIES if item not in prices]:
        lines.append(f"without a price, and so free: {', '.join(free)}")
    if budget is not None:
        lines.append("")
        if pick is None:
            if all(each.interval is None for each in units):
                lines.append(
                    f"there are no intervals: below {MIN_CHUNKS} chunks nothing is surely within a budget"
                )
            else:
                lines.append(f"no unit's mean KL is below {budget:g} with the whole of its interval")
        else:
            lines.append(f"the cheapest whose mean KL is below {budget:g}, interval and all: {pick.unit}")
            lines.append(f"cost {pick.cost:.6g}, mean KL {pick.kld:.3e}")
    return "\n".join(lines)
