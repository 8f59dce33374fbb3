"""fq sweep."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from . import machine
from .commands import INTERRUPTED, _check_target, _executor, _find_model, _numerics, _read_text, _write_json
from .errors import FqError
from .runner import Model
from .sweep import DEFAULT_SITES, Sweep, cells_of
from .sweep_figures import figures, sweep_text

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


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


def sweep(args: argparse.Namespace) -> int:
    _check_target("--json", args.json)
    limit = _memory_limit(args.memory_limit)
    text, text_name = _read_text(args.file)
    start = time.perf_counter()
    model = Model(_find_model(args.model, args.offline))
    cells = cells_of(
        model, args.sites or [DEFAULT_SITES], args.format or ["bf16"], cumulative=args.cumulative
    )
    with _executor(args.threads) as executor:
        run = Sweep(
            model,
            model.tokenizer.encode(text),
            cells,
            n_ctx=args.ctx_size,
            chunks=args.chunks,
            batch=args.batch_size,
            executor=executor,
            activations=args.activations,
            memory_limit=limit,
        )
        if args.chunks > run.text.n:
            print(
                f"fq: the text has {run.text.n} chunks of {args.ctx_size}, not {args.chunks}", file=sys.stderr
            )
        about = run.about() | {"command": args.command_line, "text": text_name}
        about["numerics"] = _numerics(executor, args.activations)
        interrupted = False
        try:
            for _ in _progress(run):
                pass
        except KeyboardInterrupt:
            interrupted = True
    data = figures(about, cells, run.finished)
    if interrupted:
        print(
            f"fq: interrupted after {data['n_chunks']} of {run.text.n} chunks: this is a partial result",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - start
    print(f"fq: {seconds:.1f} s, {executor.threads} threads", file=sys.stderr)
    _show(data, args.json)
    return INTERRUPTED if interrupted else 0


def _show(data: dict[str, Any], json_target: str | None) -> None:
    # with --json - stdout is for JSON alone
    print(sweep_text(data), file=sys.stderr if json_target == "-" else sys.stdout)
    if json_target:
        _write_json(data, json_target)
