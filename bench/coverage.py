"""How often the intervals and orders that fq reports hold the truth.

The truth is the mean over all chunks of a long text. The values of each chunk are kept (coverage.npz); from
them runs of fewer chunks are drawn, as `--chunk-order random --chunk-seed SEED` draws them, and what
fq's own functions say of a run is held against the truth. ``--measure`` makes the kept values anew.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fq import FqError, Model, Sweep, find, machine
from fq.measure.cells import Cell
from fq.measure.chunks import chunk_order, n_scored_per_chunk
from fq.measure.inference import (
    LEVEL,
    Interval,
    Ordering,
    agreement_interval,
    mean_interval,
    positive_interval,
    ratio_test,
    realisations_test,
)
from fq_kernels import Executor

KEPT = Path(__file__).with_name("coverage.npz")
SIZES = (4, 6, 8, 16, 32)
N_CTX = 512
LATE = (27, 28, 29)
TOGETHER = "ffn_norm[27-29].raw=bf16"
SINGLES = tuple(f"ffn_norm[{layer}].raw=bf16" for layer in LATE)
RULES = (
    "ffn_norm[*].raw=bf16",
    *SINGLES,
    TOGETHER,
    *(f"ffn_norm[27-29].raw={fmt}" for fmt in ("int8", "mxfp4", "fp8_e4m3fn")),
    "output_norm.raw=bf16",
)
# one rule, five seeds: which of them is larger is a matter of chance alone
SEEDS = tuple(f"ffn_norm[29].raw=bf16:stochastic,seed={seed}" for seed in range(5))
# and with a chunk in ten weighing a thousand times the others, as where a cell is carried by few chunks
N_CHUNKS = 592
CARRYING = np.where(np.random.default_rng(0).random(N_CHUNKS) < 0.1, 1000.0, 1.0)


@dataclass(frozen=True)
class Values:
    """Of each chunk of the text (chunks, cells): float64, float64, and how many tokens agree."""

    mean_kld: np.ndarray
    ln_ppl_ratio: np.ndarray
    same_top: np.ndarray


def measure(text: Path, threads: int) -> None:
    """All cells over all chunks, into KEPT."""
    model = Model(find("smollm2"))
    cells = [Cell(rule, "single", rule, (rule,)) for rule in (*RULES, *SEEDS)]
    with Executor(threads) as executor:
        run = Sweep(
            model,
            model.tokenizer.encode(text.read_text(encoding="utf-8")),
            cells,
            n_ctx=N_CTX,
            chunk_order="first",
            executor=executor,
        )
        values = np.empty((3, run.text.n, len(cells)))
        for cell, chunk in run:
            paired = run.finished[cell, chunk].paired
            change = float((paired.nll - paired.nll_base).mean())
            values[:, chunk, cell] = paired.kld.mean(), change, paired.same_top.sum()
            if cell == len(cells) - 1:
                print(f"[{chunk + 1}/{run.text.n}]", file=sys.stderr, flush=True)
    np.savez_compressed(
        KEPT,
        cells=np.array([cell.name for cell in cells]),
        mean_kld=values[0],
        ln_ppl_ratio=values[1],
        same_top=values[2].astype(np.uint8),
    )


def load() -> Values:
    with np.load(KEPT) as file:
        assert tuple(file["cells"]) == (*RULES, *SEEDS)
        assert len(file["mean_kld"]) == N_CHUNKS
        return Values(file["mean_kld"], file["ln_ppl_ratio"], file["same_top"].astype(int))


def exchanged(values: np.ndarray, seed: int) -> np.ndarray:
    """The columns of SEEDS, (chunks, seeds), in each chunk in an order of its own.

    So that no seed has a truth of its own: what tells them apart afterwards is chance.
    """
    rng = np.random.default_rng(seed)
    return rng.permuted(values[:, len(RULES) :], axis=1)


# ---------------------------------------------------------------- what is held against the truth

Found = dict[str, list[bool]]


def _within(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return interval[0] <= truth <= interval[1]


def _of_draw(v: Values, chunks: list[int], seed: int) -> Iterator[tuple[str, bool]]:
    """(what, whether it holds) of one run over these chunks; what is named "false" is whether it errs."""
    kld, change = v.mean_kld[chunks], v.ln_ppl_ratio[chunks]
    for i, rule in enumerate(RULES):
        yield f"mean KL: {rule}", _within(positive_interval(kld[:, i]), v.mean_kld[:, i].mean())
        yield f"ln ratio: {rule}", _within(mean_interval(change[:, i]), v.ln_ppl_ratio[:, i].mean())
    for a, b in pairwise(range(len(RULES))):
        test = ratio_test(kld[:, a], kld[:, b])
        assert test is not None
        truth = v.mean_kld[:, a].mean() / v.mean_kld[:, b].mean()
        yield f"ratio: {RULES[a]} / {RULES[b]}", _within(test.interval, truth)
    single = [RULES.index(rule) for rule in SINGLES]
    sums, whole = kld[:, single].sum(axis=1), RULES.index(TOGETHER)
    test = ratio_test(kld[:, whole], sums)
    assert test is not None
    truth = v.mean_kld[:, whole].mean() / v.mean_kld[:, single].sum(axis=1).mean()
    yield f"additivity: {TOGETHER}", _within(test.interval, truth)
    # the seeds of one rule
    seeds, changes = exchanged(v.mean_kld, seed)[chunks], exchanged(v.ln_ppl_ratio, seed)[chunks]
    equal = ratio_test(seeds[:, 0], seeds[:, 1])
    assert equal is not None
    yield "false resolved: KL of two seeds", equal.p < LEVEL
    yield (
        "false resolved: ln ratio of two seeds",
        not _within(mean_interval(changes[:, 0] - changes[:, 1]), 0),
    )
    heavy = seeds * CARRYING[chunks, None]
    carried = ratio_test(heavy[:, 0], heavy[:, 1])
    assert carried is not None
    yield "false resolved: KL of two seeds, few chunks carrying both", carried.p < LEVEL
    mine = v.ln_ppl_ratio[chunks, len(RULES) :].T
    of_seeds = realisations_test(mine)
    assert of_seeds is not None
    truth = float(v.ln_ppl_ratio[:, len(RULES) :].mean())
    yield "ln ratio of five seeds: ffn_norm[29].raw=bf16:stochastic", _within(of_seeds.interval, truth)
    rules = len(RULES)  # behind them the seeds, of which each order is false
    order, truths = Ordering(np.hstack([kld[:, :rules], seeds]).T), v.mean_kld.mean(axis=0)
    wrong = [
        order.apart(i, j) and (j >= rules <= i or order.costs_more(i, j) != (truths[i] > truths[j]))
        for i, j in order.pairs
    ]
    yield "false order: any, in a sweep of all cells", any(wrong)
    alike = Ordering(seeds.T)
    yield "false order: any, in a sweep of the five seeds", alike.n_resolved > 0


def _agreement(v: Values, chunks: list[int], seed: int) -> Iterator[tuple[str, bool]]:
    tokens = n_scored_per_chunk(N_CTX)
    for i, rule in enumerate(RULES):
        truth = v.same_top[:, i].mean() / tokens
        yield f"same top: {rule}", _within(agreement_interval(v.same_top[chunks, i], tokens), truth)


Holds = Callable[[Values, list[int], int], Iterator[tuple[str, bool]]]


def _count(job: tuple[Holds, int, range]) -> dict[str, int]:
    holds, n, seeds = job
    v, counts = load(), dict[str, int]()
    for seed in seeds:
        for what, held in holds(v, chunk_order(len(v.mean_kld), seed)[:n], seed):
            counts[what] = counts.get(what, 0) + held
    return counts


def shares(holds: Holds, n: int, draws: int, processes: int) -> dict[str, float]:
    """How often each thing is so in runs of n chunks, of as many seeds as draws."""
    parts = [range(i, min(i + 250, draws)) for i in range(0, draws, 250)]
    total: dict[str, int] = {}
    with ProcessPoolExecutor(processes) as pool:
        for counts in pool.map(_count, [(holds, n, part) for part in parts]):
            for what, count in counts.items():
                total[what] = total.get(what, 0) + count
    return {what: count / draws for what, count in total.items()}


def neighbours(v: Values, n: int) -> dict[str, float]:
    """Of every run of n chunks that follow one another."""
    found: dict[str, list[bool]] = {}
    for start in range(len(v.mean_kld) - n + 1):
        chunks = list(range(start, start + n))
        for i, rule in enumerate(RULES):
            for what, ok in (
                (
                    f"mean KL: {rule}",
                    _within(positive_interval(v.mean_kld[chunks, i]), v.mean_kld[:, i].mean()),
                ),
                (
                    f"ln ratio: {rule}",
                    _within(mean_interval(v.ln_ppl_ratio[chunks, i]), v.ln_ppl_ratio[:, i].mean()),
                ),
            ):
                found.setdefault(what, []).append(ok)
    return {what: float(np.mean(held)) for what, held in found.items()}


# ---------------------------------------------------------------- the table


def _line(name: str, found: Sequence[dict[str, float]]) -> str:
    cells = [f"{100 * f[name]:.1f}" if name in f else "" for f in found]
    kind, _, what = name.partition(": ")
    return f"| {kind} | {what if ' ' in what and '=' not in what else f'`{what}`'} | {' | '.join(cells)} |"


def table(by_size: dict[int, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for found in by_size.values() for name in found))
    head = ["", "", *(f"n = {n}" for n in by_size)]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' --: |' * len(by_size)}"]
    return "\n".join([*lines, *(_line(name, list(by_size.values())) for name in names)])


def failures(by_size: dict[int, dict[str, float]]) -> list[str]:
    """What is not as asked for."""
    found = []
    for n, values in by_size.items():
        for name, share in values.items():
            if share > 0.06 if name.startswith("false") else share < 0.92:
                found.append(f"{name}, n = {n}: {100 * share:.1f} %")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="make the kept values anew: an hour or two")
    parser.add_argument("-f", "--file", type=Path, help="text for --measure: wiki.test.raw")
    parser.add_argument("--draws", type=int, default=10_000, metavar="N", help="seeds (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=machine.default_threads(), metavar="N")
    args = parser.parse_args(argv)
    try:
        if args.measure:
            if args.file is None:
                parser.error("--measure needs -f TEXT")
            measure(args.file, args.threads)
        v = load()
    except (FqError, OSError) as e:
        print(f"bench.coverage: {e}", file=sys.stderr)
        return 2
    found = {n: shares(_of_draw, n, args.draws, args.threads) for n in SIZES}
    some = max(args.draws // 10, 1)
    agreement = {n: shares(_agreement, n, some, args.threads) for n in SIZES}
    error = 100 * math.sqrt(0.95 * 0.05 / args.draws)
    print(
        f"Of {args.draws} runs each, in per cent; Monte-Carlo error {error:.2f} at 95. Random chunks of the "
        f"{len(v.mean_kld)} that the text has:\n\n{table(found)}\n\n"
        f"Of {some} runs each (error {100 * math.sqrt(0.95 * 0.05 / some):.1f}), tokens with the same top "
        f"token:\n\n{table(agreement)}\n\n"
        f"Every run of neighbouring chunks instead:\n\n{table({n: neighbours(v, n) for n in SIZES})}"
    )
    bad = failures(found) + failures(agreement)
    for line in bad:
        print(f"\nNOT as asked for: {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
