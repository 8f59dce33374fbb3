"""fq perplexity."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fq_kernels.rules import calibrations_of

from ..errors import FqError
from ..measure.base_file import BaseFile, save_base
from ..measure.perplexity import Perplexity
from ..measure.who_pays import who_pays_text
from ..run.finite import not_finite_text
from .files import check_outputs, read_text, text_sha256
from .options import (
    add_base_model,
    add_base_rules,
    add_evaluation,
    add_model,
    add_realisations,
    add_scored,
    add_seed,
    add_text,
    add_trace,
    check_realisations,
    check_run_outputs,
    check_seed,
    executor_of,
    inputs_of,
    numerics,
    open_model,
    say_if_short,
    settings_of,
    trace_of,
)
from .outcome import Outcome, print_figures
from .progress import by_chunk, note
from .rules import add_fake_quant, base_rules_of, fake_quant_of
from .show import perplexity_text

N_CTX = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    add_text(parser)
    add_scored(parser)
    parser.add_argument(
        "--baseline-activations",
        choices=("exact", "ggml"),
        help="the baseline's activations, where they are to differ from --activations",
    )
    add_base_model(
        parser,
        "as the baseline: what -m costs beside it, as llama-perplexity's --kl-divergence says, without its "
        "16-bit probabilities",
    )
    add_base_rules(parser)
    parser.add_argument(
        "--kl-divergence-base",
        metavar="FILE",
        help="llama-perplexity's file of log-probabilities: it is written, of the model as it is, or with "
        "--kl-divergence read, in the baseline's place",
    )
    parser.add_argument(
        "--kl-divergence",
        action="store_true",
        help="compare the model with what --kl-divergence-base has, on its tokens",
    )
    parser.add_argument("--no-baseline", action="store_true", help="do not run the model without the rule")
    parser.add_argument(
        "--control",
        action="store_true",
        help="also compare the baseline with itself: every difference must be exactly 0",
    )
    parser.add_argument(
        "--who-pays",
        action="store_true",
        help="also show whose the KL divergence is: of few tokens or of all, by place and by the baseline's "
        "confidence",
    )
    add_realisations(parser)
    add_model(parser)
    add_seed(parser, "stochastic rounding and dither")
    add_evaluation(parser, N_CTX, "tokens per chunk")
    add_trace(parser)
    add_fake_quant(parser)
    parser.set_defaults(ctx_size=None)  # the file of --kl-divergence has its own


def main(args: argparse.Namespace) -> int:
    check_run_outputs(args)
    check_seed(args)
    check_realisations(args)
    base_file = _base_file(args)
    args.ctx_size = N_CTX if args.ctx_size is None else args.ctx_size
    writes = args.kl_divergence_base is not None and base_file is None
    _check_base(args, writes)
    text, text_name = read_text(args.file) if base_file is None else ("", base_file.path)
    start = time.perf_counter()
    model = open_model(args.model, args.offline)
    fake_quant = fake_quant_of(args, model)
    for option in ("baseline_activations", "base_model", "base_fake_quant", "kl_divergence"):
        if args.no_baseline and getattr(args, option):
            raise FqError(f"--{option.replace('_', '-')} needs the baseline")
    if args.base_model and args.trace:
        raise FqError("--trace is of one model, without --base-model")
    base_model = open_model(args.base_model, args.offline) if args.base_model else None
    base_rules = base_rules_of(args, base_model or model)
    if fake_quant is None and args.no_baseline:
        raise FqError("--no-baseline without a rule leaves nothing to run")
    if writes and (fake_quant or base_model or base_rules or args.baseline_activations or args.control):
        raise FqError("--kl-divergence-base is written of a model as it is: no rules, no other baseline")
    settings = settings_of(args)
    with executor_of(args.threads) as executor, trace_of(args, model, executor, fake_quant) as trace:
        if base_file is None:
            # with BOS if the vocabulary adds it, as llama-perplexity has it
            some = args.chunk_order == "first" and args.chunks > 0 and args.ctx_size > 0
            limit = args.chunks * args.ctx_size if some else None
            tokens = np.asarray(model.tokenizer.encode(text, limit=limit))
        else:
            tokens = base_file.tokens
            settings = replace(settings, n_ctx=base_file.n_ctx, chunk_order="first", chunk_seed=None)
        measurement = Perplexity(
            model,
            tokens,
            settings=settings,
            fake_quant=fake_quant,
            baseline=not args.no_baseline,
            control=args.control,
            executor=executor,
            trace=trace,
            baseline_activations=args.baseline_activations,
            base_model=base_model,
            base_fake_quant=base_rules,
            base_file=base_file,
            realisations=args.realisations,
        )
        if args.who_pays and not (measurement.with_stream and measurement.with_baseline):
            raise FqError("--who-pays: nothing is compared with the baseline")
        say_if_short(args, measurement.n_chunks, measurement.n_ctx)
        outcome = Outcome()
        told: set[int] = set()
        with outcome.watched(), _saved(args.kl_divergence_base if writes else None, measurement):
            for _ in by_chunk(measurement):
                for i, where in measurement.not_finite.items():
                    if i not in told:
                        note(not_finite_text(measurement.streams[i].name, where))
                        told.add(i)
        outcome.lost = bool(told)
    seconds = time.perf_counter() - start
    outcome.say(f"{measurement.done} of {measurement.n_chunks} chunks")
    if not measurement.done:
        return outcome.status
    data = measurement.result() | {
        "text": text_name,
        "seconds": seconds,
        "numerics": numerics(executor, args.activations),
    }
    rules = [rule for some in (fake_quant, base_rules) if some is not None for rule in some.rules]
    if found := calibrations_of(rules, text_sha256(text)):
        data["calibrations"] = found
    shown = perplexity_text(data)
    if args.who_pays and "comparison" in data:
        shown += "\n\n" + "\n".join(who_pays_text(data["comparison"]["who_pays"], data["largest_tokens"]))
    print_figures("perplexity", shown, data, args.json)
    return outcome.status


def _base_file(args: argparse.Namespace) -> BaseFile | None:
    """What --kl-divergence reads. Raises FqError for options that say otherwise."""
    if not args.kl_divergence:
        return None
    if args.kl_divergence_base is None:
        raise FqError("--kl-divergence needs --kl-divergence-base FILE")
    for option in ("file", "ctx_size", "base_model", "base_fake_quant", "baseline_activations", "chunk_seed"):
        if getattr(args, option) not in (None, []):
            raise FqError(f"--{option.replace('_', '-')}: the tokens and the baseline are the file's")
    return BaseFile(args.kl_divergence_base)


def _check_base(args: argparse.Namespace, writes: bool) -> None:
    """That no output is the baseline's file, and no other's place."""
    inputs, base = inputs_of(args), args.kl_divergence_base
    if base and not writes:
        inputs["the baseline's file"] = base
    if writes and base == "-":
        raise FqError("--kl-divergence-base -: takes a file")
    if writes and args.scored != "second-half":
        raise FqError("--kl-divergence-base has the second half of each chunk: nothing else can be scored")
    outputs = {"--json": args.json, "--trace": args.trace}
    check_outputs(outputs | ({"--kl-divergence-base": base} if writes else {}), inputs)


@contextlib.contextmanager
def _saved(path: str | None, measurement: Perplexity) -> Iterator[None]:
    """The baseline's log-probabilities in a file once all chunks have ended."""
    if path is None:
        yield
        return
    text, n = measurement.text, measurement.n_ctx
    tokens = np.concatenate([text.tokens[i * n : (i + 1) * n] for i in text.indices])
    n_vocab = measurement.model.hparams.n_vocab
    with save_base(path, n, n_vocab, tokens, measurement.executor) as writer:
        measurement.on_logits = writer.add
        yield
