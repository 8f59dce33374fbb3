"""What the steps inside a norm cost, each in isolation, and what engines' norms do to one another.

Every norm of the model computes by the unit; what stands beside it is the mean KL divergence from the exact
model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fq import Model, Sweep, find
from fq.commands.progress import note
from fq.commands.show import chunks_text
from fq.machine import default_threads
from fq.measure.cells import CONTROL, Cell, profile_cells
from fq.measure.chunks import Settings
from fq_kernels import Executor
from fq_kernels.units.profiles import PROFILES, RESIDUAL

N_CTX = 512
BF16 = "x=bf16;raw=bf16;weight=bf16;out=bf16"
# what is said of it, and the unit
STEPS = (
    ("input in BF16", "x=bf16"),
    ("squares in BF16", "square=bf16"),
    ("BF16 accumulator, one after the other", "acc=bf16"),
    ("in 16 lanes", "acc=bf16;order=lanes=16"),
    ("in a tree", "acc=bf16;order=tree"),
    ("in chunks of 8, summed in float32", "acc=bf16;order=chunk=8,f32"),
    ("float32 accumulator, one after the other", "acc=f32"),
    ("mean in BF16", "mean=bf16"),
    ("inverse root in BF16", "rsqrt=bf16"),
    *((f"table of {2**bits} inverse roots", f"rsqrt=lut={bits}") for bits in (4, 5, 6, 7, 8, 10, 12)),
    ("of 16, linear between", "rsqrt=lut=4,linear"),
    ("bit trick and one Newton step", "rsqrt=newton=1"),
    ("two Newton steps", "rsqrt=newton=2"),
    ("table of 16 and one Newton step", "rsqrt=newton=1,lut=4"),
    ("BF16 before the weight", "raw=bf16"),
    ("weight in BF16", "weight=bf16"),
    ("output in BF16", "out=bf16"),
    ("all but the sum in BF16", BF16),
    ("and a table of 32", f"{BF16};rsqrt=lut=5"),
    ("and a table of 256", f"{BF16};rsqrt=lut=8"),
    ("and a BF16 accumulator, in a tree", f"{BF16};acc=bf16;order=tree"),
)
PLUS_ONE = (
    ("w in BF16, 1 + w in float32", "weight=bf16;gain=1+w"),
    ("1 + w in BF16", "weight=bf16;gain=1+w,bf16"),
)


def cells_of(model: Model) -> list[Cell]:
    found = [Cell(CONTROL, CONTROL)]
    for name, unit in (*STEPS, *(PLUS_ONE if model.plus_one else ())):
        found.append(Cell(name, "together", f"`{unit}`", (f"*={unit}",)))
    residual = tuple(f"{kind}=bf16" for kind in RESIDUAL)
    return [
        *found,
        Cell("residual in BF16", "together", ", ".join(f"`{rule}`" for rule in residual), residual),
    ]


def measure(
    model: Model, tokens: Any, cells: Sequence[Cell], executor: Executor, **how: Any
) -> dict[str, Any]:
    sweep = Sweep(model, tokens, cells, executor=executor, **how)
    for cell, chunk in sweep:
        if cell == 0:
            note(f"{model.hparams.arch}: chunk {chunk + 1} of {sweep.text.n}")
    data = sweep.result()
    assert data["cells"][0]["exactly_zero"], "the control"
    return data


def row(name: str, unit: str, comparison: dict[str, Any]) -> str:
    interval = comparison["mean_kld_ci95_chunks"]
    around = "" if interval is None else f"{interval[0]:.2e} – {interval[1]:.2e}"
    kld = comparison["mean_kld"]
    figure = "not finite" if kld != kld else f"{kld:.2e}" if kld else "0"
    return f"| {name} | {unit} | {figure} | {around} | {100 * comparison['same_top']:.2f} |"


def matrix(model: Model, tokens: Any, names: Sequence[str], executor: Executor, **how: Any) -> list[str]:
    """Each profile against each: KL(row, as the baseline, from column)."""
    lines = ["| baseline | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    cells = [Cell(CONTROL, CONTROL), *profile_cells(model, names)]
    for name in names:
        data = measure(model, tokens, cells, executor, baseline=tuple(model.profile_rules(name)), **how)
        shown = []
        for entry in data["cells"][1:]:
            c = entry["comparison"]
            interval = c["mean_kld_ci95_chunks"]
            around = "" if interval is None else f" ({interval[0]:.1e} – {interval[1]:.1e})"
            shown.append("0" if c["mean_kld"] == 0 else f"{c['mean_kld']:.2e}{around}")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.norm_units", description=__doc__)
    parser.add_argument("-m", "--model", action="append", help="may be repeated (default smollm2)")
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("-c", "--ctx-size", type=int, default=N_CTX)
    parser.add_argument(
        "--profiles", action="store_true", help="each profile against each, instead of the steps"
    )
    args = parser.parse_args(argv)
    text = args.file.read_text(encoding="utf-8")
    settings = Settings(n_ctx=args.ctx_size, chunks=args.chunks)
    with Executor(default_threads()) as executor:
        for name in args.model or ["smollm2"]:
            model = Model(find(name))
            tokens = model.tokenizer.encode(text)
            if args.profiles:
                lines = matrix(model, tokens, list(PROFILES), executor, settings=settings)
                data: dict[str, Any] = {}
            else:
                data = measure(model, tokens, cells_of(model), executor, settings=settings)
                lines = [
                    "| | unit | mean KL | 95 % over chunks | same top, % |",
                    "| --- | --- | --: | --- | --: |",
                ]
                lines += [row(e["name"], e["group"], e["comparison"]) for e in data["cells"][1:]]
            print(f"**{name}**", *([f"({chunks_text(data)})"] if data else []))
            print("\n".join(["", *lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
