"""fq run."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

from ..errors import FqError
from ..run.context import Context
from ..run.generation import Sampler, Timings, generate
from ..run.model import Model
from .files import write_json
from .options import (
    add_evaluation,
    add_model,
    add_seed,
    add_trace,
    check_run_outputs,
    executor_of,
    find_model,
    numerics,
    say_unknown_keys,
    trace_of,
)
from .outcome import Outcome
from .rules import add_fake_quant, fake_quant_of
from .show import fake_quant_text, timings_text

MAX_DEFAULT_CTX = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "-n",
        "--predict",
        type=int,
        default=128,
        metavar="N",
        help="tokens to generate, -1 until the context is full (default %(default)s)",
    )
    parser.add_argument(
        "--temp", type=float, default=0.0, help="temperature; 0 is greedy (default %(default)s)"
    )
    parser.add_argument(
        "--top-k", type=int, default=40, help="keep the K likeliest, 0 for all (default %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="keep this much probability (default %(default)s)"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-generation token")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt through the model's chat template"
    )
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message, with --chat")
    add_model(parser)
    add_seed(parser, "sampling, stochastic rounding and dither")
    add_evaluation(parser, 0, "context in tokens; 0: the model's, at most 4096")
    add_trace(parser)
    add_fake_quant(parser)


def main(args: argparse.Namespace) -> int:
    check_run_outputs(args)
    sampler = Sampler(args.temp, args.top_k, args.top_p, args.seed)
    if args.predict < -1:
        raise FqError(f"--predict must be >= 0, or -1 until the context is full, not {args.predict}")
    if args.system_prompt is not None and not args.chat:
        raise FqError("--system-prompt needs --chat")
    path = find_model(args.model, args.offline)
    start = time.perf_counter()
    model = Model(path)
    say_unknown_keys(model)
    tokenizer = model.tokenizer
    prompt = args.prompt
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special=False, parse_special=True)
    else:
        ids = tokenizer.encode(prompt, parse_special=True)
    fake_quant = fake_quant_of(args, model)
    with executor_of(args.threads) as executor, trace_of(args, model, executor, fake_quant) as trace:
        n_ctx = args.ctx_size or min(model.hparams.n_ctx_train, MAX_DEFAULT_CTX)
        context = Context(model, n_ctx, executor, fake_quant, trace, args.activations)
        timings = Timings(load_ms=(time.perf_counter() - start) * 1e3)
        stop: frozenset[int] = frozenset() if args.ignore_eos else frozenset(tokenizer.eog_ids)
        # with --json - stdout is for JSON alone
        out = sys.stderr if args.json == "-" else sys.stdout
        generated: list[int] = []
        pieces: list[str] = []
        outcome = Outcome()
        decoder = tokenizer.stream_decoder()
        tokens = generate(
            context, ids, args.predict, sampler, stop=stop, batch=args.batch_size, timings=timings
        )
        if not args.chat:
            out.write(prompt)
            out.flush()
        with outcome.watched():
            for token in tokens:
                generated.append(token)
                pieces.append(decoder.push(token))
                out.write(pieces[-1])
                out.flush()
        pieces.append(decoder.finish())
        out.write(pieces[-1] + "\n")
        out.flush()
    timings.total_ms = (time.perf_counter() - start) * 1e3
    outcome.say(f"{len(generated)} tokens")
    print(f"\n{timings_text(timings, len(generated))}", file=sys.stderr)
    if fake_quant:
        print(f"\n{fake_quant_text(fake_quant.as_dict())}", file=sys.stderr)
    if args.json:
        data: dict[str, Any] = {
            "model": model.path,
            "prompt_tokens": ids,
            "generated_tokens": generated,
            "text": "".join(pieces),
            "partial": outcome.partial,
            "timings": asdict(timings),
            "numerics": numerics(executor, args.activations),
        }
        if fake_quant:
            data["fake_quant"] = fake_quant.as_dict()
        write_json("run", data, args.json)
    return outcome.status
