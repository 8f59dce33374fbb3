"""fq sensitivity."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from itertools import combinations, starmap
from typing import Any

from fq_kernels.rules import calibrations_of, parse_rule

from .. import machine
from ..errors import FqError
from ..measure.estimates import dearest, estimated, gains_in_need, marks_of, to_verify
from ..measure.sensitivity import DEFAULT_FORMATS, Sensitivity, gain_cells
from ..provenance import sha256_of
from ..results.estimated import measured
from ..results.run import Run
from ..results.runs import Results, stored_figures
from .exact import Exact, pair, single
from .files import check_outputs, read_text, text_sha256
from .options import (
    add_evaluation,
    add_memory_limit,
    add_model,
    add_scored,
    add_seed,
    add_store,
    add_text,
    check_seed,
    executor_of,
    inputs_of,
    memory_limit_of,
    numerics,
    open_model,
    say_if_short,
    settings_of,
    store_files,
)
from .outcome import Outcome, print_figures
from .progress import progress
from .show_sensitivity import sensitivity_text

N_CTX, N_CHUNKS, SAMPLES, VERIFY = 512, 8, 4, 24


def add_options(parser: argparse.ArgumentParser) -> None:
    add_text(parser, chunks=str(N_CHUNKS))
    parser.set_defaults(chunks=None)  # N_CHUNKS, or as many as the run that --resume goes on with
    add_scored(parser)
    parser.add_argument(
        "--sites",
        action="append",
        metavar="SITES",
        help="as on a rule's left side; may be repeated (default: every site that the model has)",
    )
    parser.add_argument(
        "--format",
        action="append",
        metavar="FORMAT",
        help="as on a rule's right side; may be repeated (default: "
        f"{len(DEFAULT_FORMATS)} formats and roundings)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        metavar="N",
        help="labels drawn for each scored token: backward passes of a chunk (default %(default)s)",
    )
    parser.add_argument(
        "--verify",
        type=int,
        default=VERIFY,
        metavar="N",
        help="cells that are measured exactly too, across sizes, kinds of sites and formats: without them "
        "nothing is known of the estimate's own error, and there are no intervals (default %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=0,
        metavar="N",
        help="of each format the N dearest sites are also measured exactly two at a time, and alone: whether "
        "their costs add up; N * (N + 1) / 2 cells a format (default: none)",
    )
    parser.add_argument(
        "--gain-chunks",
        type=int,
        metavar="N",
        help="chunks on which is measured what a change of each site's scale costs, -1 for all (default: as "
        "few as its part of the estimates needs)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run in the store on the same model, text, sites, formats and settings, "
        "however it ended, over its chunks, or as many as --chunks where that is more",
    )
    add_memory_limit(parser)
    add_store(parser)
    add_model(parser)
    add_seed(parser, "labels and stochastic rounding")
    add_evaluation(parser, N_CTX, "tokens per chunk")


def main(args: argparse.Namespace) -> int:
    check_seed(args)
    if args.gain_chunks is not None and (args.gain_chunks == 0 or args.gain_chunks < -1):
        raise FqError(f"--gain-chunks must be positive, or -1 for all, not {args.gain_chunks}")
    for option, value in (("--verify", args.verify), ("--pairs", args.pairs)):
        if value < 0:
            raise FqError(f"{option} must be >= 0, not {value}")
    if args.pairs == 1:
        raise FqError("--pairs needs at least 2 sites")
    memory_limit_of(args.memory_limit)
    check_outputs(store_files("--store", args.store) | {"--json": args.json}, inputs_of(args))
    text, text_name = read_text(args.file)
    model = open_model(args.model, args.offline)
    tokens = model.tokenizer.encode(text)
    start = time.perf_counter()
    with executor_of(args.threads) as executor:

        def estimate_of(chunks: int) -> Sensitivity:
            return Sensitivity(
                model,
                tokens,
                args.sites or [],
                args.format,
                executor=executor,
                samples=args.samples,
                seed=args.seed,
                settings=replace(settings_of(args), chunks=chunks),
            )

        estimate = estimate_of(N_CHUNKS if args.chunks is None else args.chunks)
        say_if_short(args, estimate.text.n)
        about = _about(args, estimate, text_name, text_sha256(text), executor)
        outcome = Outcome()
        with Results(args.store) as store:
            number, run, was = store.begin(about, _more(args, about) if args.resume else None)
            if was is not None and run.settings["n_chunks_asked"] != estimate.text.n:
                estimate = estimate_of(run.settings["n_chunks_asked"])
            if was is not None:
                estimate.finished.update(store.load_estimates(number))
            if args.resume:
                print(_going_on(store, number, estimate, was), file=sys.stderr)
            limit, left = memory_limit_of(args.memory_limit), store.load(number)
            exact = Exact(model, tokens, estimate.settings, executor, limit, store, number, run, left)
            with outcome.watched():
                n = estimate.text.n

                def line(chunk: int) -> str:
                    return f"gradients: chunk {chunk + 1}/{n}"

                for chunk in progress(estimate, line, line):
                    store.save_estimates(number, chunk, estimate.finished[chunk])
                _measure_gains(exact, estimate, args.gain_chunks)
                _verify(exact, estimate, args.verify)
                _pairs(exact, estimate, args.pairs)
            outcome.lost = exact.lost
            data = stored_figures(store, number)
    outcome.say(f"{data['n_chunks']} of {estimate.text.n} chunks", "; --resume goes on")
    seconds = time.perf_counter() - start
    print(f"fq: {seconds:.1f} s, {executor.threads} threads; run {number} of {args.store}", file=sys.stderr)
    print_figures("sensitivity", sensitivity_text(data), data, args.json)
    return outcome.status


def _measure_gains(exact: Exact, estimate: Sensitivity, asked_for: int | None) -> None:
    """Of each class on so many chunks, or as many as its part of an estimate needs."""
    asked, n = estimate.asked, estimate.text.n
    cells = gain_cells(asked)
    if asked_for is not None:
        exact.measure(list(cells.values()), n if asked_for == -1 else min(asked_for, n), "scales")
        return
    need, chunks = list(cells), 1
    while need and chunks <= n:
        exact.measure([cells[key] for key in need], chunks, "scales")
        gains = measured(asked, exact.run.cells, exact.left).gains
        found = estimated(asked, [estimate.finished[c] for c in range(n)], gains)
        wanting = gains_in_need(asked, found, gains)
        need = [key for key in wanting if gains.chunks.get(key, 0) < n]
        chunks += 1


def _verify(exact: Exact, estimate: Sensitivity, wanted: int) -> None:
    """So many, or those that are there."""
    asked, n = estimate.asked, estimate.text.n
    there = [cell for cell in exact.run.cells if cell.kind == "single"]
    if wanted > len(there):
        gains = measured(asked, exact.run.cells, exact.left).gains
        found = estimated(asked, [estimate.finished[c] for c in range(n)], gains)
        chosen = to_verify(asked, found, marks_of(asked, found), wanted)
        cells = [cell for cell in starmap(single, chosen) if cell not in there]
        there += cells[: wanted - len(there)]
    exact.measure_more(there, n, "exact")


def _pairs(exact: Exact, estimate: Sensitivity, wanted: int) -> None:
    """Of the dearest sites, and those that are there, with what fq plan has chosen."""
    asked, n = estimate.asked, estimate.text.n
    cells = [cell for cell in exact.run.cells if cell.kind in ("pair", "chosen")]
    if wanted:
        gains = measured(asked, exact.run.cells, exact.left).gains
        found = estimated(asked, [estimate.finished[c] for c in range(n)], gains)
        for sites, spec in dearest(asked, found, marks_of(asked, found), wanted):
            cells += [single(site, spec, "chosen") for site in sites]
            cells += [pair(*two, spec) for two in combinations(sites, 2)]
    exact.measure_more(list(dict.fromkeys(cells)), n, "pairs")


def _about(
    args: argparse.Namespace, estimate: Sensitivity, text_name: str, digest: str, executor: Any
) -> Run:
    asked = estimate.asked
    # each is of its file, whatever the site
    found = calibrations_of([parse_rule(f"{asked.sites[0]}={spec}") for spec in asked.formats], digest)
    return Run(
        sha256_of(*estimate.model.file.paths),
        digest,
        tuple(gain_cells(asked).values()),
        estimate.text.about_run()
        | {"text": text_name, "command": args.command_line, "sensitivity": asdict(asked)}
        | ({"calibrations": found} if found else {}),
        numerics(executor, args.activations),
        machine.versions(),
        machine.describe(),
    )


def _more(args: argparse.Namespace, about: Run) -> Run:
    """What a run that is gone on with has to have."""
    if args.chunks is not None:
        return about
    return replace(about, settings=about.settings | {"n_chunks_asked": 0, "chunk_indices": []})


def _going_on(store: Results, number: int, estimate: Sensitivity, was: Run | None) -> str:
    if was is None:
        return f"fq: {store.path} has no such run to go on with: a new one"
    return f"fq: going on with run {number}: {len(estimate.finished)} of {estimate.text.n} chunks are there"
