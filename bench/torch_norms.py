"""The profile hf beside torch's own evaluation of LlamaRMSNorm and GemmaRMSNorm, on what models' norms read.

The two are written here from their formulas, with torch's operations. The profile adds in the order of
torch's mean on x86, and no element may differ; nor where both add one square after the other. Where the
orders differ, single elements do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fq import Model, find
from fq.machine import default_threads
from fq.measure.chunks import Settings
from fq.measure.observation import Observation
from fq_kernels import Executor, NormUnit, bf16_to_float, float_to_bf16, rms_norm_unit
from fq_kernels.rules import Place
from fq_kernels.units.profiles import PROFILES

N_CTX = 512
MOST = 0.01  # of the elements may differ where the sum's order does
# how torch sums, in what order the unit does, and whether that is the same
WAYS = (
    ("mean(-1)", "torch", True),
    ("element by element", "sequential", True),
    ("mean(-1)", "lanes=32", False),
)
GOLDEN = ((1e-5, False, 70), (1e-6, True, 256), (1e-6, False, 576))


def unit_of(plus_one: bool, order: str) -> NormUnit:
    profile = PROFILES["hf"]
    steps = profile.others["gemma"] if plus_one else profile.steps
    return NormUnit.parse(steps.replace("DTYPE", "bf16")).changed({"order": order})


def mean_of_torch(squares: Any) -> Any:
    return squares.mean(-1, keepdim=True)


def mean_in_order(squares: Any) -> Any:
    """Of torch's additions, element by element, all rows at a time."""
    total = squares[:, :1] * 0
    for i in range(squares.shape[1]):
        total = total + squares[:, i : i + 1]
    return total / squares.shape[1]


def torch_norm(
    x: np.ndarray, weight: np.ndarray, eps: float, plus_one: bool, mean: Callable[[Any], Any]
) -> np.ndarray:
    """bf16 codes, uint16 (rows, n). ``weight`` is as a GGUF file has it."""
    import torch

    hidden = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
    stored = torch.from_numpy(weight - np.float32(plus_one)).bfloat16()
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(mean(wide.pow(2)) + eps)
    if plus_one:
        out = (wide * (1.0 + stored.float())).type_as(hidden)
    else:
        out = stored * wide.to(hidden.dtype)
    return out.view(torch.uint16).numpy()


def ours(x: np.ndarray, weight: np.ndarray, eps: float, plus_one: bool, order: str) -> np.ndarray:
    return float_to_bf16(rms_norm_unit(x, unit_of(plus_one, order), eps=eps, weight=weight))


@dataclass
class Tally:
    rows: int = 0
    elements: int = 0
    different: int = 0
    most: int = 0  # units in the last place of bf16

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        self.rows += len(a)
        self.elements += a.size
        self.different += int((a != b).sum())
        places = [np.where(x >> 15, -(x & 0x7FFF).astype(np.int32), x.astype(np.int32)) for x in (a, b)]
        self.most = max(self.most, int(np.abs(places[0] - places[1]).max(initial=0)))


def compare(model: Model, text: str, rows: int, executor: Executor) -> list[Tally]:
    """Over so many rows that the model's norms read, in each of WAYS."""
    eps_of = {node.norm: node.attributes.eps for node in model.graph.nodes if node.norm}  # type: ignore[union-attr]
    weight_of = {node.norm: model.vectors[str(node.weight)] for node in model.graph.nodes if node.norm}
    tallies = [Tally() for _ in WAYS]

    def see(site: Any, x: np.ndarray, _first: bool) -> None:
        norm: Place = site.place
        x = x[: max(rows - tallies[0].rows, 0)]
        how = weight_of[norm], eps_of[norm], model.plus_one
        for tally, (of_torch, order, _) in zip(tallies, WAYS, strict=True):
            if len(x):
                mean = mean_of_torch if of_torch == "mean(-1)" else mean_in_order
                tally.add(ours(x, *how, order), torch_norm(x, *how, mean))

    tokens = model.tokenizer.encode(text)
    run = Observation(
        model, tokens, ["*[*].in"], see, executor=executor, settings=Settings(n_ctx=N_CTX, chunks=-1)
    )
    for _ in run:
        print(f"{model.hparams.arch}: {tallies[0].rows} rows", file=sys.stderr)
        if tallies[0].rows >= rows:
            break
    return tallies


def golden() -> list[dict[str, Any]]:
    """Small cases for tests/units: bf16 codes as hexadecimal digits."""
    cases = []
    for seed, (eps, plus_one, n) in enumerate(GOLDEN):
        x, weight = golden_input(seed, n)
        expected = torch_norm(x, weight, eps, plus_one, mean_of_torch)
        assert (ours(x, weight, eps, plus_one, "torch") == expected).all()
        cases.append(
            {"seed": seed, "eps": eps, "plus_one": plus_one, "n": n, "out": expected.tobytes().hex()}
        )
    return cases


def golden_input(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(2, n) float32 and a weight (n,), from integers alone."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-(1 << 20), 1 << 20, (2, n)).astype(np.float32) * np.float32(2.0**-17)
    return x, bf16_to_float(rng.integers(0x3E80, 0x4040, n).astype(np.uint16))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.torch_norms", description=__doc__)
    parser.add_argument("-m", "--model", action="append", help="may be repeated (default smollm2)")
    parser.add_argument("-f", "--file", type=Path, help="text whose activations are normed")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each model (default %(default)s)")
    parser.add_argument("--golden", type=Path, help="write the cases of tests/units, and nothing else")
    args = parser.parse_args(argv)
    if args.golden:
        args.golden.write_text(json.dumps(golden(), indent=1) + "\n")
        return 0
    import torch

    text = args.file.read_text(encoding="utf-8")
    print("| model | torch's sum | order of the unit's | rows | elements | different | by at most |")
    print("| --- | --- | --- | --: | --: | --: | --: |")
    status = 0
    with Executor(default_threads()) as executor:
        for name in args.model or ["smollm2"]:
            found = compare(Model(find(name)), text, args.rows, executor)
            for tally, (of_torch, order, same) in zip(found, WAYS, strict=True):
                share = tally.different / tally.elements
                status |= share > (0 if same else MOST)
                print(
                    f"| {name} | {of_torch} | `{order}` | {tally.rows:,} | {tally.elements:,} | "
                    f"{100 * share:.4f} % | {tally.most} ulp |"
                )
    print(f"\ntorch {torch.__version__}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
