"""Where an evaluation's time goes, per kind of node, and how far products are from the machine's limits.

Each round evaluates a prompt and then tokens one by one, with and without a trace, and measures the
limits in between: fused multiply-adds in registers, and reading the packed weights for nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fq import Context, Executor, FqError, Model, find, machine
from fq.arch.graph import Node, Op
from fq.run.trace import EVAL, Trace, provenance

from .limits import Limits

N_PROMPT = 512
N_FIRST, N_SINGLE = 16, 16  # tokens evaluated one by one in a round, and those before them
NAMES = {
    Op.RMS_NORM: "norms",
    Op.ADD: "adds",
    Op.ROPE: "rope",
    Op.ATTENTION: "attention",
    Op.SWIGLU: "swiglu",
    Op.GET_ROWS: "rows of weights and logits",
    Op.OUT_ROWS: "rows of weights and logits",
}
PRODUCTS, REST, WHOLE = "all products", "between nodes", "whole evaluation"
COLUMNS = {
    "tokens": "--:",
    "threads": "--:",
    "what": "---",
    "calls": "--:",
    "ms": "--:",
    "share, %": "--:",
    "GFLOP/s": "--:",
    "of peak, %": "--:",
    "GB/s": "--:",
    "of stream, %": "--:",
}


@dataclass
class Part:
    """A kind of node in evaluations of one size."""

    seconds: list[float] = field(default_factory=list)  # one value an evaluation
    calls: int = 0
    flops: int = 0  # of one evaluation
    bytes: int = 0  # packed weights read by one evaluation

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass
class Table:
    """What was measured with one number of threads and of tokens."""

    tokens: int
    threads: int
    parts: dict[str, Part]
    peak: float  # operations per second
    stream: float  # bytes per second


def kind_of(node: Node, model: Model) -> str:
    """What a node's time is counted under; products by their weight's name and type."""
    if node.op is not Op.MUL_MAT:
        return NAMES.get(node.op, node.op.value.lower())
    assert node.weight is not None
    role = node.weight.removesuffix(".weight")
    role = role.split(".", 2)[2] if role.startswith("blk.") else role
    return f"product with {role}, {model.weights[node.weight].type.name}"


def evaluations(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The events of the nodes of each evaluation in a trace."""
    events: list[dict[str, Any]] = []
    for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
        if event["ph"] != "X":
            continue
        if event["cat"] == EVAL:
            yield events
            events = []
        else:
            events.append(event)


def parts_of(traces: Sequence[list[dict[str, Any]]], whole: Sequence[float], model: Model) -> dict[str, Part]:
    """Traced evaluations by kind of node; ``whole`` are the seconds of the same without a trace.

    What a trace costs lies between the nodes, so what is there is taken from those without.
    """
    nodes = {(node.name, node.op.value): node for node in model.graph.nodes}
    parts: dict[str, Part] = defaultdict(Part)
    for i, events in enumerate(traces):
        seconds: dict[str, float] = defaultdict(float)
        for event in events:
            node = nodes[event["name"], event["cat"]]
            kind = kind_of(node, model)
            names = [kind]
            weight = model.weights[node.weight] if node.op is Op.MUL_MAT and node.weight else None
            if weight:
                names.append(PRODUCTS)
            for name in names:
                seconds[name] += event["dur"] * 1e-6
                if i == 0:
                    parts[name].calls += 1
                    if weight:
                        parts[name].flops += 2 * event["args"]["rows"] * weight.n_in * weight.n_out
                        parts[name].bytes += weight.packed.nbytes
        for name, value in seconds.items():
            parts[name].seconds.append(value)
    total = Part(list(whole), sum(p.calls for name, p in parts.items() if name != PRODUCTS))
    in_nodes = sum(p.median for name, p in parts.items() if name != PRODUCTS)
    return {**parts, WHOLE: total, REST: Part([total.median - in_nodes])}


def _timed(context: Context, ids: Sequence[int]) -> float:
    begin = perf_counter()
    context.eval(ids)
    return perf_counter() - begin


