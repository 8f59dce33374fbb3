"""fq replicate."""

from __future__ import annotations

import argparse
import sys

from ..gguf import cache
from ..replicate.replication import Replication, Settings
from ..replicate.text import replication_text
from ..run.finite import not_finite_text
from .files import SAMPLE_TEXT, check_outputs, read_text, write, write_json
from .options import ALIASES, add_offline, executor_of, inputs_of, open_model
from .outcome import Outcome
from .progress import steps


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tinyllama-shape",
        action="store_true",
        help="on the generated file of TinyLlama's shape too, random weights (some minutes more)",
    )
    for names, kind, default, metavar, text in (
        (("-m", "--model"), str, cache.DEFAULT_ALIAS, "MODEL", f"a GGUF file or an alias: {ALIASES}"),
        (("-o", "--output"), str, None, "FILE", "write the Markdown to FILE (default: stdout)"),
        (("--json",), str, None, "FILE", "write the figures as JSON to FILE, or - for stdout"),
        (("--rounds",), int, 30, "N", "rounds of the timings"),
        (("-f", "--file"), str, None, "FILE", "text of the perplexity (default: the sample in the package)"),
        (("--chunks",), int, -1, "N", "chunks of it, -1 for all; at most 2 where weights are random"),
        (("-c", "--ctx-size"), int, 512, "N", "tokens per chunk"),
        (("-s", "--seed"), int, 0, "N", "of the timings' order and bootstrap"),
        (
            ("-t", "--threads"),
            int,
            None,
            "N",
            "threads of all but the timings (default: the processors that this process may use)",
        ),
    ):
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(*names, type=kind, default=default, metavar=metavar, help=text + shown)
    add_offline(parser)


def main(args: argparse.Namespace) -> int:
    names = [args.model, *(["tinyllama-shape"] if args.tinyllama_shape else [])]
    inputs = inputs_of(args) | {f"the model {name}": cache.location(name) for name in names[1:]}
    check_outputs({"--json": args.json, "--output": args.output}, inputs)
    text, text_name = read_text(args.file)
    settings = Settings(args.rounds, args.chunks, args.ctx_size, args.seed)

    models = [open_model(name, args.offline) for name in dict.fromkeys(names)]
    with executor_of(args.threads) as executor:
        replication = Replication(
            models, SAMPLE_TEXT.read_text(encoding="utf-8"), text, text_name, settings, executor, steps
        )
        outcome = Outcome()
        with outcome.watched():
            for what in replication:
                print(f"fq: {what}", file=sys.stderr)
    outcome.say("")
    data = {"command": args.command_line} | replication.result()
    page = replication_text(data)
    if args.output not in (None, "-"):
        write(page, args.output)
    else:
        print(page, end="", file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json("replicate", data, args.json)
    for model in data["models"]:
        for mode in ("report", "right"):
            where = model.get("perplexity", {}).get(mode, {}).get("not_finite")
            if where and outcome.failed is None:
                who = f"{model['model']['name']}, {mode} mode"
                print(f"fq: {not_finite_text(who, where)}", file=sys.stderr)
                outcome.lost = True
    return outcome.status
