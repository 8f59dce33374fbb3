"""fq calibrate."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..errors import FqError
from ..measure.calibration import LARGEST, PER, Calibrating, Method
from ..provenance import sha256_of
from .files import check_outputs, read_text, text_sha256, write, write_json
from .options import (
    add_evaluation,
    add_model,
    add_text,
    executor_of,
    inputs_of,
    open_model,
    say_if_short,
    settings_of,
)
from .outcome import print_figures
from .progress import steps


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sites",
        action="append",
        metavar="SITES",
        help="sites to find scales for, as rules name them, such as ffn_norm[*].weighted (the default); "
        "may be repeated",
    )
    parser.add_argument(
        "--method",
        default=LARGEST,
        metavar="METHOD",
        help="what the largest code stands for: the largest magnitude seen; percentile=P of the magnitudes; "
        "mse=FORMAT, what makes the least squared error in the format (default %(default)s)",
    )
    parser.add_argument(
        "--per", choices=PER, default=PER[0], help="what has a scale of its own (default %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        required=True,
        help="the scales, for rules: int8:scale=@FILE; - for stdout",
    )
    add_text(parser)
    add_model(parser)
    add_evaluation(parser, 512, "tokens per chunk")


def main(args: argparse.Namespace) -> int:
    method = Method.parse(args.method)
    check_outputs({"-o": args.output, "--json": args.json}, inputs_of(args))
    text, text_name = read_text(args.file)
    model = open_model(args.model, args.offline)
    with executor_of(args.threads) as executor:
        try:
            run = Calibrating(
                model,
                model.tokenizer.encode(text),
                args.sites or ["ffn_norm[*].weighted"],
                method=method,
                per=args.per,
                executor=executor,
                settings=settings_of(args),
            )
        except FqError:
            raise
        except ValueError as e:
            raise FqError(f"--sites: {e}") from None
        say_if_short(args, run.text.n)
        for _ in steps("calibrating", run, run.n_steps, "chunk"):
            pass
    data = run.result(text_name, text_sha256(text), sha256_of(*model.file.paths))
    if args.output == "-":
        sys.stdout.write(_file_of(data))
        if args.json:
            write_json("calibrate", data, args.json)
    else:
        write(_file_of(data), args.output)
        done = f"{args.output}: {len(data['sites'])} sites, {args.per} scales by {method}"
        print_figures("calibrate", done, data, args.json)
    return 0


def _file_of(data: dict[str, Any]) -> str:
    """JSON with a line for each entry and each site."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items() if key != "sites"]
    sites = ",\n  ".join(f"{json.dumps(site)}: {json.dumps(value)}" for site, value in data["sites"].items())
    return "{\n" + ",\n".join(lines) + f',\n"sites": {{\n  {sites}\n}}}}\n'
