"""A sweep on many processes: whether the figures stay the same whatever becomes of them, and what it costs.

same      1, 2, 4 and 8 workers, and shards merged in random orders, beside one process
killed    two of three workers killed at random moments, ten times
cut       three hosts (network namespaces): a scheduler, two with a worker, a link cut for 20 s
overhead  a cluster of one worker with two threads, and of two with one, beside one process, in turns
cost      what a task and its results weigh, and how many of them a store takes

The exit status is 1 where figures differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from fq import Model, find
from fq.cluster.worker import Job, Left
from fq.commands.files import read_text
from fq.commands.on_workers import files_of, job_of
from fq.machine import processor
from fq.measure.cells import COUNT_COLUMNS, CellChunk, cells_of
from fq.measure.statistics import Paired
from fq.measure.sweep import Sweep
from fq.results.run import Run
from fq.results.runs import Results
from fq_kernels import Executor, isa

NOT_COMPARED = ("started", "machine", "command")  # and of the numerics the instruction set and threads
SHARDS, KILLINGS, TURNS = 5, 10, 3
ADDRESSES = {"fq-a": "10.77.0.1", "fq-b": "10.77.0.2", "fq-c": "10.77.0.3"}
PORT, CUT_AFTER, CUT_SECONDS = 8786, 5.0, 20.0
GROUP, GROUPS = 32, 64  # cells of a made-up task, and tasks that are written


@dataclass
class Bench:
    command: list[str]
    folder: Path
    differs: bool = False
    whole: str = ""

    def store(self, name: str) -> Path:
        return self.folder / f"{name}.sqlite"

    def begin(self, name: str, *options: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        program = [
            *prefix,
            sys.executable,
            "-m",
            "fq",
            *self.command,
            "--store",
            str(self.store(name)),
            *options,
        ]
        return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, name: str, *options: str) -> float:
        """Seconds of the whole process."""
        start = time.perf_counter()
        process = self.begin(name, *options)
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(errors)
        return time.perf_counter() - start

    def figures(self, name: str) -> str:
        program = [
            sys.executable,
            "-m",
            "fq",
            "results",
            "1",
            "--store",
            str(self.store(name)),
            "--json",
            "-",
        ]
        data = json.loads(subprocess.run(program, check=True, capture_output=True).stdout)
        data["numerics"] = {k: v for k, v in data["numerics"].items() if k not in ("isa", "threads")}
        return json.dumps({key: value for key, value in data.items() if key not in NOT_COMPARED})

    def compare(self, name: str) -> str:
        same = self.figures(name) == self.whole
        self.differs |= not same
        return "the same" if same else "**other figures**"


def same(bench: Bench) -> None:
    print("| | figures |\n| --- | --- |")
    for n in (1, 2, 4, 8):
        name = f"{n}-workers"
        bench.run(name, "--scheduler", f"local:{n}", "-t", "1")
        print(f"| {n} worker{'s' * (n > 1)} | {bench.compare(name)} |", flush=True)
    shards = [f"shard-{i}" for i in range(1, SHARDS + 1)]
    for i, name in enumerate(shards, 1):
        bench.run(name, "--shard", f"{i}/{SHARDS}")
    rng, found = random.Random(0), set()
    for k in range(5):
        order = [str(bench.store(name)) for name in rng.sample(shards, SHARDS)]
        program = [sys.executable, "-m", "fq", "results", "merge", str(bench.store(f"merged-{k}")), *order]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        found.add(bench.compare(f"merged-{k}"))
    print(f"| {SHARDS} shards, merged in 5 random orders | {', '.join(sorted(found))} |\n", flush=True)


def killed(bench: Bench, seconds: float) -> None:
    import psutil

    found, n = [], 0
    for k in range(KILLINGS):
        rng, name = random.Random(k), f"killed-{k}"
        process = bench.begin(name, "--scheduler", "local:3", "-t", "1")
        start, moments = time.monotonic(), sorted(rng.uniform(1.5, seconds) for _ in range(2))
        while process.poll() is None and moments:
            if time.monotonic() - start < moments[0]:
                time.sleep(0.02)
                continue
            moments.pop(0)
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            if workers:
                rng.choice(workers).kill()
                n += 1
        _, errors = process.communicate()
        found.append(bench.compare(name) if process.returncode == 0 else errors)
    print(
        f"{KILLINGS} runs on 3 workers, {n} of which were killed (-9): {', '.join(sorted(set(found)))}",
        flush=True,
    )


@contextlib.contextmanager
def hosts() -> Iterator[Callable[[str, bool], None]]:
    """Three namespaces, the first with a bridge to both others; yields what takes a link up or down."""

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, stderr=None if check else subprocess.DEVNULL)

    first, *others = ADDRESSES
    for name in ADDRESSES:
        ip("netns", "del", name, check=False)
    try:
        for name in ADDRESSES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", first, "link", "add", "bridge", "type", "bridge")
        ip("-n", first, "addr", "add", f"{ADDRESSES[first]}/24", "dev", "bridge")
        ip("-n", first, "link", "set", "bridge", "up")
        for name in others:
            ip(
                "link",
                "add",
                f"to-{name}",
                "netns",
                first,
                "type",
                "veth",
                "peer",
                "name",
                "out",
                "netns",
                name,
            )
            ip("-n", first, "link", "set", f"to-{name}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "out")
            ip("-n", name, "link", "set", "out", "up")
        yield lambda name, up: ip("-n", first, "link", "set", f"to-{name}", "up" if up else "down")
    finally:
        for name in ADDRESSES:
            ip("netns", "del", name, check=False)


def cut(bench: Bench) -> None:
    first, *others = ADDRESSES
    running: list[subprocess.Popen[bytes]] = []

    def dask(host: str, *words: str) -> None:
        module = f"distributed.cli.dask_{'scheduler' if host == first else 'worker'}"
        program = [
            "ip",
            "netns",
            "exec",
            host,
            sys.executable,
            "-m",
            module,
            "--host",
            ADDRESSES[host],
            *words,
        ]
        running.append(subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    address = f"tcp://{ADDRESSES[first]}:{PORT}"
    with hosts() as link:
        try:
            dask(first, "--port", str(PORT), "--no-dashboard")
            time.sleep(3)
            for host in others:
                dask(host, address, "--nthreads", "1", "--name", host, "--no-dashboard")
            process = bench.begin("cut", "--scheduler", address, prefix=["ip", "netns", "exec", first])
            start, ends = time.monotonic(), []
            for after, up in ((CUT_AFTER, False), (CUT_AFTER + CUT_SECONDS, True)):
                time.sleep(max(after - (time.monotonic() - start), 0))
                link(others[0], up)
                ends.append(process.poll() is None)
            _, errors = process.communicate()
            seconds = time.monotonic() - start
        finally:
            for one in running:
                one.kill()
                one.wait()
    assert process.returncode == 0, errors
    assert all(ends), "the run ended before the link was up again"
    gone = sum("is gone" in line for line in errors.splitlines())
    what = f"the link of one of two workers cut for {CUT_SECONDS:.0f} s of {seconds:.0f}"
    print(f"{what}: {bench.compare('cut')}; workers that were taken for gone: {gone}\n", flush=True)


def overhead(bench: Bench) -> None:
    ways = {
        "one process, 2 threads": ("-t", "2"),
        "1 worker with 2 threads": ("-t", "2", "--scheduler", "local:1"),
        "2 workers with 1 thread": ("-t", "1", "--scheduler", "local:2"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS):
        for name, options in ways.items():
            seconds[name].append(bench.run(f"{name}-{turn}".replace(" ", "-"), *options))
    plain = next(iter(ways))
    print("| | whole process, median | beside one process |\n| --- | --: | --: |")
    for name, own in seconds.items():
        ratio = median(a / b for a, b in zip(own, seconds[plain], strict=True))
        print(f"| {name} | {median(own):.1f} s | {ratio:.3f} |")
    print()


def cost(bench: Bench, model: Model, tokens: Sequence[int], chunks: int) -> None:
    n_scored, rng = 255, np.random.default_rng(0)

    def left(k: int) -> CellChunk:
        base = np.random.default_rng(1).random((2, n_scored))
        figures = rng.random((3, n_scored))
        paired = Paired(base[0], *figures, rng.random(n_scored) > 0.5, base[1])
        return CellChunk(paired, rng.random((1, len(COUNT_COLUMNS))))

    with Executor(1) as executor:
        cells = cells_of(model, ["*"], ["bf16"])
        sweep = Sweep(model, tokens, cells, executor=executor, chunks=chunks)
        job: Job = job_of(files_of(model, "0" * 64), None, sweep=sweep)
    found = Left.of(0, {k: left(k) for k in range(GROUP)}, {})
    with Results(bench.store("writes")) as store:
        number = store.add(bench_run(bench))
        groups = [{k: left(k) for k in range(GROUP)} for _ in range(4)]
        start = time.perf_counter()
        for g in range(GROUPS):
            with store.writing():
                for k, one in groups[g % 4].items():
                    store.put(number, g * GROUP + k, 0, one)
        rate = GROUPS * GROUP / (time.perf_counter() - start)
    task = len(pickle.dumps((job.key, 0, tuple(range(GROUP))))) / 1e3
    size = bench.store("writes").stat().st_size / GROUPS / GROUP / 1e3
    print("| | |\n| --- | --: |")
    print(f"| the job, to each worker once ({len(cells)} cells) | {len(pickle.dumps(job)) / 1e3:.0f} kB |")
    print(f"| a task of {GROUP} cells, there | {task:.2f} kB |")
    print(f"| its results, back: by cell | {len(pickle.dumps(found)) / GROUP / 1e3:.1f} kB |")
    print(f"| chunks of cells that one coordinator writes a second | {rate:.0f} |")
    print(f"| a store, by chunk of a cell | {size:.1f} kB |")


def bench_run(bench: Bench) -> Run:
    """A run as a store has it: that of the plain sweep."""
    with Results(bench.store("whole")) as store:
        return store.get(1)


def main(argv: Sequence[str] | None = None) -> int:
    parts = ("same", "killed", "cut", "overhead", "cost")
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("-m", "--model", default="smollm2", metavar="MODEL")
    parser.add_argument("-f", "--file", required=True, metavar="FILE")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="of cut and overhead (default 8)")
    parser.add_argument("--few", type=int, default=2, metavar="N", help="of same and killed (default 2)")
    parser.add_argument("--only", action="append", choices=parts, help="default: all")
    args = parser.parse_args(argv)
    # the commands of the run are compared too: no folder of this one is in them
    wanted, differs = args.only or parts, False
    command = ["sweep", "-m", args.model, "-f", args.file, "--format", "bf16:stochastic", "--chunks"]
    print(f"{processor()}, {isa()}, {os.cpu_count()} processors; fq {' '.join(command)} N\n")
    for chunks, some in ((args.few, ("same", "killed")), (args.chunks, ("cut", "overhead", "cost"))):
        if not set(some) & set(wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench([*command, str(chunks)], Path(folder))
            seconds = bench.run("whole")
            bench.whole = bench.figures("whole")
            if "same" in wanted and "same" in some:
                same(bench)
            if "killed" in wanted and "killed" in some:
                killed(bench, seconds)
            if "cut" in wanted and "cut" in some:
                cut(bench)
            if "overhead" in wanted and "overhead" in some:
                overhead(bench)
            if "cost" in wanted and "cost" in some:
                model = Model(find(args.model))
                cost(bench, model, model.tokenizer.encode(read_text(args.file)[0]), chunks)
            differs |= bench.differs
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
