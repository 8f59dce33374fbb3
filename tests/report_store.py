"""Sweeps with figures of one's choice, as a store keeps them: for tests of the report."""

from __future__ import annotations

import re

import numpy as np

from fq.measure.cells import Cell, CellChunk
from fq.measure.figures import figures
from fq.measure.statistics import Paired
from fq.results.run import Run
from fq.results.runs import Results
from fq_kernels.rules import RowStat

N_CTX, SCORED = 16, 7
CONTROL = Cell("control", "control")


def cells_for(sites, specs, *, together=True, cumulative=False):
    """Of each of sites, {pattern: [site, ...]}, in each format, as `cells_of` makes them."""
    cells = [CONTROL]
    for pattern, names in sites.items():
        for spec in specs:
            group = f"{pattern}={spec}"
            singles = [f"{name}={spec}" for name in names]
            cells += [Cell(single, "single", group, (single,)) for single in singles]
            if cumulative:
                cells += [
                    Cell(f"up to {singles[i]}", "cumulative", group, tuple(singles[: i + 1]))
                    for i in range(1, len(singles) - 1)
                ]
            if together and len(singles) > 1:
                cells.append(Cell(group, "together", group, tuple(singles)))
    return cells


def run_of(cells, norms, chunks, **settings):
    about = {
        "model": "/somewhere/m.gguf",
        "text": "t.txt",
        "command": "fq sweep -m m.gguf -f t.txt",
        "n_tokens": 999,
        "n_ctx": N_CTX,
        "n_chunks_asked": chunks,
        "chunk_order": "first",
        "chunk_seed": None,
        "chunk_indices": list(range(chunks)),
        "batch": 16,
        "activations": "exact",
        "norms": [[kind, layer, 15] for kind, layer in norms],
    }
    return Run(
        "a" * 64,
        "b" * 64,
        tuple(cells),
        about | settings,
        {"isa": "avx2", "threads": 2},
        {"fq": "1.2", "numpy": "2"},
        {"date": "2026-01-01", "processor": "p"},
    )


def left(cell, means, chunk, *, drift=0.0):
    """What a cell leaves of a chunk: ``means`` are its mean KL in each, spread over tokens.

    Without drift the perplexity goes up in one chunk and down in the next by the same.
    """
    seed = np.random.default_rng([len(cell.name), chunk])
    nll = np.random.default_rng(chunk).random(SCORED) + 2
    if cell.kind == "control":
        zero = np.zeros(SCORED)
        return CellChunk(
            Paired(nll, nll, zero, zero, np.ones(SCORED, bool), np.exp(-nll / 2)),
            np.empty((0, 2 + len(RowStat))),
        )
    mean = means[chunk]
    spread = np.exp(seed.normal(0, 1, SCORED))
    kld = mean * spread / spread.mean()
    change = seed.normal(0, np.sqrt(mean), SCORED)
    change += drift + 1e-3 * (-1) ** chunk - change.mean()
    counts = np.zeros((len(cell.rules), 2 + len(RowStat)))
    counts[:, 0], counts[:, 1] = 15, 15 * 64
    counts[:, 2 + RowStat.MAX_ABS_ERROR] = 0.02
    counts[:, 2 + RowStat.SUM_ABS_ERROR] = 3.0
    counts[:, 2 + RowStat.SUM_ERROR] = 0.01
    counts[:, 2 + RowStat.SUM_SQ_ERROR] = 0.02
    counts[:, 2 + RowStat.SUM_SQ_VALUE] = 900.0
    counts[:, 2 + RowStat.CHANGED] = 900
    return CellChunk(
        Paired(nll, nll + change, kld, change / 10, seed.random(SCORED) > 0.1, np.exp(-nll / 2)), counts
    )


def finished_of(run, means, *, done=None, drift=0.0):
    """What each (cell, chunk) left; ``means`` maps a cell to its mean KL in each chunk."""
    chunks = run.settings["n_chunks_asked"] if done is None else done
    return {
        (i, c): left(cell, None if cell.kind == "control" else means(cell), c, drift=drift)
        for i, cell in enumerate(run.cells)
        for c in range(chunks)
    }


def data_of(run, means, *, done=None, number=1, drift=0.0):
    """`figures` of that as the report takes them."""
    finished = finished_of(run, means, done=done, drift=drift)
    return {"run": number, "started": "2026-01-01T00:00:00+00:00"} | figures(run.about, run.cells, finished)


def save(path, run, means, *, done=None):
    """The same in a store; with done, of so many chunks, and of the next one the control alone."""
    chunks = run.settings["n_chunks_asked"]
    with Results(path) as store:
        number = store.add(run)
        for i, cell in enumerate(run.cells):
            for c in range(chunks if done is None else done):
                store.save(number, i, c, left(cell, None if i == 0 else means(cell), c))
        if done is not None and done < chunks:
            store.save(number, 0, done, left(run.cells[0], None, done))
    return number


def layers(n):
    return {"ffn_norm[*].raw": [f"ffn_norm[{i}].raw" for i in range(n)]}


def layer_of(cell):
    return int(re.search(r"\[(\d+)\]", cell.name)[1]) if "*" not in cell.name else None


def data_for(
    spans,
    *,
    specs=("bf16",),
    chunks=8,
    done=None,
    together=None,
    drift=0.0,
    in_step=False,
    about=(),
    **options,
):
    """A run of one layer per span, over which the layer's chunks lie evenly.

    in_step  whether what is a large chunk to one layer is to the others; else each has an order of its own
    about    settings of the run
    """
    n = len(spans)

    def means(cell):
        layer = layer_of(cell)
        low, high = spans[layer] if layer is not None else together or (1e-3, 1.1e-3)
        of_chunk = np.linspace(low, high, chunks)
        return of_chunk if in_step or layer is None else np.random.default_rng(layer).permutation(of_chunk)

    norms = [("ffn_norm", i) for i in range(n)]
    run = run_of(cells_for(layers(n), specs, **options), norms, chunks, **dict(about))
    return data_of(run, means, done=done, drift=drift)


WINNER = [(1e-6, 2e-6), (1.2e-6, 2.2e-6), (1e-5, 1.1e-5), (1.1e-6, 2.1e-6)]
TIED = [(1e-6, 3e-6), (1.2e-6, 3.2e-6), (1.1e-6, 3.1e-6)]
TWO_FIRST = [(1e-5, 1.4e-5), (1e-6, 1.1e-6), (1.1e-5, 1.5e-5), (1e-7, 1.1e-7)]
