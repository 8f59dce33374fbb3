"""fq ranges."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

from ..errors import FqError
from ..measure.ranges import Ranges
from ..words import table
from .files import check_outputs, read_text, write, write_json
from .options import (
    add_evaluation,
    add_model,
    add_text,
    executor_of,
    inputs_of,
    numerics,
    open_model,
    say_if_short,
    settings_of,
)
from .outcome import Outcome, print_figures
from .progress import steps

DEFAULT_SITES = ("*.in", "*.weighted")
# of the formats that elements are rounded to, those that the table has room for
HEADROOM = ("f16", "fp8_e5m2", "fp8_e4m3fn")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sites",
        action="append",
        metavar="SITES",
        help="sites to look at, as rules name them (default: what norms read, and what they give: "
        "*.in and *.weighted); may be repeated",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write a page of plots as HTML, - for stdout")
    add_text(parser)
    add_model(parser)
    add_evaluation(parser, 512, "tokens per chunk")


def main(args: argparse.Namespace) -> int:
    check_outputs({"-o": args.output, "--json": args.json}, inputs_of(args))
    if args.output:
        from ..report import svg

        with svg.style(svg.FOR_PAGE):
            pass  # where matplotlib is missing nothing is begun
    text, text_name = read_text(args.file)
    model = open_model(args.model, args.offline)
    outcome = Outcome()
    with executor_of(args.threads) as executor:
        tokens = model.tokenizer.encode(text)
        try:
            run = Ranges(
                model, tokens, args.sites or DEFAULT_SITES, executor=executor, settings=settings_of(args)
            )
        except FqError:
            raise
        except ValueError as e:
            raise FqError(f"--sites: {e}") from None
        say_if_short(args, run.text.n)
        with outcome.watched():
            for _ in steps("looking", run, run.text.n, "chunk"):
                pass
    outcome.say(f"{run.done} of {run.text.n} chunks")
    if not run.done:
        return outcome.status
    data = run.result() | {
        "text": text_name,
        "command": args.command_line,
        "numerics": numerics(executor, args.activations),
    }
    if args.output == "-":  # stdout is for the page alone
        if args.json:
            write_json("ranges", data, args.json)
    else:
        print_figures("ranges", ranges_text(data), data, args.json)
    if args.output:
        from ..report.ranges import ranges_html

        html = ranges_html(data)
        if args.output == "-":
            sys.stdout.write(html)
        else:
            write(html, args.output)
    return outcome.status


def ranges_text(data: dict[str, Any]) -> str:
    lines = [
        f"model  {os.path.basename(data['model'])}",
        f"text   {data['text']}: {data['n_chunks']} chunks of {data['n_ctx']}"
        + (f"  PARTIAL: {data['n_chunks_asked']} were asked for" if data["partial"] else ""),
        "",
        _table(data["sites"]),
        "",
        "Magnitudes of all tokens but each chunk's first, whose largest stands beside them; percentiles are",
        "up to 0.8 % too large. Outliers: channels that on some token are over "
        f"{data['outlier_times_median']:g} times its median magnitude,",
        "and the one of most tokens. Headroom: log2 of the format's largest number over the largest value.",
    ]
    return "\n".join(lines)


def _table(sites: list[dict[str, Any]]) -> str:
    heading = ["site", "median", "99.9 %", "largest", "first token's", "exponents", "outliers", "channel"]
    heading += ["sum of squares", *(f"headroom {name}" for name in HEADROOM)]
    rows = [heading]
    for site in sites:
        rest, first, channels = site["rest"], site["first"], site["channels"]
        exponents = list(rest["exponents"])
        outlier = channels["outliers"][0] if channels["outliers"] else None
        squares = site.get("sum_of_squares", {}).get("rest")
        rows.append(
            [
                site["site"],
                number(rest["percentiles"]["50"]),
                number(rest["percentiles"]["99.9"]),
                number(rest["largest"]),
                number(first["largest"]) if first["rows"] else "-",
                f"{exponents[0]} to {exponents[-1]}" if exponents else "-",
                f"{channels['n_outliers']} of {channels['n']}",
                f"{outlier['channel']}: {outlier['times_median']:.0f}x, {outlier['tokens']} tokens"
                if outlier
                else "-",
                f"{number(squares['smallest'])} to {number(squares['largest'])}" if squares else "-",
                *(bits(site["headroom_bits"][name]) for name in HEADROOM),
            ]
        )
    right = frozenset({1, 2, 3, 4, *range(9, 9 + len(HEADROOM))})
    return table(rows, right)


def number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def bits(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
