"""Whether dither scatters a perplexity as other summation orders do.

A rounding is a step function: where the sums before it are added in another order, by another program,
single roundings fall on the other side, and after some layers the errors are others. Each such run is a
realisation of the same rounding; so is each seed of its dither. For every chunk the first table has the
standard deviation of ln(PPL ratio) over the realisations of each sort. fq itself has one order alone;
any other is stood for by what is rounded moved by a unit in float32's last place.

The second table says how far two realisations of a sort have the same rounding errors: the correlation of
rounded minus unrounded over all elements of one chunk. Were every site's errors to count alike, and
those of dithers to have none in common, the standard deviation would be sqrt(1 - correlation) of dithers'.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fq import FqError, Model, Stream, Streams, find
from fq_kernels import Executor, get_format, register_format, rms_norm_f32
from fq_kernels.formats import unregister_format
from fq_kernels.formats.dither import uniform
from fq_kernels.rules import FakeQuant, Place, Rule, Site, Value

Ratios = npt.NDArray[np.float64]  # (realisations, chunks): ln(PPL ratio)

Errors = dict[Place, npt.NDArray[np.float32]]  # of the first chunk, (rows, n_embd) at each site

KEPT = 3  # realisations of a sort whose errors are kept
SHOWN = 6  # sites in the table
Z = 1.96


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


class Recorder(FakeQuant):
    """A rule that keeps the errors of its sites while it is ``recording``."""

    def __init__(self, values: Sequence[Value], rule: str, *, recording: bool) -> None:
        super().__init__(values, rule)
        self.recording, self._kept = recording, dict[Place, list[npt.NDArray[np.float32]]]()

    def rms_norm(
        self,
        norm: Place,
        x: np.ndarray,
        **options: Any,
    ) -> np.ndarray:
        (rule,) = self.rules
        site = self.counters[Site(norm, rule.point)]
        if site.format is not None and self.recording:
            own = {"eps": options["eps"], "weight": options["weight"] if rule.point == "weighted" else None}
            plain = rms_norm_f32(x, **own)
            rounded = rms_norm_f32(x, quant=site.format, point=rule.point, first_row=site.rows_seen, **own)
            self._kept.setdefault(norm, []).append(rounded - plain)
        return super().rms_norm(norm, x, **options)

    @property
    def errors(self) -> Errors:
        return {norm: np.concatenate(parts) for norm, parts in self._kept.items()}


class Found(NamedTuple):
    """Of one sort: what its realisations gave, and the errors of some of them."""

    ratios: Ratios
    errors: list[Errors]


def ratios(
    model: Model,
    tokens: npt.NDArray[np.int64],
    rules: Sequence[str],
    args: argparse.Namespace,
    batch: int,
    kept: Sequence[int],
) -> Found:
    """Of each rule and chunk; the errors of the rules numbered in ``kept``."""
    sides = [Recorder(model.values, rule, recording=i in kept) for i, rule in enumerate(rules)]
    with Executor(args.threads) as executor:
        run = Streams(
            model,
            tokens,
            [Stream(rule, side) for rule, side in zip(rules, sides, strict=True)],
            n_ctx=args.ctx_size,
            chunks=args.chunks,
            batch=batch,
            executor=executor,
        )
        for chunk in run:
            print(f"chunk {chunk + 1} of {run.n_chunks}, {len(rules)} rules", file=sys.stderr, flush=True)
            for side in sides:
                side.recording = False  # the first chunk's are enough
        each = [run.paired_of(i) for i in range(len(rules))]
    values = np.array([[(pair.nll - pair.nll_base).mean() for pair in pairs] for pairs in each])
    return Found(values, [sides[i].errors for i in kept])


def sorts(model: Model, tokens: npt.NDArray[np.int64], args: argparse.Namespace) -> dict[str, Found]:
    """{sort of realisation: what was found}"""
    rule = Rule.parse(args.rule)
    if rule.mode != "every":
        raise FqError(f"--rule must round every row, not {rule}")
    sites, spec = str(rule).split("=", 1)
    n = args.seeds
    kept = min(KEPT, n)
    dithered = [f"{sites}={spec}{',' if ':' in spec else ':'}dither,seed={k}" for k in range(n)]
    with moved(spec, n) as names:
        both = ratios(
            model,
            tokens,
            [*dithered, *(f"{sites}={name}" for name in names)],
            args,
            args.ctx_size,
            [*range(kept), *range(n, n + kept)],
        )
    return {
        "dithers": Found(both.ratios[:n], both.errors[:kept]),
        "one unit in the last place": Found(both.ratios[n:], both.errors[kept:]),
    }


def correlations(errors: Sequence[Errors]) -> dict[Place, float]:
    """Of each site, the mean over all pairs of realisations."""

    def one(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
        x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
        return float(x @ y / math.sqrt((x @ x) * (y @ y)))

    pairs = list(combinations(errors, 2))
    return {norm: float(np.mean([one(a[norm], b[norm]) for a, b in pairs])) for norm in errors[0]}


def pooled(values: Ratios) -> tuple[float, float]:
    """(variance over realisations, averaged over chunks; its degrees of freedom after Satterthwaite)."""
    each = values.var(axis=0, ddof=1)
    return float(each.mean()), float((len(values) - 1) * each.sum() ** 2 / np.square(each).sum())


def against(values: Ratios, dithers: Ratios) -> tuple[float, float, float]:
    """The standard deviation over that of dithers, with a 95 % interval as for chi-square variances."""
    (one, n), (other, m) = pooled(values), pooled(dithers)
    ratio, width = math.sqrt(one / other), math.exp(Z * math.sqrt(1 / (2 * n) + 1 / (2 * m)))
    return ratio, ratio / width, ratio * width


def _markdown(head: list[str], lines: Sequence[list[str]]) -> str:
    rows = [head, ["---", *["--:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row + [''] * (len(head) - len(row)))} |" for row in rows)


def _against_text(name: str, found: dict[str, Found]) -> str:
    if name == "dithers":
        return "1"
    ratio, low, high = against(found[name].ratios, found["dithers"].ratios)
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def deviations(found: dict[str, Found]) -> str:
    """The standard deviation of ln(PPL ratio) in each chunk."""
    chunks = range(found["dithers"].ratios.shape[1])
    head = ["realisations of", "n", *(f"chunk {i + 1}" for i in chunks)]
    lines = []
    for name, (values, _) in found.items():
        lines.append([name, str(len(values))])
        if len(values) > 1:
            lines[-1] += [
                *(f"{s:.1e}" for s in values.std(axis=0, ddof=1)),
                f"{math.sqrt(pooled(values)[0]):.1e}",
                _against_text(name, found),
                f"{values.mean():+.1e}",
            ]
    return _markdown([*head, "pooled", "over that of dithers", "mean"], lines)


def in_common(found: dict[str, Found]) -> str:
    """The correlation of the rounding errors of two realisations, beside what it lets expect."""
    norms = list(found["dithers"].errors[0])
    shown = [norms[i] for i in np.unique(np.linspace(0, len(norms) - 1, SHOWN).round().astype(int))]
    head = ["two realisations of", "pairs", *map(str, shown), f"mean of all {len(norms)}"]
    lines = []
    for name, (_, errors) in found.items():
        lines.append([name, str(math.comb(len(errors), 2))])
        if len(errors) > 1:
            each = correlations(errors)
            mean = float(np.mean(list(each.values())))
            lines[-1] += [
                *(f"{each[norm]:.3f}" for norm in shown),
                f"{mean:.3f}",
                f"{math.sqrt(max(1 - mean, 0)):.2f}",
                _against_text(name, found),
            ]
    return _markdown([*head, "√(1 − mean)", "measured, over dithers"], lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.realisations", description=__doc__)
    parser.add_argument("-m", "--model", default="smollm2", help="GGUF file or alias (default: %(default)s)")
    parser.add_argument("-f", "--file", type=Path, required=True, help="text, UTF-8")
    parser.add_argument("-c", "--ctx-size", type=int, default=128, metavar="N", help="tokens per chunk")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=12, metavar="K", help="dithers (default: %(default)s)")
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
    print(
        f"`{args.rule}`, {args.ctx_size} tokens per chunk. Standard deviation of a chunk's ln(PPL ratio):\n\n"
        f"{deviations(found)}\n\n"
        f"Correlation of the rounding errors of two realisations, chunk 1:\n\n{in_common(found)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
