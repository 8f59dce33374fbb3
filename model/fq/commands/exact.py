"""Cells of a kept run that are measured exactly, beside its estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fq_kernels import Executor

from ..measure.cells import Cell, CellChunk
from ..measure.chunks import Settings
from ..measure.sweep import Sweep
from ..results.run import Run
from ..results.runs import Results
from ..run.finite import all_finite, not_finite_text
from ..run.model import Model
from .progress import note, progress


@dataclass
class Exact:
    """A run under way, and what its cells have left, by number and chunk.

    memory_limit  as of `Sweep`
    """

    model: Model
    tokens: Sequence[int]
    settings: Settings
    executor: Executor
    memory_limit: int | None
    store: Results
    number: int
    run: Run
    left: dict[tuple[int, int], CellChunk]

    def measure(self, cells: Sequence[Cell], n_chunks: int, what: str) -> None:
        """On the first chunks, but for what is there."""
        numbers = [self.run.cells.index(cell) for cell in cells]
        if not cells or all((i, c) in self.left for i in numbers for c in range(n_chunks)):
            return
        sweep = Sweep(
            self.model,
            self.tokens,
            cells,
            executor=self.executor,
            memory_limit=self.memory_limit,
            settings=replace(self.settings, chunks=n_chunks),
        )
        for k, i in enumerate(numbers):
            sweep.finished |= {(k, c): self.left[i, c] for c in range(n_chunks) if (i, c) in self.left}

        def where(at: tuple[int, int]) -> str:
            return f"{what}: chunk {at[1] + 1}/{n_chunks}, cell {at[0] + 1}/{len(cells)}"

        def line(at: tuple[int, int]) -> str | None:
            return f"{what}: chunk {at[1] + 1}/{n_chunks}" if at[0] == len(cells) - 1 else None

        told: set[int] = set()
        for k, chunk in progress(sweep, where, line):
            left = self.left[numbers[k], chunk] = sweep.finished[k, chunk]
            self.store.save(self.number, numbers[k], chunk, left)
            if k in sweep.not_finite and k not in told:
                note(not_finite_text(cells[k].name, sweep.not_finite[k]))
                told.add(k)

    @property
    def lost(self) -> bool:
        """Whether a cell has figures that are not finite."""
        return not all(all_finite(left.paired.kld) for left in self.left.values())

    def measure_more(self, cells: Sequence[Cell], n_chunks: int, what: str) -> None:
        """Of cells that the run may not have yet."""
        self.run = self.store.extend(self.number, cells)
        self.measure(cells, n_chunks, what)


def single(site: str, spec: str, kind: str = "single") -> Cell:
    """kind: "single" of a sample of all cells, "chosen" else."""
    rule = f"{site}={spec}"
    return Cell(rule, kind, rule, (rule,))


def pair(one: str, other: str, spec: str) -> Cell:
    rules = f"{one}={spec}", f"{other}={spec}"
    return Cell(" + ".join(rules), "pair", spec, rules)
