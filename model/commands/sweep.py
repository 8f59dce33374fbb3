"""fq sweep."""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import sys
import time
from collections.abc import Iterator

import numpy as np

from .. import machine
from ..errors import FqError
from ..noise import noise_format
from ..results import Results, Run, sha256_of
from ..runner import Model
from ..sweep import DEFAULT_SITES, Sweep, cells_of
from ..sweep_figures import stored_figures, sweep_text
from .files import check_target, read_text, write_json
from .options import (
    INTERRUPTED,
    add_evaluation,
    add_model,
    add_seed,
    add_store,
    add_text,
    check_seed,
    executor_of,
    find_model,
    numerics,
)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_text(parser)
    parser.add_argument(
        "--sites",
        action="append",
        metavar="SITES",
        help="each site that matches is a cell, as on a rule's left side, and all of them together are "
        "one; may be repeated (default ffn_norm[*].raw)",
    )
    parser.add_argument(
        "--format",
        action="append",
        metavar="FORMAT",
        help="as on a rule's right side; may be repeated (default bf16)",
    )
    parser.add_argument(
        "--cumulative", action="store_true", help="also round the first sites up to each, together"
    )
    parser.add_argument(
        "--noise",
        action="store_true",
        help="also add Gaussian noise of the same length as each row's rounding error, in its place",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run of the same sweep in the store, however it ended",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="such as 500M or 2G: cells are taken in groups that fit (default: half of what is free)",
    )
    add_store(parser)
    add_model(parser)
    add_seed(parser, "stochastic rounding")
    add_evaluation(parser, 512, "tokens per chunk")


def _memory_limit(text: str | None) -> int | None:
    """Bytes; by default half of what is free, or no limit where that is not known."""
    if text is None:
        free = machine.available_memory()
        return None if free is None else free // 2
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise FqError(f"--memory-limit must be a size such as 500M or 2G, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _progress(run: Sweep) -> Iterator[tuple[int, int]]:
    """Run a sweep with a bar on a terminal, a line per chunk elsewhere; both say how long it will take."""
    total, done, start = run.steps, 0, time.perf_counter()
    if sys.stderr.isatty():
        from tqdm import tqdm

        form = "{desc} |{bar}| {percentage:.0f} %, {elapsed}, {remaining} left"
        with tqdm(total=total, file=sys.stderr, leave=False, dynamic_ncols=True, bar_format=form) as bar:
            run.on_step = bar.update
            for cell, chunk in run:
                bar.set_description_str(
                    f"chunk {chunk + 1}/{run.text.n}, cell {cell + 1}/{len(run.cells)}", refresh=False
                )
                yield cell, chunk
        return

    def step() -> None:
        nonlocal done
        done += 1

    run.on_step = step
    for cell, chunk in run:
        yield cell, chunk
        if all((i, chunk) in run.finished for i in range(len(run.cells))):
            elapsed = time.perf_counter() - start
            left = elapsed / done * (total - done)
            print(
                f"[{chunk + 1}/{run.text.n}] {len(run.cells)} cells  {elapsed:.1f} s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def main(args: argparse.Namespace) -> int:
    check_target("--json", args.json)
    check_seed(args)
    limit = _memory_limit(args.memory_limit)
    text, text_name = read_text(args.file)
    start = time.perf_counter()
    model = Model(find_model(args.model, args.offline))
    formats = args.format or ["bf16"]
    if args.noise:
        formats = [*formats, *map(noise_format, formats)]
    cells = cells_of(
        model, args.sites or [DEFAULT_SITES], formats, cumulative=args.cumulative, seed=args.seed
    )
    with executor_of(args.threads) as executor:
        run = Sweep(
            model,
            model.tokenizer.encode(text),
            cells,
            n_ctx=args.ctx_size,
            chunks=args.chunks,
            chunk_order=args.chunk_order,
            chunk_seed=args.chunk_seed,
            batch=args.batch_size,
            executor=executor,
            activations=args.activations,
            memory_limit=limit,
        )
        if args.chunks > run.text.n:
            print(
                f"fq: the text has {run.text.n} chunks of {args.ctx_size}, not {args.chunks}", file=sys.stderr
            )
        about = Run(
            sha256_of(model.path),
            hashlib.sha256(text.encode()).hexdigest(),
            run.cells,
            run.about() | {"text": text_name, "command": args.command_line},
            numerics(executor, args.activations) | {"blas": _blas()},
            {
                "fq": machine.package_version("fq") or "not installed",
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            machine.describe(),
        )
        interrupted = False
        with Results(args.store) as store:
            number = _begin(store, about, run, args.resume)
            try:
                for cell, chunk in _progress(run):
                    store.save(number, cell, chunk, run.finished[cell, chunk])
            except KeyboardInterrupt:
                interrupted = True
            data = stored_figures(store, number)
    if interrupted:
        print(
            f"fq: interrupted after {data['n_chunks']} of {run.text.n} chunks: this is a partial result; "
            "--resume goes on",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - start
    print(f"fq: {seconds:.1f} s, {executor.threads} threads; run {number} of {args.store}", file=sys.stderr)
    # with --json - stdout is for JSON alone
    print(sweep_text(data), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(data, args.json)
    return INTERRUPTED if interrupted else 0


def _begin(store: Results, about: Run, run: Sweep, resume: bool) -> int:
    """The run's number in the store; with resume its last one of the same bits, and what that has left."""
    number = store.last_like(about) if resume else None
    if number is None:
        if resume:
            print(f"fq: {store.path} has no such run to go on with: a new one", file=sys.stderr)
        return store.add(about)
    run.finished.update(store.load(number))
    print(
        f"fq: going on with run {number}: {len(run.finished)} of {len(run.cells) * run.text.n} "
        "chunks of cells are there",
        file=sys.stderr,
    )
    return number


def _blas() -> list[str]:
    """The BLAS libraries in use and the processors that they take this one for."""
    from threadpoolctl import threadpool_info

    found = (info for info in threadpool_info() if info["user_api"] == "blas")
    return sorted({f"{i['internal_api']} {i['version']} {i.get('architecture', '')}".strip() for i in found})
