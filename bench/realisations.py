"""Whether dither scatters a perplexity as other batches and summation orders do.

A rounding is a step function: where the sums before it are added in another order, by another batch
or instruction set, single roundings fall on the other side, and after some layers the errors are
others. Each such run is a realisation of the same rounding; so is each seed of its dither. For every
chunk the table has the standard deviation of ln(PPL ratio) over the realisations of each sort. A third
sort moves what is rounded by a unit in float32's last place: any summation order, as it were.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fq_kernels import Executor, force_isa, get_format, isa, register_format
from fq_kernels.dither import uniform
from fq_kernels.formats import unregister_format
from fq_kernels.rules import FakeQuant, Rule
from model import FqError, Model, Stream, Streams, find

Ratios = npt.NDArray[np.float64]  # (realisations, chunks): ln(PPL ratio)

# (instruction set, tokens per evaluation); None: the best there is, all tokens of a chunk. With
# scalar kernels numpy's BLAS multiplies, where the best ones may not need it.
ORDERS = ((None, None), (None, 8), (None, 7), ("scalar", None), ("scalar", 16))
Z = 1.96


@contextmanager
def _forced(name: str | None) -> Iterator[None]:
    before = isa()
    if name is not None:
        force_isa(name)
    try:
        yield
    finally:
        force_isa(before)


@contextmanager
def moved(spec: str, n: int) -> Iterator[list[str]]:
    """n formats that round to ``spec`` what is moved by at most a unit in the last place."""
    names = [f"moved_{k}" for k in range(n)]
    try:
        for k, name in enumerate(names):

            def fn(x: npt.NDArray[np.float32], seed: int = k) -> npt.NDArray[np.float32]:
                towards = np.copysign(np.float32(np.inf), uniform(x, seed) - 0.5).astype(np.float32)
                return get_format(spec).quantise(np.nextafter(x, towards)).values

            register_format(name, fn)
        yield names
    finally:
        for name in names:
            unregister_format(name)


def ratios(
    model: Model, tokens: npt.NDArray[np.int64], rules: Sequence[str], args: argparse.Namespace, batch: int
) -> Ratios:
    """Of each rule and chunk."""
    with Executor(args.threads) as executor:
        run = Streams(
            model,
            tokens,
            [Stream(rule, FakeQuant(model.norms, rule)) for rule in rules],
            n_ctx=args.ctx_size,
            chunks=args.chunks,
            batch=batch,
            executor=executor,
        )
        for chunk in run:
            print(f"chunk {chunk + 1} of {run.n_chunks}, {len(rules)} rules", file=sys.stderr, flush=True)
        each = [run.paired_of(i) for i in range(len(rules))]
    return np.array([[(pair.nll - pair.nll_base).mean() for pair in pairs] for pairs in each])


def sorts(model: Model, tokens: npt.NDArray[np.int64], args: argparse.Namespace) -> dict[str, Ratios]:
    """{sort of realisation: its ratios}; those that came out the same to the last bit count once."""
    rule = Rule.parse(args.rule)
    sites, spec = str(rule).split("=", 1)
    many = args.ctx_size
    dithered = [f"{sites}={spec}{',' if ':' in spec else ':'}dither,seed={k}" for k in range(args.seeds)]
    found = {"dithers": ratios(model, tokens, dithered, args, many)}
    with moved(spec, args.seeds) as names:
        found["one unit in the last place"] = ratios(
            model, tokens, [f"{sites}={name}" for name in names], args, many
        )
    rows = []
    for name, batch in ORDERS:
        with _forced(name):
            rows.append(ratios(model, tokens, [str(rule)], args, batch or many)[0])
    found["batches and instruction sets"] = np.unique(rows, axis=0)
    return found


def pooled(values: Ratios) -> tuple[float, float]:
    """(variance over realisations, averaged over chunks; its degrees of freedom after Satterthwaite)."""
    each = values.var(axis=0, ddof=1)
    return float(each.mean()), float((len(values) - 1) * each.sum() ** 2 / np.square(each).sum())


def against(values: Ratios, dithers: Ratios) -> tuple[float, float, float]:
    """The standard deviation over that of dithers, with a 95 % interval as for chi-square variances."""
    (one, n), (other, m) = pooled(values), pooled(dithers)
    ratio, width = math.sqrt(one / other), math.exp(Z * math.sqrt(1 / (2 * n) + 1 / (2 * m)))
    return ratio, ratio / width, ratio * width


def markdown(found: dict[str, Ratios]) -> str:
    dithers = found["dithers"]
    chunks = range(dithers.shape[1])
    head = [
        "realisations of",
        "n",
        *(f"chunk {i + 1}" for i in chunks),
        "pooled",
        "over that of dithers",
        "mean",
    ]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for name, values in found.items():
        if len(values) < 2:
            lines.append([name, str(len(values)), *[""] * (len(head) - 2)])
            continue
        ratio, low, high = against(values, dithers)
        lines.append(
            [
                name,
                str(len(values)),
                *(f"{s:.1e}" for s in values.std(axis=0, ddof=1)),
                f"{math.sqrt(pooled(values)[0]):.1e}",
                "1" if values is dithers else f"{ratio:.2f} ({low:.2f} to {high:.2f})",
                f"{values.mean():+.1e}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.realisations", description=__doc__)
    parser.add_argument("-m", "--model", default="smollm2", help="GGUF file or alias (default: %(default)s)")
    parser.add_argument("-f", "--file", type=Path, required=True, help="text, UTF-8")
    parser.add_argument("-c", "--ctx-size", type=int, default=128, metavar="N", help="tokens per chunk")
    parser.add_argument("--chunks", type=int, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, metavar="K", help="dithers (default: %(default)s)")
    parser.add_argument("--rule", default="ffn_norm=bf16", help="(default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.seeds < 2:
            raise FqError(f"--seeds must be at least 2, not {args.seeds}")
        model = Model(find(args.model))
        tokens = np.asarray(model.tokenizer.encode(args.file.read_text(encoding="utf-8")))
        found = sorts(model, tokens, args)
    except (FqError, ValueError, OSError) as e:
        print(f"bench.realisations: {e}", file=sys.stderr)
        return 2
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
