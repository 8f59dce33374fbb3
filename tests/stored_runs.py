"""Runs that are stored, and processes that are killed while they store."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from command_line import environment

from fq.measure.cells import COUNT_COLUMNS, Cell, CellChunk
from fq.measure.statistics import Paired
from fq.results.run import Run
from fq.results.runs import Results

CELL = Cell("ffn_norm[0].raw=bf16", "single", "ffn_norm[0].raw=bf16", ("ffn_norm[0].raw=bf16",))
RUN = Run(
    "a" * 64,
    "b" * 64,
    (Cell("control", "control"), CELL),
    {"model": "m.gguf", "text": "t", "n_tokens": 99, "n_ctx": 8, "n_chunks_asked": 3,
     "chunk_order": "random", "chunk_seed": 0, "chunk_indices": [2, 0, 1], "batch": 8, "activations": "exact",
     "scored": "second-half", "norms": [["ffn_norm", 0, 7]]},
    {"isa": "avx2", "threads": 2},
    {"fq": "1"},
    {"processor": "p"},
)  # fmt: skip


def left_of(seed, base=0):
    rng = np.random.default_rng(seed)
    nll_base, p_top_base = np.random.default_rng(base).random((2, 3))
    paired = Paired(nll_base, *rng.random((3, 3)), rng.random(3) > 0.5, p_top_base)
    return CellChunk(paired, rng.random((1, len(COUNT_COLUMNS))))


def bits(left):
    return [np.asarray(x).tobytes() for x in (*vars(left.paired).values(), left.counts)]


def ended(path, run=1):
    """Chunks of cells in the store so far."""
    if not path.exists():
        return 0
    with Results(path) as store:
        return next((r["ended"] for r in store.list() if r["run"] == run), 0)


# A sweep that ends itself as it is about to make its nth statement to the database: before, within and
# after the transactions of chunks.
KILLED_AT_STATEMENT = """
import os, signal, sys
from fq.cli import main
from fq.results.runs import Results

left, start = int(sys.argv[1]), Results.__init__

def count(statement):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

def traced(self, *args, **options):
    start(self, *args, **options)
    self._db.set_trace_callback(count)

Results.__init__ = traced
sys.exit(main(sys.argv[2:]))
"""


def killed_at_statement(n, arguments, folder):
    """(stderr, exit status)"""
    command = [sys.executable, "-c", KILLED_AT_STATEMENT, str(n), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    return done.stderr, done.returncode
