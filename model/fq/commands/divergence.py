"""fq divergence."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..errors import FqError
from ..measure.chunks import Chunks, Settings
from ..measure.divergence import Divergence
from ..run.context import Context
from ..run.model import Model
from ..words import ascii_safe, table
from .files import SAMPLE_TEXT, check_outputs, read_text
from .options import (
    add_activations,
    add_base_model,
    add_json,
    add_model,
    add_seed,
    add_threads,
    check_seed,
    executor_of,
    inputs_of,
    models_of,
    numerics,
)
from .outcome import Outcome, print_figures
from .progress import progress
from .rules import add_fake_quant, fake_quant_of
from .show import fake_quant_text

PROMPT_TOKENS = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="UTF-8 text, of which chunks are prompts (default: the sample in the package)",
    )
    text.add_argument("--prompts-file", metavar="FILE", help="a prompt on each line")
    parser.add_argument(
        "--prompts",
        type=int,
        default=32,
        metavar="N",
        help="prompts: chunks in one random order, or the first lines; -1 for all (default %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help=f"of a chunk (default {PROMPT_TOKENS})"
    )
    parser.add_argument(
        "-n", "--predict", type=int, default=128, metavar="N", help="tokens of text (default %(default)s)"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-generation token")
    add_base_model(parser, "as the baseline")
    add_model(parser)
    add_seed(parser, "stochastic rounding and dither")
    add_threads(parser)
    add_activations(parser)
    add_json(parser)
    add_fake_quant(parser)


def main(args: argparse.Namespace) -> int:
    check_seed(args)
    if args.prompts < -1 or args.prompts == 0:
        raise FqError(f"--prompts must be positive, or -1 for all, not {args.prompts}")
    if args.prompts_file and args.prompt_tokens is not None:
        raise FqError("--prompt-tokens is of chunks, and --prompts-file has whole prompts")
    args.prompt_tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    if args.prompt_tokens < 1:
        raise FqError(f"--prompt-tokens must be at least 1, not {args.prompt_tokens}")
    source = args.prompts_file or args.file
    check_outputs({"--json": args.json}, inputs_of(args) | {"the text": source or SAMPLE_TEXT})
    text, name = read_text(source)
    start = time.perf_counter()
    model, base_model = models_of(args)
    fake_quant = fake_quant_of(args, model)
    if fake_quant is None and base_model is model:
        raise FqError("there is nothing to compare: --fake-quant RULE, or --base-model")
    prompts = _prompts(args, model, text)
    if args.prompts > len(prompts):
        print(f"fq: there are {len(prompts)} prompts, not {args.prompts}", file=sys.stderr)
    n_ctx = max(map(len, prompts)) + max(args.predict, 1)
    most = min(model.hparams.n_ctx_train, base_model.hparams.n_ctx_train)
    stop: frozenset[int] = frozenset() if args.ignore_eos else frozenset(model.tokenizer.eog_ids)
    with executor_of(args.threads) as executor:
        baseline = Context(base_model, min(n_ctx, most), executor, activations=args.activations)
        rounded = Context(model, min(n_ctx, most), executor, fake_quant, activations=args.activations)
        run = Divergence(prompts, args.predict, baseline, rounded, stop)
        outcome = Outcome()
        with outcome.watched():
            where = lambda _: f"[{run.done}/{len(prompts)}]"  # noqa: E731
            for _ in progress(run, where, lambda _: None):
                pass
        outcome.lost = bool(run.not_finite)
    outcome.say(f"{run.done} of {len(prompts)} prompts")
    if not run.done:
        return outcome.status
    data: dict[str, Any] = {
        "model": model.path,
        "text": name,
        **run.result(lambda ids: model.tokenizer.decode(ids, skip_special=False)),
        "seconds": time.perf_counter() - start,
        "numerics": numerics(executor, args.activations),
    }
    if base_model is not model:
        data["base_model"] = base_model.path
    if fake_quant is not None:
        data["fake_quant"] = fake_quant.as_dict()
    print_figures("divergence", divergence_text(data), data, args.json)
    return outcome.status


def _prompts(args: argparse.Namespace, model: Model, text: str) -> list[list[int]]:
    tokenizer = model.tokenizer
    if args.prompts_file:
        lines = [line for line in text.split("\n") if line.strip()]
        some = lines if args.prompts == -1 else lines[: args.prompts]
        return [tokenizer.encode(line.removesuffix("\r")) for line in some]
    # a chunk has a token that is no one's prompt, and BOS in its first one's place
    settings = Settings(n_ctx=max(args.prompt_tokens, 3), chunks=args.prompts)
    chunks = Chunks(model, tokenizer.encode(text), settings)
    return [chunks[i][0][: args.prompt_tokens].tolist() for i in range(chunks.n)]


def divergence_text(data: Mapping[str, Any]) -> str:
    lines = [f"model    {os.path.basename(data['model'])}"]
    if "base_model" in data:
        lines.append(f"base     {os.path.basename(data['base_model'])}")
    partial = f"  PARTIAL: {data['n_prompts_asked']} were asked for" if data["partial"] else ""
    lines.append(f"prompts  {data['text']}: {data['n_prompts']}, {data['n_predict']} tokens each{partial}")
    rows = [["first tokens", "the same", "95 %", "prompts"]]
    curve, tokens = data["curve"], 1
    while tokens <= data["n_predict"]:
        at = next((one for one in reversed(curve) if one["tokens"] <= tokens), None)
        share, ends = (at["share"], at["share_ci95"]) if at else (1.0, None)
        interval = "" if ends is None else f"{100 * ends[0]:.1f} % to {100 * ends[1]:.1f} %"
        watched = sum(one["same"] + one["left"] >= tokens for one in data["prompts"])
        rows.append([str(tokens), f"{100 * share:.1f} %", interval, str(watched)])
        # twice as many, and the last of all
        tokens = 2 * tokens if tokens == data["n_predict"] else min(2 * tokens, data["n_predict"])
    lines += ["", table(rows, {0, 1, 3}), ""]
    n, left = data["n_prompts"], data["left"]
    median, ends = data["median"], data["median_ci95"]
    said = f"{left} of {n} texts leave the baseline's"
    if median is not None:
        low, high = ("?" if end is None else str(end) for end in ends)
        said += f", half of them all by token {median} (95 % {low} to {high})"
    lines.append(said)
    soonest = min((one for one in data["prompts"] if one["left"]), key=lambda one: one["same"], default=None)
    if soonest is not None and soonest["next_rounded"] is not None:
        words = ascii_safe(soonest["next"]), ascii_safe(soonest["next_rounded"])
        lines.append(f"soonest, at token {soonest['same'] + 1}: {words[0]!r} becomes {words[1]!r}")
    if data["not_finite"]:
        lines.append(f"NOT FINITE: the rounded model's logits at {len(data['not_finite'])} prompts")
    if "fake_quant" in data:
        lines += ["", fake_quant_text(data["fake_quant"])]
    return "\n".join(lines)
