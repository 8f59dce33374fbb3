"""How long the whole table of sites and formats takes, beside as many cells measured exactly.

One process of `fq sensitivity`; before and after it a sweep over cells of the same table, as many steps
apart, whose time by cell and chunk is what an exact table would take for each of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from fq import Executor, Model, find
from fq.commands.files import read_text
from fq.machine import processor
from fq.measure.cells import Cell
from fq.measure.labels import sampled_labels
from fq.measure.sensitivity import DEFAULT_FORMATS
from fq.measure.sweep import Sweep
from fq.run.backward import Backward
from fq.run.context import Context
from fq_kernels import isa

EXACT_CELLS, EXACT_CHUNKS = 60, 1
N_CTX, SAMPLES, TURNS = 512, 4, 7


def seconds_of_a_cell(model: Model, tokens: Sequence[int], threads: int) -> tuple[float, int]:
    """Of one chunk, the chunk's baseline shared; and how many cells the table has."""
    sites = [site for value in model.values for site in value.sites]
    rules = [f"{site}={spec}" for site in sites for spec in DEFAULT_FORMATS]
    step = len(rules) // EXACT_CELLS | 1  # odd: of all formats
    cells = [Cell(rule, "single", rule, (rule,)) for rule in rules[::step]]
    with Executor(threads) as executor:
        start = time.perf_counter()
        for _ in Sweep(model, tokens, cells, executor=executor, chunks=EXACT_CHUNKS):
            pass
    return (time.perf_counter() - start) / len(cells) / EXACT_CHUNKS, len(rules)


def backward_over_forward(model: Model, tokens: Sequence[int], threads: int) -> float:
    """Of one sample of SAMPLES, what is computed again included; in turns, the median."""
    ids, first = np.array(tokens[: N_CTX - 1]), N_CTX // 2
    ratios = []
    with Executor(threads) as executor:
        context, backward = Context(model, N_CTX, executor), Backward(model, N_CTX, executor)
        for _ in range(TURNS):
            context.clear()
            start = time.perf_counter()
            context.eval(ids, slice(first, len(ids)))
            forward = time.perf_counter() - start
            labels = sampled_labels(backward.forward(ids, first), SAMPLES, 0, 0, executor)
            start = time.perf_counter()
            backward.backward_of(labels, lambda at: None)
            ratios.append((time.perf_counter() - start) / SAMPLES / forward)
    return median(ratios)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sensitivity", description=__doc__)
    parser.add_argument("-m", "--model", default="smollm2", metavar="MODEL")
    parser.add_argument("-f", "--file", required=True, metavar="FILE")
    parser.add_argument("--chunks", type=int, default=8, metavar="N")
    parser.add_argument("-t", "--threads", type=int, default=2, metavar="N")
    args = parser.parse_args(argv)
    model = Model(find(args.model))
    tokens = model.tokenizer.encode(read_text(args.file)[0])
    ratio = backward_over_forward(model, tokens, args.threads)
    before, n_cells = seconds_of_a_cell(model, tokens, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fq", "sensitivity", "-m", args.model, "-f", args.file]
        command += ["--chunks", str(args.chunks), "-t", str(args.threads)]
        start = time.perf_counter()
        subprocess.run(
            [*command, "--store", Path(folder, "store.sqlite")], check=True, stdout=subprocess.DEVNULL
        )
        whole = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    after, _ = seconds_of_a_cell(model, tokens, args.threads)
    exact = (before + after) / 2
    print(f"{processor()}, {isa()}, {args.threads} threads; {n_cells} cells, {args.chunks} chunks")
    print()
    print("| | |")
    print("| --- | --: |")
    print(f"| the whole table, a process | {whole:.0f} s |")
    print(f"| its largest memory | {most / 1000:.2f} GB |")
    print(f"| a cell measured exactly, a chunk of it (before, after) | {before:.3f} s, {after:.3f} s |")
    print(f"| a backward pass over a forward pass, {SAMPLES} samples together | {ratio:.2f} |")
    print(f"| all cells so, beside the table | {exact * n_cells * args.chunks / whole:.0f} x |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
