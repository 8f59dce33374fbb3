"""fq bench."""

from __future__ import annotations

import argparse

from .. import machine
from ..gguf import cache
from ..measure import overhead
from .files import SAMPLE_TEXT, check_outputs
from .options import ALIASES, add_offline, executor_of, inputs_of, numerics, open_model
from .outcome import Outcome, print_figures
from .progress import steps


def add_options(parser: argparse.ArgumentParser) -> None:
    for names, kind, default, metavar, text in (
        (("-m", "--model"), str, cache.DEFAULT_ALIAS, "MODEL", f"a GGUF file or an alias: {ALIASES}"),
        (("-p", "--prompt"), str, None, "TEXT", "the prompt (default: the package's sample text)"),
        (
            ("--prompt-tokens",),
            int,
            None,
            "N",
            "tokens of it; repeated where it is shorter (default: 256, or as many as --prompt has)",
        ),
        (("-n", "--predict"), int, 8, "N", "tokens evaluated one by one after the prompt"),
        (("-b", "--batch-size"), int, 128, "N", "tokens per evaluation of the prompt"),
        (("--rounds",), int, 30, "N", "rounds that count"),
        (("--warm-up",), int, 2, "N", "rounds before them"),
        (("--format",), str, "bf16", "TYPE", "what norm outputs are rounded to"),
        (("--layer",), int, None, "N", "the layer of 'one layer' (default: 5, or the middle one)"),
        (("--point",), str, "raw", "POINT", "in (what the norm reads), raw (before the weight) or weighted"),
        (("-s", "--seed"), int, 0, "N", "of the order and of the bootstrap"),
        (
            ("-t", "--threads"),
            int,
            None,
            "N",
            "threads (default: the processors that this process may use)",
        ),
        (("--json",), str, None, "FILE", "write the figures as JSON to FILE, or - for stdout"),
    ):
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(*names, type=kind, default=default, metavar=metavar, help=text + shown)
    parser.add_argument(
        "--norm-unit",
        action="append",
        default=[],
        metavar="UNIT",
        help="also time norms computed by it: SITES=STEP=VALUE;STEP=VALUE...; may be repeated",
    )
    add_offline(parser)


def main(args: argparse.Namespace) -> int:
    check_outputs({"--json": args.json}, inputs_of(args))
    text = SAMPLE_TEXT.read_text(encoding="utf-8") if args.prompt is None else args.prompt
    n_prompt = 256 if args.prompt is None and args.prompt_tokens is None else args.prompt_tokens
    about = machine.describe("numpy")  # before the run, which is a load too
    model = open_model(args.model, args.offline)
    with executor_of(args.threads) as executor:
        measurement = overhead.Overhead(
            model,
            model.tokenizer.encode(text),
            overhead.configurations(model, args.format, args.layer, args.point, args.norm_unit),
            n_prompt=n_prompt,
            n_predict=args.predict,
            batch=args.batch_size,
            rounds=args.rounds,
            warm_up=args.warm_up,
            seed=args.seed,
            executor=executor,
        )
        outcome = Outcome()
        with outcome.watched():
            for _ in steps("rounds", measurement, args.warm_up + args.rounds, "round"):
                pass
    if outcome.failed is not None:
        raise outcome.failed
    outcome.say(f"{measurement.done} of {args.rounds} rounds")
    if outcome.interrupted and measurement.done < 2:
        return outcome.status
    data = measurement.result() | {"machine": about, "numerics": numerics(executor)}
    print_figures("bench", overhead.overhead_text(data), data, args.json)
    return outcome.status
