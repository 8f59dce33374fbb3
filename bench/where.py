"""Where an evaluation's time goes, per kind of node, and how far products are from the machine's limits.

Each round evaluates a prompt, and then tokens one by one in the order of decoding, and measures the
limits in between: fused multiply-adds in registers, and reading the packed weights for nothing else.
Operations are those of products with weights, and of attention those of the tokens that each token sees.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from fq import Context, Executor, FqError, Model, find, machine
from fq.arch.graph import AttentionAttributes, Node, Op

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
PRODUCTS, REST, WHOLE = "all products", "before and after", "whole evaluation"
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


def kinds_of(model: Model) -> list[str]:
    """What each node is counted under; products by the weights that are read together, and their types."""
    kinds = [NAMES.get(node.op, node.op.value.lower()) for node in model.graph.nodes]
    following = model.graph.products_following()
    for i, node in enumerate(model.graph.nodes):
        if kinds[i] != Op.MUL_MAT.value.lower():
            continue
        group = [(i, node), *following[id(node)]]
        weights = [product.weight or "" for _, product in group]
        names = [re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in weights]
        types = dict.fromkeys(model.weights[name].type.name for name in weights)
        for k, _ in group:
            kinds[k] = f"products with {', '.join(names)}, {'/'.join(types)}"
    return kinds


def timed(context: Context, ids: Sequence[int], *, decoding: bool = False) -> tuple[float, list[float]]:
    """An evaluation's seconds, whole and node by node. Products of one value are made at its first."""
    ends: list[float] = []
    context.on_node = lambda: ends.append(perf_counter())
    begin = perf_counter()
    context.eval(ids, decoding=decoding)
    return perf_counter() - begin, np.diff([begin, *ends]).tolist()


def attended(node: Node, n_before: int, n_tokens: int) -> int:
    """Operations of attention's two products, where so many tokens come after so many others."""
    attributes = node.attributes
    assert isinstance(attributes, AttentionAttributes)
    seen = range(n_before + 1, n_before + n_tokens + 1)[-node.n_tokens(n_tokens, 1) :]
    pairs = sum(min(n, attributes.window or n) for n in seen)
    return 4 * pairs * node.shape[1]


def parts_of(
    model: Model, n_tokens: int, evaluations: Sequence[tuple[float, list[float]]], n_before: int = 0
) -> dict[str, Part]:
    """Evaluations of so many tokens, by kind of node.

    n_before  how many came before these: of evaluations that go on, their mean
    """
    parts: dict[str, Part] = defaultdict(Part)
    kinds = kinds_of(model)
    for kind, node in zip(kinds, model.graph.nodes, strict=True):
        names = [kind]
        if node.op is Op.MUL_MAT and node.weight:
            names.append(PRODUCTS)
            weight = model.weights[node.weight]
            for name in names:
                parts[name].flops += 2 * node.n_tokens(n_tokens, 1) * weight.n_in * weight.n_out
                parts[name].bytes += weight.packed.nbytes
        if node.op is Op.ATTENTION:
            parts[kind].flops += attended(node, n_before, n_tokens)
        for name in names:
            parts[name].calls += 1
    for whole, seconds in evaluations:
        sums: dict[str, float] = defaultdict(float)
        for kind, node, value in zip(kinds, model.graph.nodes, seconds, strict=True):
            sums[kind] += value
            if node.op is Op.MUL_MAT:
                sums[PRODUCTS] += value
        sums[WHOLE], sums[REST] = whole, whole - sum(seconds)
        for name, value in sums.items():
            parts[name].seconds.append(value)
    parts[WHOLE].calls = len(kinds)
    parts[WHOLE].flops = parts[PRODUCTS].flops + parts[NAMES[Op.ATTENTION]].flops
    parts[WHOLE].bytes = parts[PRODUCTS].bytes
    return dict(parts)


def measure(model: Model, threads: int, rounds: int, limits: Limits) -> list[Table]:
    """The table of a prompt and that of one token."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.hparams.n_vocab, N_PROMPT).tolist()
    first, single = ids[:N_FIRST], ids[N_FIRST : N_FIRST + N_SINGLE]
    packed = [model.weights[n.weight].packed for n in model.graph.nodes if n.op is Op.MUL_MAT and n.weight]
    peaks, streams = [], []
    prompts, tokens = [], []
    with Executor(threads) as executor:
        context = Context(model, N_PROMPT, executor)
        context.eval(ids)  # the file is in memory from here on
        for _ in range(rounds):
            peaks.append(limits.fma(executor))
            context.clear()
            prompts.append(timed(context, ids))
            context.clear()
            context.eval(first)
            for i, token in enumerate(single):
                if i % 4 == 0:
                    streams.append(limits.read(packed, executor))
                    context.eval([token], decoding=True)  # after another use of the caches
                tokens.append(timed(context, [token], decoding=True))
    peak, stream = float(np.median(peaks)), float(np.median(streams))
    parts = {
        N_PROMPT: parts_of(model, N_PROMPT, prompts),
        1: parts_of(model, 1, tokens, N_FIRST + N_SINGLE // 2),
    }
    return [Table(n, threads, found, peak, stream) for n, found in parts.items()]


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
                    tables += measure(model, threads, args.rounds, limits)
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
