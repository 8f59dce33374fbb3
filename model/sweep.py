"""The sweep: every site in every format, each a cell with rules of its own, all in one pass over the text."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import Executor, get_format
from fq_kernels.rules import POINTS, FakeQuant, Norm, RowStat, Rule, Site

from .activations import ACTIVATIONS
from .errors import FqError, NotFiniteError
from .finite import all_finite, first_not_finite, in_batches, not_finite_text
from .fork import Fork
from .graph import N_OUTPUTS
from .realisations import fallen_anew, has_none
from .runner import ATTENTION_ROWS, Model
from .statistics import Paired, Reference
from .streams import DEFAULT_BATCH, Chunks, first_scored, n_scored_per_chunk
from .weights import PANEL_ELEMENTS

DEFAULT_SITES = "ffn_norm[*].raw"
CONTROL, REALISATION = "control", "realisation"
CELL_KINDS = ("single", "together", "cumulative", CONTROL, REALISATION)


@dataclass(frozen=True)
class Cell:
    """One variant of the model.

    name   what it is called in tables: its rule
    kind   "single": one site; "together": all sites of its group; "cumulative": those up to a
           site; "control": the baseline a second time
           "realisation": another cell's rounding fallen anew
    group  the SITES=FORMAT that it comes from; a realisation has none
    rules  as text
    of     name of the cell whose realisation it is
    """

    name: str
    kind: str
    group: str = ""
    rules: tuple[str, ...] = ()
    of: str = ""


def cells_of(
    model: Model,
    sites: Sequence[str] = (DEFAULT_SITES,),
    formats: Sequence[str] = ("bf16",),
    *,
    cumulative: bool = False,
    realisations: int = 1,
    seed: int = 0,
) -> list[Cell]:
    """The control, then for each of ``sites`` and each format: every site alone, and all together.

    With cumulative also those from the first site to each. With ``realisations`` each is there so
    often, with its rounding fallen anew; noise controls once. ``seed`` is that of stochastic rounding
    where a format names none; the cells name it. Raises FqError for sites or a format that cannot be
    read, that are given twice or that match nothing.
    """
    cells = [Cell(CONTROL, CONTROL)]
    for pattern in sites:
        for spec in formats:
            try:
                get_format(spec.partition(":")[0])  # its own error says more than a rule's
                rule = Rule.parse(f"{pattern}={spec}", seed=seed)
                FakeQuant(model.norms, rule)
            except ValueError as e:
                raise FqError(str(e)) from None
            group = str(rule)
            if any(cell.group == group for cell in cells):
                raise FqError(f"{group} is asked for twice")
            ending = group.partition("=")[2]
            matched = [Site(norm, p) for norm in model.norms for p in POINTS if rule.matches(Site(norm, p))]
            singles = [f"{site}={ending}" for site in matched]
            cells += [Cell(single, "single", group, (single,)) for single in singles]
            if cumulative:
                cells += [
                    Cell(f"up to {singles[i]}", "cumulative", group, tuple(singles[: i + 1]))
                    for i in range(1, len(singles) - 1)
                ]
            if len(singles) > 1:
                cells.append(Cell(group, "together", group, (group,)))
            if realisations > 1 and not has_none([group]):
                cells += [
                    replace(
                        cell,
                        name=f"{cell.name} #{number + 1}",
                        kind=REALISATION,
                        group="",
                        rules=tuple(str(fallen_anew(text, number)) for text in cell.rules),
                        of=cell.name,
                    )
                    for cell in cells
                    if cell.group == group
                    for number in range(1, realisations)
                ]
    return cells


class CellChunk(NamedTuple):
    """What a cell left of a chunk: all that its figures are made from.

    counts is float64 (sites that a rule takes, 2 + len(RowStat)), in graph order: rows
    rounded, elements, and the totals of Counter.
    """

    paired: Paired
    counts: np.ndarray


class Sweep:
    """One sweep; iterate over it to run it. ``(cell, chunk)`` is yielded as each chunk of a cell ends.

    A chunk is named by its position in the run, here and in the store.

    model, tokens  the whole text, tokenised once
    cells          what is evaluated on each chunk and compared with the model without rules
    n_ctx, chunks, chunk_order, chunk_seed, batch, activations
                   as of Streams
    memory_limit   bytes; cells are taken in groups that fit. None: all at once
    on_step        called as a variant has passed a layer, `steps` times in all

    ``finished`` holds what each (cell, chunk) left, by indices; what is in it already is not
    run again: so a finished sweep is extended, by cells after those that it had and by chunks. A
    chunk of a cell depends on no other chunk: finished in any order, by any number of runs, the
    figures are the same to the last bit. Cells with the same rules are evaluated once.
    ``not_finite`` says of each cell, by index, where its logits were first not finite in this run: chunk
    of the text, node, op, token of the chunk (both from 0); it goes on, and its figures are NaN.
    Raises FqError for a text that is too short, a context that does not fit, or a memory limit
    that one cell exceeds, and NotFiniteError if the baseline's logits are not finite.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        cells: Sequence[Cell],
        *,
        n_ctx: int = 512,
        chunks: int = -1,
        chunk_order: str = "random",
        chunk_seed: int | None = None,
        batch: int = DEFAULT_BATCH,
        executor: Executor,
        activations: str = "exact",
        memory_limit: int | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        if batch < 1:
            raise FqError(f"batch size must be at least 1, not {batch}")
        if activations not in ACTIVATIONS:
            raise FqError(f"activations must be {' or '.join(ACTIVATIONS)}, not {activations!r}")
        if not cells:
            raise FqError("a sweep without cells has nothing to run")
        self.model, self.cells = model, tuple(cells)
        self.text = Chunks(model, tokens, n_ctx, chunks, chunk_order, chunk_seed)
        self.batch, self.executor, self.activations = batch, executor, activations
        self.on_step = on_step
        self.finished: dict[tuple[int, int], CellChunk] = {}
        self.not_finite: dict[int, dict[str, Any]] = {}
        self._rules = [FakeQuant(model.norms, cell.rules) if cell.rules else None for cell in self.cells]
        self._per_group = self._cells_that_fit(memory_limit)
        self._fork = Fork(model, n_ctx, executor, batch, activations)
        self._reference = Reference(executor)

    def __repr__(self) -> str:
        name, of = os.path.basename(self.model.path), len(self.cells) * self.text.n
        return (
            f"<Sweep of {name}: {len(self.cells)} cells, {self.text.n} chunks of {self.text.n_ctx}; "
            f"{len(self.finished)} of {of} ended>"
        )

    def _memory(self) -> tuple[int, int]:
        """Bytes that a sweep takes at most whatever the cells, and for each cell at a time: its residual."""
        hp, n_ctx, float32 = self.model.hparams, self.text.n_ctx, 4
        kv = 2 * hp.n_layer * hp.n_head_kv * hp.n_embd_head
        live = 6 * hp.n_embd + 3 * hp.n_ff + 2 * hp.n_head * hp.n_embd_head
        # a variant's, once more where batches are put together, and the reference's
        copies = (2 if self.batch < n_ctx - 1 else 1) + 4
        logits = copies * n_scored_per_chunk(n_ctx) * hp.n_vocab
        scratch = self.executor.threads * (
            PANEL_ELEMENTS + 2 * ATTENTION_ROWS * n_ctx * hp.n_head // hp.n_head_kv
        )
        residual = float32 * n_ctx * hp.n_embd
        return float32 * ((kv + live) * n_ctx + logits + scratch) + residual, residual

    def _cells_that_fit(self, limit: int | None) -> int:
        """How many cells at a time."""
        if limit is None:
            return len(self.cells)
        fixed, cell = self._memory()
        if limit < fixed + cell:
            raise FqError(
                f"a memory limit of {limit / 1e6:.0f} MB is too little for one cell, "
                f"which takes {(fixed + cell) / 1e6:.0f} MB"
            )
        return (limit - fixed) // cell

    def _groups(self, chunk: int) -> list[list[int]]:
        """The cells of a chunk that are yet to be run, as many at a time as fit."""
        done = {cell.rules for i, cell in enumerate(self.cells) if (i, chunk) in self.finished}
        first: dict[tuple[str, ...], int] = {}
        for i, cell in enumerate(self.cells):
            if cell.rules not in done:
                first.setdefault(cell.rules, i)
        left = list(first.values())
        return [left[b : b + self._per_group] for b in range(0, len(left), self._per_group)]

    @property
    def steps(self) -> int:
        """What is left to do, in layers passed by a variant."""
        one = [self._fork.steps(rules) for rules in self._rules]
        groups = [group for chunk in range(self.text.n) for group in self._groups(chunk)]
        return sum(self._fork.steps(None) + sum(one[i] for i in group) for group in groups)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for chunk in range(self.text.n):
            for group in self._groups(chunk):
                yield from self._run(group, chunk)
            yield from self._share(chunk)

    def _share(self, chunk: int) -> Iterator[tuple[int, int]]:
        """What a cell left of a chunk is left of it by all with the same rules."""
        done = {
            cell.rules: self.finished[i, chunk]
            for i, cell in enumerate(self.cells)
            if (i, chunk) in self.finished
        }
        for i, cell in enumerate(self.cells):
            if (i, chunk) not in self.finished:
                self.finished[i, chunk] = done[cell.rules]
                for j, where in list(self.not_finite.items()):
                    if self.cells[j].rules == cell.rules:
                        self.not_finite.setdefault(i, where)
                yield i, chunk

    def _run(self, group: list[int], chunk: int) -> Iterator[tuple[int, int]]:
        ids, targets = self.text[chunk]
        for i in group:
            self._rewind(self._rules[i], chunk)
        variants = [self._rules[i] for i in group]
        evaluation = self._fork.logits(ids[:-1], first_scored(self.text.n_ctx), variants, self.on_step)
        with contextlib.closing(evaluation):
            base = next(evaluation)
            if not all_finite(base):
                raise NotFiniteError(not_finite_text("baseline", self._not_finite(chunk, ids, None)))
            self._reference.set(base, targets)
            for i, logits in zip(group, evaluation, strict=True):
                paired = self._reference.compare(logits)
                if i not in self.not_finite and not all_finite(logits):
                    self.not_finite[i] = self._not_finite(chunk, ids, self._rules[i])
                self.finished[i, chunk] = CellChunk(paired, _counts(self._rules[i]))
                yield i, chunk

    def find_lost(self) -> None:
        """Fill in `not_finite` for cells that `finished` was given, as by a run that is gone on with."""
        for (i, chunk), left in sorted(self.finished.items()):
            if i not in self.not_finite and not all_finite(left.paired.kld):
                self.not_finite[i] = self._not_finite(chunk, self.text[chunk][0], self._rules[i])

    def _not_finite(self, chunk: int, ids: np.ndarray, rules: FakeQuant | None) -> dict[str, Any]:
        """Where, in an evaluation of its own."""
        if rules is not None:
            rules = FakeQuant(rules.norms, rules.rules)
            self._rewind(rules, chunk)
        evaluations = in_batches(ids[:-1], first_scored(self.text.n_ctx), self.batch)
        return {"chunk": self.text.indices[chunk]} | first_not_finite(
            self.model, evaluations, self.executor, rules, self.activations
        )

    def _rewind(self, rules: FakeQuant | None, chunk: int) -> None:
        """To where a run stands at the chunk: first-call and stochastic rounding go by the rows before it."""
        if rules is not None:
            rules.reset()
            for kind, layer, rows in self._norms():
                rules.pass_by(Norm(kind, layer), chunk * rows)

    def _norms(self) -> list[tuple[str, int | None, int]]:
        """(kind, layer, rows that pass it in a chunk) of each norm."""
        n_ctx = self.text.n_ctx
        rows = {True: n_scored_per_chunk(n_ctx), False: n_ctx - 1}
        return [
            (*node.norm, rows[node.shape[0] == N_OUTPUTS]) for node in self.model.graph.nodes if node.norm
        ]

    def about(self) -> dict[str, Any]:
        """What is measured, on what."""
        return {
            "model": self.model.path,
            "n_tokens": len(self.text.tokens),
            "n_ctx": self.text.n_ctx,
            "n_chunks_asked": self.text.n,
            **self.text.about(),
            "batch": self.batch,
            "activations": self.activations,
            "norms": [list(norm) for norm in self._norms()],
        }

    def result(self) -> dict[str, Any]:
        """The figures of the chunks that ended in every cell, see `figures`."""
        from .sweep_figures import add_nodes, figures  # which imports this module

        return add_nodes(figures(self.about(), self.cells, self.finished), self.not_finite)


def _counts(rules: FakeQuant | None) -> np.ndarray:
    if rules is None:
        return np.empty((0, 2 + len(RowStat)))
    return np.array(
        [[c.rows_quantised, c.elements, *c.totals] for c in rules.matched if c.totals is not None]
    )
