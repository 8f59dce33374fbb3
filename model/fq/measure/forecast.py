"""What a sweep would take: cells and passes, memory, the store, and by a short probe the time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from .cells import CellChunk
from .sweep import Sweep

SECONDS = 10.0  # of the probe
FIRST = 1  # cells that warm up, where more than so many end in time


def _bytes_of(left: CellChunk) -> int:
    """As the store has it, but for the baseline's."""
    paired = left.paired
    parts = paired.nll, paired.kld, paired.dp, paired.same_top, left.counts
    return sum(part.nbytes for part in parts)


class _Enough(Exception):
    """Not an error: how a probe ends within a cell."""


def forecast(
    run: Sweep, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Of a sweep of which nothing has been run, as written to JSON; its results are not kept.

    Cells are run one at a time, of the first chunk that has any to run, for so many seconds. A cell's time
    goes by the layers that it and its baseline pass, ``steps`` of the sweep. ``seconds`` is of the whole
    sweep by what one step took, and ``store_bytes`` by what a cell has left; None where no step, or no cell,
    ended in time.
    """
    of_run, on_step = run.steps, run.on_step
    fixed, cell = run.memory
    chunk = next((chunk for chunk in range(run.text.n) if run.mine(chunk)), 0)
    mine = list(run.mine(chunk))
    # from the first to the last, those that pass all layers among them
    order = sorted(mine, key=lambda i: (i * 7919) % max(len(mine), 1))
    start, taken = clock(), list[tuple[float, int]]()
    steps, since = 0, start
    left: int | None = None

    def count() -> None:
        nonlocal steps
        steps += 1
        if clock() - start > seconds:
            raise _Enough

    run.on_step = count
    try:
        for i in order:
            steps, since = 0, clock()
            for key in run.run(chunk, [i]):
                left = _bytes_of(run.finished[key])
            if steps:  # else it is another's
                taken.append((clock() - since, steps))
    except _Enough:
        if not taken:
            taken.append((clock() - since, steps))
    finally:
        run.on_step = on_step
        run.finished.clear()
        run.not_finite.clear()
    some = taken[FIRST:] or taken
    one = sum(t for t, _ in some) / total if (total := sum(n for _, n in some)) else None
    n_chunks = run.text.n
    cells = sum(len(run.mine(chunk)) for chunk in range(n_chunks))
    return {
        "n_cells": len(run.cells),
        "n_chunks": n_chunks,
        "n_ctx": run.text.n_ctx,
        "chunks_of_cells": cells,
        "steps": of_run,
        "step_seconds": one,
        "seconds": None if one is None else one * of_run,
        "threads": run.executor.threads,
        "memory_bytes": fixed + cell * min(run.cells_at_a_time, len(run.cells)),
        "memory_fixed_bytes": fixed,
        "memory_cell_bytes": cell,
        "cells_at_a_time": min(run.cells_at_a_time, len(run.cells)),
        "model_bytes": sum(map(os.path.getsize, run.model.file.paths)),
        "store_bytes": None if left is None else left * cells,
    }
