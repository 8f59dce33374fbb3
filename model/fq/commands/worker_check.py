"""fq worker-check."""

from __future__ import annotations

import argparse
import os
import queue
import time
from typing import Any

from fq_kernels import CONTRACT

from ..cluster import worker
from ..cluster.dask_pool import dask_pool
from ..errors import BAD_INPUT, FqError
from ..provenance import sha256_of
from ..words import table
from .files import write_json
from .on_workers import files_of, job_of
from .options import SCHEDULER_VARIABLE, add_model, add_scheduler, open_model

LOOK_SECONDS = 0.2
SECONDS = 60.0  # for all to answer; a large model's digest takes a while


def add_options(parser: argparse.ArgumentParser) -> None:
    add_scheduler(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=SECONDS,
        metavar="SECONDS",
        help="for workers to be there, and to answer (default %(default)g)",
    )
    parser.add_argument("--json", metavar="FILE", help="write it as JSON to FILE, or - for stdout")
    add_model(parser)


def main(args: argparse.Namespace) -> int:
    where = args.scheduler or os.environ.get(SCHEDULER_VARIABLE)
    if not 0 < args.timeout < 1e6:
        raise FqError(f"--timeout must be a number of seconds, not {args.timeout:g}")
    if not where:
        raise FqError(f"worker-check needs --scheduler, or {SCHEDULER_VARIABLE}")
    model = open_model(args.model, args.offline)
    job = job_of(files_of(model, sha256_of(*model.file.paths)), args.worker_model_dir)
    answers: queue.SimpleQueue[tuple[str, Any, BaseException | None]] = queue.SimpleQueue()
    with dask_pool(where) as pool:
        end = time.monotonic() + args.timeout
        while not (names := pool.workers()) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        handles = []  # what is asked is forgotten with its handle
        for address in names:

            def done(result: Any, error: BaseException | None, address: str = address) -> None:
                answers.put((address, result, error))

            handles.append(pool.start(address, done, worker.describe, job))
        found: dict[str, dict[str, Any]] = {}
        while len(found) < len(names):
            try:
                address, result, error = answers.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                break
            found[address] = {"error": f"{type(error).__name__}: {error}"} if error else result
    data = [_entry(name, found.get(address)) for address, name in names.items()]
    if args.json != "-":
        print(_text(data))
    if args.json:
        write_json("worker-check", {"workers": data}, args.json)
    if not data:
        raise FqError(f"{where} has no workers")
    return 0 if all(one["ready"] for one in data) else BAD_INPUT


def _entry(name: str, about: dict[str, Any] | None) -> dict[str, Any]:
    why: str | None
    if about is None:
        why = "does not answer"
    elif "error" in about:
        why = about["error"]
    elif about["contract"] != CONTRACT:
        why = f"its contract of numerics is {about['contract']}, not {CONTRACT}"
    else:
        why = about.get("lacks")
    return {"worker": name, "ready": why is None, "why": why} | (about or {})


def _text(data: list[dict[str, Any]]) -> str:
    rows = [["worker", "processor", "instructions", "threads", "contract", "fq", "model"]]
    for one in data:
        row = [one["worker"]]
        if "machine" in one:
            row += [
                str(one["machine"].get("processor", "")),
                one["isa"],
                str(one["threads"]),
                one["contract"],
            ]
            row.append(one["versions"]["fq"])
        else:
            row += [""] * 5
        rows.append([*row, one["model"] if one["ready"] else f"not ready: {one['why']}"])
    return table(rows, {3})
