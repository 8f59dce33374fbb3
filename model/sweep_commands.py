"""fq sweep, fq results."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import machine
from .commands import (
    INTERRUPTED,
    _check_target,
    _executor,
    _find_model,
    _numerics,
    _read_text,
    _write,
    _write_json,
)
from .errors import FqError
from .noise import noise_format, register_noise_in
from .results import Results, Run, sha256_of
from .runner import Model
from .show import table
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
    formats = args.format or ["bf16"]
    if args.noise:
        formats = [*formats, *map(noise_format, formats)]
    cells = cells_of(model, args.sites or [DEFAULT_SITES], formats, cumulative=args.cumulative)
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
        about = Run(
            sha256_of(model.path),
            hashlib.sha256(text.encode()).hexdigest(),
            run.cells,
            run.about() | {"text": text_name, "command": args.command_line},
            _numerics(executor, args.activations) | {"blas": _blas()},
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
            data = _figures(store, number)
    if interrupted:
        print(
            f"fq: interrupted after {data['n_chunks']} of {run.text.n} chunks: this is a partial result; "
            "--resume goes on",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - start
    print(f"fq: {seconds:.1f} s, {executor.threads} threads; run {number} of {args.store}", file=sys.stderr)
    _show(data, args.json)
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


def _figures(store: Results, number: int) -> dict[str, Any]:
    run = store.get(number)
    register_noise_in(rule for cell in run.cells for rule in cell.rules)
    return {"run": number} | figures(run.about, run.cells, store.load(number))


def results(args: argparse.Namespace) -> int:
    for option in ("json", "csv"):
        _check_target(f"--{option}", getattr(args, option))
    with Results(args.store, must_exist=True) as store:
        if args.run is None:
            if args.csv:
                raise FqError("--csv needs the number of a run")
            runs = store.list()
            if args.json != "-":
                print(_list_text(runs))
            if args.json:
                _write_json(runs, args.json)
            return 0
        data = _figures(store, args.run)
    if "-" not in (args.json, args.csv):
        print(sweep_text(data))
    if args.json:
        _write_json(data, args.json)
    if args.csv == "-":
        sys.stdout.write(_csv(data))
    elif args.csv:
        _write(_csv(data), args.csv)
    return 0


def _list_text(runs: Any) -> str:
    rows = [["run", "started", "model", "text", "cells", "chunks", "ended"]]
    for run in runs:
        ended = "all" if run["ended"] == run["of"] else f"{100 * run['ended'] // run['of']} %"
        model, text = os.path.basename(run["model"]), os.path.basename(run["text"] or "")
        counts = [str(run["n_cells"]), str(run["n_chunks_asked"])]
        rows.append([str(run["run"]), run["started"], model, text, *counts, ended])
    return table(rows, {0, 4, 5, 6})


def _csv(data: dict[str, Any]) -> str:
    """A line per cell: the comparison's single figures, and both ends of its intervals."""
    lines = []
    for cell in data["cells"]:
        best, worst = cell.get("rank", (None, None))
        line = {key: cell[key] for key in ("name", "kind", "group")} | {"rank": best, "rank_worst": worst}
        for key, value in cell["comparison"].items():
            if key.endswith("_ci95_chunks"):
                line[f"{key}_low"], line[f"{key}_high"] = value or (None, None)
            elif not isinstance(value, dict):
                line[key] = value
        lines.append(line)
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return out.getvalue()


def _show(data: dict[str, Any], json_target: str | None) -> None:
    # with --json - stdout is for JSON alone
    print(sweep_text(data), file=sys.stderr if json_target == "-" else sys.stdout)
    if json_target:
        _write_json(data, json_target)
