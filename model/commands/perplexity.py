"""fq perplexity."""

from __future__ import annotations

import argparse
import sys
import time

from .. import show
from ..errors import FqError, NotFiniteError
from ..finite import not_finite_text
from ..perplexity import Perplexity
from ..runner import Model
from .files import read_text, write_json
from .options import (
    INTERRUPTED,
    NOT_FINITE,
    add_evaluation,
    add_model,
    add_realisations,
    add_seed,
    add_text,
    add_trace,
    check_realisations,
    check_run_outputs,
    check_seed,
    executor_of,
    find_model,
    numerics,
    trace_of,
)
from .rules import add_fake_quant, fake_quant_of


def add_options(parser: argparse.ArgumentParser) -> None:
    add_text(parser)
    parser.add_argument(
        "--baseline-activations",
        choices=("exact", "ggml"),
        help="the baseline's activations, where they are to differ from --activations",
    )
    parser.add_argument("--no-baseline", action="store_true", help="do not run the model without the rule")
    parser.add_argument(
        "--control",
        action="store_true",
        help="also compare the baseline with itself: every difference must be exactly 0",
    )
    add_realisations(parser)
    add_model(parser)
    add_seed(parser, "sampling, stochastic rounding and dither")
    add_evaluation(parser, 512, "tokens per chunk")
    add_trace(parser)
    add_fake_quant(parser)


def main(args: argparse.Namespace) -> int:
    check_run_outputs(args)
    check_seed(args)
    check_realisations(args)
    text, text_name = read_text(args.file)
    start = time.perf_counter()
    model = Model(find_model(args.model, args.offline))
    fake_quant = fake_quant_of(args, model)
    if args.no_baseline and args.baseline_activations:
        raise FqError("--baseline-activations needs the baseline")
    if fake_quant is None and args.no_baseline:
        raise FqError("--no-baseline without a rule leaves nothing to run")
    with executor_of(args.threads) as executor, trace_of(args, model, executor, fake_quant) as trace:
        # with BOS if the vocabulary adds it, as llama-perplexity has it
        some = args.chunk_order == "first" and args.chunks > 0 and args.ctx_size > 0
        limit = args.chunks * args.ctx_size if some else None
        tokens = model.tokenizer.encode(text, limit=limit)
        measurement = Perplexity(
            model,
            tokens,
            n_ctx=args.ctx_size,
            chunks=args.chunks,
            chunk_order=args.chunk_order,
            chunk_seed=args.chunk_seed,
            fake_quant=fake_quant,
            baseline=not args.no_baseline,
            control=args.control,
            executor=executor,
            batch=args.batch_size,
            trace=trace,
            activations=args.activations,
            baseline_activations=args.baseline_activations,
            realisations=args.realisations,
        )
        if args.chunks > measurement.n_chunks:
            print(
                f"fq: the text has {measurement.n_chunks} chunks of {args.ctx_size}, not {args.chunks}",
                file=sys.stderr,
            )
        interrupted = False
        failed: NotFiniteError | None = None
        told: set[int] = set()
        try:
            for _ in show.progress(measurement):
                for i, where in measurement.not_finite.items():
                    if i not in told:
                        show.note(not_finite_text(measurement.streams[i].name, where))
                        told.add(i)
        except KeyboardInterrupt:
            interrupted = True
        except NotFiniteError as e:
            failed = e
            if not measurement.done:
                raise
    seconds = time.perf_counter() - start
    if interrupted:
        print(
            f"fq: interrupted after {measurement.done} of {measurement.n_chunks} chunks: "
            "this is a partial result",
            file=sys.stderr,
        )
        if not measurement.done:
            return INTERRUPTED
    data = measurement.result() | {
        "text": text_name,
        "seconds": seconds,
        "numerics": numerics(executor, args.activations),
    }
    print(show.perplexity_text(data), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(data, args.json)
    if failed:
        raise failed
    return INTERRUPTED if interrupted else NOT_FINITE if told else 0