def measure(model: Model, threads: int, rounds: int, limits: Limits, folder: Path) -> list[Table]:
    """The table of a prompt and that of one token."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.hparams.n_vocab, N_PROMPT).tolist()
    first, single = ids[:N_FIRST], ids[N_FIRST : N_FIRST + N_SINGLE]
    packed = [model.weights[n.weight].packed for n in model.graph.nodes if n.op is Op.MUL_MAT and n.weight]
    peaks, streams = [], []
    whole: dict[int, list[float]] = {N_PROMPT: [], 1: []}
    files = {n: folder / f"{n}-{threads}.json" for n in whole}
    with Executor(threads) as executor:
        context = Context(model, N_PROMPT, executor)
        about = provenance(model, executor)
        context.eval(ids)  # the file is in memory from here on
        with Trace(files[N_PROMPT], about) as prompt_trace, Trace(files[1], about) as single_trace:
            for _ in range(rounds):
                for trace in (None, prompt_trace):
                    peaks.append(limits.fma(executor))
                    context.clear()
                    context.trace = trace
                    seconds = _timed(context, ids)
                    if trace is None:
                        whole[N_PROMPT].append(seconds)
                # 2 x N_SINGLE tokens, traced and not in turn: neither gets the longer context
                context.clear()
                context.trace = None
                context.eval(first)
                for i, token in enumerate(single * 2):
                    if i % 4 == 0:
                        streams.append(limits.read(packed, executor))
                        context.trace = None
                        context.eval([token])  # after another use of the caches
                    context.trace = single_trace if i % 2 else None
                    seconds = _timed(context, [token])
                    if context.trace is None:
                        whole[1].append(seconds)
    peak, stream = float(np.median(peaks)), float(np.median(streams))
    return [
        Table(n, threads, parts_of(list(evaluations(files[n])), whole[n], model), peak, stream) for n in whole
    ]


# ---------------------------------------------------------------- text


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def lines_of(table: Table) -> list[list[str]]:
    whole = table.parts[WHOLE].median
    head = (WHOLE, PRODUCTS)
    order = sorted((n for n in table.parts if n not in head), key=lambda n: -table.parts[n].median)
    lines = []
    for name in (*head, *order):
        part = table.parts[name]
        s = part.median
        line = [str(table.tokens), str(table.threads), name, str(part.calls or ""), _figure(s * 1e3)]
        line.append(f"{100 * s / whole:.1f}")
        # many tokens are bound by arithmetic, one by reading weights
        flops, read = (part.flops / s, part.bytes / s) if part.flops else (0.0, 0.0)
        line += [_figure(flops / 1e9), f"{100 * flops / table.peak:.0f}"] if flops else ["", ""]
        few = table.tokens == 1 and read
        line += [_figure(read / 1e9), f"{100 * read / table.stream:.0f}"] if few else ["", ""]
        lines.append(line)
    return lines


def markdown(about: dict[str, str], tables: Sequence[Table]) -> str:
    head = "".join(f"- {name}: {value}\n" for name, value in about.items())
    for threads in dict.fromkeys(t.threads for t in tables):
        table = next(t for t in tables if t.threads == threads)
        size = table.parts[PRODUCTS].bytes / 1e6
        head += (
            f"- limits with {threads} thread{'s' if threads > 1 else ''}: "
            f"peak {table.peak / 1e9:.0f} GFLOP/s, "
            f"stream {table.stream / 1e9:.1f} GB/s ({size:.0f} MB of packed weights)\n"
        )
    lines = [list(COLUMNS), list(COLUMNS.values()), *(line for t in tables for line in lines_of(t))]
    return f"{head}\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.where", description=__doc__)
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        metavar="FILE",
        help="GGUF file or alias; may be repeated (default: smollm2)",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    if min(args.rounds, *args.threads) < 1:
        parser.error("--threads and --rounds must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    words = [os.path.basename(w) if os.path.isabs(w) else w for w in (sys.argv[1:] if argv is None else argv)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            limits = Limits(Path(folder))
            about = {"command": f"`{shlex.join(['python', '-m', 'bench.where', *words])}`"}
            about |= machine.describe("fq", "numpy")
            for name in args.model or ["smollm2"]:
                model = Model(find(name))
                tables = []
                for threads in args.threads:
                    tables += measure(model, threads, args.rounds, limits, Path(folder))
                stem = Path(model.path).stem
                print(markdown(about | {"model": stem}, tables), flush=True)
                about = {}  # it stands above the first table alone
    except (FqError, ValueError, OSError) as e:
        print(f"bench.where: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
