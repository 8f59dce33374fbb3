"""fq tasks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..errors import FqError
from ..measure.chunks import chunk_order
from ..measure.likelihood import Likelihoods
from ..measure.tasks import SCORES, Tasks, encoded
from ..text.items import KINDS, read_items
from ..words import table
from .files import check_outputs
from .options import (
    add_base_model,
    add_base_rules,
    add_evaluation,
    add_model,
    add_seed,
    check_seed,
    executor_of,
    inputs_of,
    models_of,
    numerics,
)
from .outcome import Outcome, print_figures
from .progress import progress
from .rules import add_fake_quant, base_rules_of, fake_quant_of
from .show import fake_quant_text


def add_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_mutually_exclusive_group(required=True)
    of = {
        "hellaswag": "lines of text, six for each item",
        "winogrande": "CSV: number, sentence with a gap _, two choices, answer",
        "multiple-choice": "llama-perplexity's binary file, or a line of JSON each: "
        '{"question": "...", "choices": ["...", ...], "answer": 0}',
    }
    for kind in KINDS:
        kinds.add_argument(
            f"--{kind}", dest="kind", action="store_const", const=kind, help=f"the file's form: {of[kind]}"
        )
    parser.add_argument("-f", "--file", metavar="FILE", required=True, help="the items")
    parser.add_argument(
        "--tasks",
        type=int,
        default=0,
        metavar="N",
        help="items, the beginning of one random order of all; 0 for all (the default)",
    )
    parser.add_argument(
        "--tasks-seed", type=int, metavar="N", help="of the random order, the same everywhere (default 0)"
    )
    add_base_model(parser, "as the baseline")
    add_base_rules(parser)
    add_model(parser)
    add_seed(parser, "stochastic rounding and dither")
    add_evaluation(parser, 0, "longest text in tokens; 0: as long as the longest item")
    add_fake_quant(parser)


def main(args: argparse.Namespace) -> int:
    check_seed(args)
    if args.tasks < 0:
        raise FqError(f"--tasks must be >= 0, not {args.tasks}")
    if args.tasks_seed is not None and not args.tasks:
        raise FqError("--tasks-seed is of the order of some of the items: --tasks N")
    if not 0 <= (seed := args.tasks_seed or 0) < 1 << 64:
        raise FqError("--tasks-seed must be from 0 to 2**64 - 1")
    check_outputs({"--json": args.json}, inputs_of(args) | {"the items": args.file})
    items = read_items(args.file, args.kind)
    n_file = len(items)
    if args.tasks > n_file:
        print(f"fq: {args.file} has {n_file} items, not {args.tasks}", file=sys.stderr)
    if args.tasks:
        items = [items[i] for i in chunk_order(n_file, seed)[: args.tasks]]
    start = time.perf_counter()
    model, base_model = models_of(args)
    fake_quant = fake_quant_of(args, model)
    base_rules = base_rules_of(args, base_model)
    tokens = [encoded(item, model.tokenizer) for item in items]
    most = min(model.hparams.n_ctx_train, base_model.hparams.n_ctx_train)
    n_ctx = args.ctx_size or min(max(one.longest - 1 for one in tokens), most)
    with executor_of(args.threads) as executor:
        how = {"activations": args.activations, "batch": args.batch_size}
        baseline = Likelihoods(base_model, n_ctx, executor, base_rules, **how)
        rounded = None
        if fake_quant is not None or base_model is not model or base_rules is not None:
            rounded = Likelihoods(model, n_ctx, executor, fake_quant, **how)
        run = Tasks(tokens, baseline, rounded)
        outcome = Outcome()
        with outcome.watched():
            where = lambda _: f"[{run.done}/{len(tokens)}] {100 * run.share:.2f} %"  # noqa: E731
            for _ in progress(run, where, lambda _: None):
                pass
        outcome.lost = bool(run.not_finite)
    outcome.say(f"{run.done} of {len(tokens)} items")
    if not run.done:
        return outcome.status
    data: dict[str, Any] = {
        "model": model.path,
        "file": args.file,
        "kind": args.kind,
        "n_items_file": n_file,
        **run.result(),
        "seconds": time.perf_counter() - start,
        "numerics": numerics(executor, args.activations),
    }
    if base_model is not model:
        data["base_model"] = base_model.path
    if fake_quant is not None:
        data["fake_quant"] = fake_quant.as_dict()
    if base_rules is not None:
        data["base_fake_quant"] = base_rules.as_dict()
    print_figures("tasks", tasks_text(data), data, args.json)
    return outcome.status


def tasks_text(data: Mapping[str, Any]) -> str:
    lines = [f"model  {os.path.basename(data['model'])}"]
    if "base_model" in data:
        lines.append(f"base   {os.path.basename(data['base_model'])}")
    some = "" if data["n_items"] == data["n_items_file"] else f" of {data['n_items_file']}"
    partial = f"  PARTIAL: {data['n_items_asked']} were asked for" if data["partial"] else ""
    lines.append(
        f"items  {data['file']}: {data['n_items']}{some}, by chance {_share(data['chance'])}{partial}"
    )
    paired = data["ln_p_right"] is not None
    head = ["score", "baseline", "95 %"]
    if paired:
        head += ["rounded", "difference", "95 %", "lost", "gained", "p", "other answers"]
    rows = [head]
    for name, one in data["scores"].items():
        row = [name, _share(one["base"]), _ends(one["base_ci95"])]
        if paired:
            row += [_share(one["rounded"]), f"{100 * one['difference']:+.2f} %"]
            row += [_ends(one["difference_ci95"], "+"), str(one["lost"]), str(one["gained"])]
            row += [f"{one['p']:.3g}", str(one["answers_changed"])]
        rows.append(row)
    lines += ["", table(rows, {1, 3, 4, 6, 7, 8, 9}), ""]
    lines += [f"{name}: {what}" for name, what in SCORES.items()]
    if paired:
        change = data["ln_p_right"]
        interval = ""
        if change["ci95"] is not None:
            interval = f"  95 % over items: {change['ci95'][0]:+.3e} to {change['ci95'][1]:+.3e}"
        if change["mean"] is not None:
            lines.append(f"ln p of the right answer, mean change  {change['mean']:+.3e}{interval}")
    if data["not_finite"]:
        n, first = len(data["not_finite"]), data["not_finite"][0]
        lines.append(
            f"NOT FINITE: the rounded model's logits at {n} items, first {first}; they count as wrong"
        )
    if "fake_quant" in data:
        lines += ["", fake_quant_text(data["fake_quant"])]
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _ends(ends: tuple[float, float] | None, sign: str = "") -> str:
    return "" if ends is None else f"{100 * ends[0]:{sign}.2f} % to {100 * ends[1]:{sign}.2f} %"
