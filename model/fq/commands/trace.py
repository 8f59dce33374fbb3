"""fq trace."""

from __future__ import annotations

import argparse

from ..results.trace_summary import summarise, summary_text
from .files import write_json


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="what run or perplexity has written with --trace")
    parser.add_argument("--json", action="store_true", help="as JSON")


def main(args: argparse.Namespace) -> int:
    data = summarise(args.file)
    if args.json:
        write_json("trace", data, "-")
    else:
        print(summary_text(data))
    return 0
