"""Runs to be compared: cells whose KLs are given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fq.measure.cells import COUNT_COLUMNS, Cell, CellChunk
from fq.measure.statistics import Paired
from fq.results.compare import Side
from fq.results.run import Run

CHUNKS, TOKENS = 8, 5
# Chunks differ tenfold: what is common to two runs is much larger than what is between them.
HARD = np.geomspace(1, 10, CHUNKS)[:, None] * np.random.default_rng(0).gamma(2.0, 0.5, (CHUNKS, TOKENS))


def cell(name):
    return Cell(f"{name}=bf16", "single", "ffn_norm[*].raw=bf16", (f"{name}=bf16",))


A, B = cell("ffn_norm[0].raw"), cell("ffn_norm[1].raw")
RUN = Run(
    "a" * 64,
    "b" * 64,
    (Cell("control", "control"), A, B),
    {"model": "dir/m.gguf", "text": "wiki.txt", "n_tokens": 99, "n_ctx": 12, "n_chunks_asked": CHUNKS,
     "chunk_order": "random", "chunk_seed": 0, "chunk_indices": list(range(CHUNKS)), "batch": 8,
     "activations": "exact", "norms": [["ffn_norm", 0, 11], ["ffn_norm", 1, 5]]},
    {"isa": "avx2", "threads": 2},
    {},
    {},
)  # fmt: skip


def left_of(kld):
    zero = np.zeros(TOKENS)
    return CellChunk(
        Paired(zero, zero, kld, zero, zero == 0, zero), np.zeros((len(RUN.cells), len(COUNT_COLUMNS)))
    )


def side(number, klds, chunks=range(CHUNKS), **changes):
    """A run whose cells have these KLs, (chunks, tokens) each."""
    run = replace(RUN, **changes)
    finished = {(i, c): left_of(kld[c]) for i, kld in enumerate(klds) for c in chunks}
    return Side(number, run, finished)
