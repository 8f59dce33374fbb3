"""One table of all that the kernels are compared with: ``python -m bench.report --help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

import fq_kernels
from fq import FqError, machine
from fq.commands.files import check_outputs, write
from fq_kernels._kernels import _dispatch_ns

from .cases import LEVELS, OPS, Bench, Op, Place, ggml_oracle, rows_in
from .harness import Contestant, alternate, own_processors, quartiles

# every operation is timed at this length, and the most important ones at all lengths
MAIN_LENGTH = 2048
LENGTHS = (64, 512, 2048, 8192)

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Settings:
    """How much is timed."""

    isas: tuple[str, ...]
    threads: tuple[int, ...] = (1, 2)
    lengths: tuple[int, ...] = LENGTHS
    levels: tuple[str, ...] = LEVELS
    memory: int = 256 << 20  # bytes of x and out where they are to be far beyond the caches
    rounds: int = 40
    turn: float = 2e-3
    pin: bool = True


def quick(settings: dict) -> Settings:
    """Not for figures to be kept: a few seconds, and little memory."""
    best = (fq_kernels.supported_isas()[-1],)
    small = {"isas": best, "memory": 16 << 20, "rounds": 7, "turn": 2e-4}
    return Settings(
        **{**small, "lengths": (64, MAIN_LENGTH), "levels": ("one row", "L2", "memory"), **settings}
    )


@dataclass
class Result:
    """Seconds per call, and ratios of times taken in the same rounds: (lower quartile, median, upper)."""

    op: str
    by: str  # an instruction set of ours, or another library
    n: int | None
    rows: int | None
    level: str
    threads: int
    seconds: Quartiles
    ratios: dict[str, Quartiles] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return (self.n or 0) * (self.rows or 0)

    def as_json(self) -> dict:
        rate = {"gelem_s": None, "gb_s": None}
        if self.elements:
            gelem = self.elements / self.seconds[1] / 1e9
            rate = {"gelem_s": gelem, "gb_s": 8 * gelem}
        return asdict(self) | rate


def result(op: str, by: str, place: Place, level: str, times: dict[str, np.ndarray]) -> Result:
    """The contestant ``by`` against all others that took part."""
    ratios = {other: quartiles(t / times[by]) for other, t in times.items() if other != by}
    return Result(op, by, place.n, place.rows, level, place.threads, quartiles(times[by]), ratios)


def places(settings: Settings) -> Iterator[tuple[str, Place]]:
    for n in settings.lengths:
        for level in settings.levels:
            if level == "L3" and n != MAIN_LENGTH:
                continue
            for threads in settings.threads:
                rows = rows_in(level, n, settings.memory, threads)
                # what fits in L1 is not shared among threads
                if rows and (threads == 1 or level not in ("one row", "L1")):
                    yield level, Place(n, rows, threads)


def ops_at(place: Place) -> list[Op]:
    everywhere = ("rms_norm", "rms_norm, bf16")
    return [op for name, op in OPS.items() if name in everywhere or place.n == MAIN_LENGTH]


def isas_for(op: Op, place: Place, settings: Settings) -> tuple[str, ...]:
    """Each instruction set for the plain norm, and for the bare necessities of the others."""
    full = op.name == "rms_norm" or (place.n == MAIN_LENGTH and op.name in ("rms_norm, bf16", "round trip"))
    return settings.isas if full else settings.isas[-1:]


def measure(settings: Settings) -> Iterator[Result]:
    def run(level: str, contestants: dict[str, Contestant | None]) -> dict[str, np.ndarray]:
        there = {name: c for name, c in contestants.items() if c is not None}
        # far beyond the caches one call is a turn many times as long, and varies less
        rounds = -(-settings.rounds // 3) if level == "memory" else settings.rounds
        return alternate(there, rounds, turn=settings.turn)

    for level, place in places(settings):
        for op in ops_at(place):
            with Bench(op, place, pin=settings.pin) as bench:
                for isa in isas_for(op, place, settings):
                    against = {isa: bench.ours(isa), "ggml": bench.ggml(), "memcpy": bench.memcpy()}
                    if op.quant:
                        against["unfused"] = bench.ours(isa, unfused=True)
                    if place.threads > 1:
                        against["one thread"] = bench.ours(isa, one_thread=True)
                    yield result(op.name, isa, place, level, run(level, against))
                if place.n != MAIN_LENGTH or op.quant or op.in_place:
                    continue
                others = {"ggml": bench.ggml(), "memcpy": bench.memcpy(), "torch": bench.torch()}
                if place.threads == 1:
                    others["numpy"] = bench.numpy()
                times = run(level, others)
                for by in times:
                    if by == "memcpy" and (place.threads > 1 or op.name != "rms_norm"):
                        continue  # always the same one
                    yield result(op.name if by != "memcpy" else "copy", by, place, level, times)
    yield from measure_dispatch(settings)


def measure_dispatch(settings: Settings) -> Iterator[Result]:
    scale = settings.rounds * 5
    for threads in settings.threads:
        with fq_kernels.Executor(threads) as executor, ExitStack() as stack:
            if settings.pin and threads > 1:
                stack.enter_context(own_processors(partial(executor.map, int, threads)))
            for name, repeats, options in (
                ("back to back", 100 * scale, {}),
                ("after 10 µs", 20 * scale, {"gap_ns": 10_000}),
                ("after 1 ms", scale, {"gap_ns": 1_000_000}),
                ("until all threads work", scale, {"gap_ns": 10_000, "meet": True}),
            ):
                ns = _dispatch_ns(executor, repeats + repeats // 10, **options)[repeats // 10 :]
                op = f"empty task, {name}"
                yield Result(op, "executor", None, None, "", threads, quartiles(ns * 1e-9))


# ---------------------------------------------------------------- the table

COLUMNS = {
    "operation": "---",
    "by": "---",
    "n": "--:",
    "rows": "--:",
    "data in": "---",
    "threads": "--:",
    "µs": "--:",
    "Gelem/s": "--:",
    "GB/s": "--:",
    "× ggml": "--:",
    "× memcpy": "--:",
    "× unfused": "--:",
    "× one thread": "--:",
}


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(q: Quartiles | None) -> str:
    return f"{q[1]:.2f} ({q[0]:.2f}–{q[2]:.2f})" if q else ""


def _row(r: Result) -> list[str]:
    rate = r.as_json()
    low, middle, high = (_number(s * 1e6) for s in r.seconds)
    return [
        r.op,
        r.by,
        f"{r.n or ''}",
        f"{r.rows or ''}",
        r.level,
        f"{r.threads}",
        f"{middle} ({low}–{high})",
        _number(rate["gelem_s"]) if r.elements else "",
        _number(rate["gb_s"]) if r.elements else "",
        *(_ratio(r.ratios.get(name)) for name in ("ggml", "memcpy", "unfused", "one thread")),
    ]


def table(results: list[Result]) -> str:
    order = {name: i for i, name in enumerate([*OPS, "copy"])}
    rank = {name: i for i, name in enumerate(LEVELS)}
    rows = sorted(
        results,  # stable: at one place in the order of measurement
        key=lambda r: (order.get(r.op, len(order)), r.n or 0, rank.get(r.level, 0), r.threads),
    )
    lines = [list(COLUMNS), list(COLUMNS.values()), *map(_row, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(results: list[Result]) -> str:
    """The figures that one asks for first, where they were taken."""
    best = fq_kernels.supported_isas()[-1]

    def find(op: str, level: str, threads: int, ratio: str) -> Quartiles | None:
        for r in results:
            if (r.op, r.by, r.n, r.level, r.threads) == (op, best, MAIN_LENGTH, level, threads):
                return r.ratios.get(ratio)
        return None

    lines = []
    for level in ("L2", "L3", "memory"):
        for label, op, threads, ratio in (
            ("rms_norm, ggml's time over ours", "rms_norm", 1, "ggml"),
            ("rms_norm, our rate over memcpy's", "rms_norm", 1, "memcpy"),
            ("rms_norm on two threads, speed over one", "rms_norm", 2, "one thread"),
        ):
            if q := find(op, level, threads, ratio):
                lines.append(f"| {label} | {level} | {_ratio(q)} |")
        if q := find("rms_norm, bf16", level, 1, "unfused"):
            # the table has unfused over fused; here the extra time is what one asks for
            extra = (1 / q[2], 1 / q[1], 1 / q[0])
            lines.append(
                f"| rms_norm with bf16 fused in, time over that without | {level} | {_ratio(extra)} |"
            )
    for r in results:
        if r.by == "executor" and r.threads == 2:
            ns = [f"{s * 1e9:.0f}" for s in r.seconds]
            lines.append(f"| {r.op}, 2 threads, ns | | {ns[1]} ({ns[0]}–{ns[2]}) |")
    if not lines:
        return ""
    head = (
        f"Rows of {MAIN_LENGTH}, {best}:\n\n| figure | data in | median (quartiles) |\n| --- | --- | --: |\n"
    )
    return head + "\n".join(lines) + "\n\n"


def markdown(about: dict[str, str], results: list[Result]) -> str:
    machine = "".join(f"- {name}: {value}\n" for name, value in about.items())
    return f"{machine}\n{summary(results)}{table(results)}\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    available = fq_kernels.supported_isas()
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, a few seconds")
    parser.add_argument(
        "--isa", action="append", choices=available, help="an instruction set; may be repeated (default: all)"
    )
    parser.add_argument("--threads", type=int, action="append", choices=(1, 2), help="default: 1 and 2")
    parser.add_argument("--length", type=int, action="append", help="elements of a row; may be repeated")
    parser.add_argument(
        "--level", action="append", choices=LEVELS, help="where the data lie; may be repeated"
    )
    parser.add_argument("--rounds", type=int, help="alternations per case")
    parser.add_argument("--no-pin", action="store_true", help="let the scheduler place the threads")
    parser.add_argument("--json", metavar="FILE", help="write the results there too; - for stdout, alone")
    args = parser.parse_args(argv)
    if any(n < 1 for n in args.length or []) or (args.rounds is not None and args.rounds < 1):
        parser.error("--length and --rounds must be at least 1")
    try:
        check_outputs({"--json": args.json})
    except FqError as e:
        parser.error(str(e))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    chosen = {
        "isas": args.isa and tuple(sorted(args.isa, key=fq_kernels.supported_isas().index)),
        "threads": args.threads and tuple(sorted(set(args.threads))),
        "lengths": args.length and tuple(sorted(set(args.length))),
        "levels": args.level and tuple(sorted(set(args.level), key=LEVELS.index)),
        "rounds": args.rounds,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None} | {"pin": not args.no_pin}
    isas = tuple(fq_kernels.supported_isas())
    settings = quick(chosen) if args.quick else Settings(**{"isas": isas, **chosen})
    about = machine.describe("numpy", "libggml-python", "torch")
    about["libggml built for"] = ", ".join(ggml_oracle.features()) or "the baseline"
    results = []
    for r in measure(settings):
        results.append(r)
        print(f"\r{len(results)} results", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if args.json:
        data = json.dumps({"machine": about, "results": [r.as_json() for r in results]}, indent=1)
        if args.json == "-":
            print(data)
        else:
            write(data + "\n", args.json)
    if args.json != "-":
        print(markdown(about, results))


if __name__ == "__main__":
    main()
