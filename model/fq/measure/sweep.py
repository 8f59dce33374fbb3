"""The sweep: every site in every format, each a cell with rules of its own, all in one pass over the text."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fq_kernels import Executor
from fq_kernels.rules import FakeQuant

from ..arch.graph import N_OUTPUTS, N_TOKENS
from ..arch.ops import buffers
from ..errors import FqError
from ..run.finite import all_finite
from ..run.fork import Fork, row_blocks
from ..run.model import Model, check_same_vocabulary
from ..run.weights import PANEL_ELEMENTS
from .cells import CONTROL, COUNT_COLUMNS, Cell, CellChunk
from .chunks import Chunks, Settings, batch_of, compared, rows_of
from .figures import add_nodes, figures
from .share import Share
from .statistics import Reference

ALL = Share()


class Sweep:
    """One sweep; iterate over it to run it. ``(cell, chunk)`` is yielded as each chunk of a cell ends.

    A chunk is named by its position in the run, here and in the store.

    model, tokens  the whole text, tokenised once
    cells          what is evaluated on each chunk and compared with the model without rules
    settings       on which chunks, and how; they may be given by name too, as in ``n_ctx=64``
    baseline       the baseline's rules; none: the model without rules. Cells' rules do not come on top
    base_model     another file of the same vocabulary, whose the baseline is
    memory_limit   bytes; cells are taken in groups that fit. None: all at once
    share          what of it is run here, by default all
    on_step        called as a variant has passed a layer, `steps` times in all
    cells_at_a_time, memory
                   how many cells pass a layer together, and bytes: what all take, and each of these

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
        executor: Executor,
        baseline: Sequence[str] = (),
        base_model: Model | None = None,
        memory_limit: int | None = None,
        share: Share = ALL,
        on_step: Callable[[], None] = lambda: None,
        settings: Settings | None = None,
        **changes: Any,
    ) -> None:
        self.settings = Settings.changed(settings, changes)
        if not cells:
            raise FqError("a sweep without cells has nothing to run")
        self.model, self.cells = model, tuple(cells)
        self.text = Chunks(model, tokens, self.settings)
        self.executor = executor
        self.share = share
        self.on_step = on_step
        self.finished: dict[tuple[int, int], CellChunk] = {}
        self.not_finite: dict[int, dict[str, Any]] = {}
        self.baseline, self.base_model = tuple(baseline), base_model
        base = model if base_model is None else base_model
        if base_model is not None:
            check_same_vocabulary(model, base_model)
            if self.settings.n_ctx > (most := base_model.hparams.n_ctx_train):
                raise FqError(
                    f"{base_model.path}: context of {self.settings.n_ctx} tokens: it allows 1 to {most}"
                )
        self._base = base
        self._baseline = FakeQuant(base.values, self.baseline) if self.baseline else None
        self._rules = [
            FakeQuant(self._model_of(i).values, rules) if rules else None
            for i, cell in enumerate(self.cells)
            for rules in [self.baseline if cell.kind == CONTROL else cell.rules]
        ]
        self._rows = {id(one): rows_of(one, self.settings) for one in (model, base)}
        batch = batch_of(self.settings, [*self._rules, self._baseline])
        of_fork = self.settings.n_ctx, executor, batch, self.settings.activations
        self._fork = Fork(model, *of_fork, self._baseline if base is model else None)
        self._base_fork = None if base_model is None else Fork(base_model, *of_fork, self._baseline)
        self.cells_at_a_time = self._cells_that_fit(memory_limit)
        self._reference = Reference(executor)

    def __repr__(self) -> str:
        name, of = os.path.basename(self.model.path), len(self.cells) * self.text.n
        return (
            f"<Sweep of {name}: {len(self.cells)} cells, {self.text.n} chunks of {self.text.n_ctx}; "
            f"{len(self.finished)} of {of} ended>"
        )

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that a sweep takes at most whatever the cells, and for each cell at a time.

        A cell holds its residual between two layers, and before its first node what later ones read.
        """
        first = {self._fork.first_node(rules) for rules in self._rules}
        fixed, cell = self._memory_of(self.model, first)
        if self.base_model is not None:
            fixed += self._memory_of(self.base_model, {0})[0]
        return fixed, cell

    def _memory_of(self, model: Model, first: Iterable[int]) -> tuple[int, int]:
        """Of a model's evaluations; first: nodes at which cells leave the baseline."""
        hp, graph, n_ctx, float32 = model.hparams, model.graph, self.text.n_ctx, 4
        kv = 2 * hp.n_layer * hp.n_head_kv * hp.n_embd_head
        held = [sum(graph.nodes[source].width for source in graph.live_before(i)) for i in first]
        most_held = max(hp.n_embd, *held)
        n_scored = self.settings.n_scored
        n_rows = {N_TOKENS: n_ctx, N_OUTPUTS: n_scored}
        # but the logits, which are counted apart
        live = sum(n_rows[rows] * width * n for (rows, width), n in buffers(graph).items())
        live -= n_scored * hp.n_vocab
        # the baseline's while a cell leaves it, and what a norm's or a product's input is rounded into
        live += n_ctx * (most_held + hp.n_embd + (hp.n_ff if self.settings.activations == "ggml" else 0))
        # the baseline's of a block of rows, a variant's, and the reference's, which are float64
        logits = (
            (2 + 4) * max(rows.stop - rows.start for rows in row_blocks(n_scored, hp.n_vocab)) * hp.n_vocab
        )
        scratch = self.executor.threads * PANEL_ELEMENTS
        cell = float32 * n_ctx * most_held
        return float32 * (kv * n_ctx + live + logits + scratch) + cell, cell

    def _cells_that_fit(self, limit: int | None) -> int:
        """How many cells at a time."""
        if limit is None:
            return len(self.cells)
        fixed, cell = self.memory
        if limit < fixed + cell:
            raise FqError(
                f"a memory limit of {limit / 1e6:.0f} MB is too little for one cell, "
                f"which takes {(fixed + cell) / 1e6:.0f} MB"
            )
        return (limit - fixed) // cell

    def mine(self, chunk: int) -> range:
        """The cells of a chunk that are of its share."""
        return self.share.cells(chunk, len(self.cells), self.text.n)

    def _groups(self, chunk: int, cells: Iterable[int]) -> list[list[int]]:
        """Those of the cells that are yet to be run, as many at a time as fit."""
        done = {self._key(i) for i in range(len(self.cells)) if (i, chunk) in self.finished}
        first: dict[tuple[bool, tuple[str, ...]], int] = {}
        for i in cells:
            if self._key(i) not in done:
                first.setdefault(self._key(i), i)
        left = list(first.values())
        return [left[b : b + self.cells_at_a_time] for b in range(0, len(left), self.cells_at_a_time)]

    def _model_of(self, i: int) -> Model:
        """Whose a cell's rules are."""
        return self._base if self.cells[i].kind == CONTROL else self.model

    def _key(self, i: int) -> tuple[bool, tuple[str, ...]]:
        """The same of cells that are one variant."""
        return self.cells[i].kind == CONTROL, self.cells[i].rules

    @property
    def steps(self) -> int:
        """What is left to do, in layers passed by a variant."""
        sizes = self.text.n_ctx - 1, self.settings.first_scored
        baseline, *one = (self._fork.steps(rules, *sizes) for rules in (None, *self._rules))
        if self._base_fork is not None:
            other = self._base_fork.steps(None, *sizes)
            one = [other if cell.kind == CONTROL else n for cell, n in zip(self.cells, one, strict=True)]
            baseline += other
        groups = [group for chunk in range(self.text.n) for group in self._groups(chunk, self.mine(chunk))]
        return sum(baseline + sum(one[i] for i in group) for group in groups)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for chunk in range(self.text.n):
            yield from self.run(chunk, self.mine(chunk))

    def run(self, chunk: int, cells: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Some cells of a chunk, but for those that have ended."""
        for group in self._groups(chunk, cells):
            yield from self._run(group, chunk)
        yield from self._same(chunk, cells)

    def _same(self, chunk: int, cells: Iterable[int]) -> Iterator[tuple[int, int]]:
        """What a cell left of a chunk is left of it by all with the same rules."""
        done = {
            self._key(i): self.finished[i, chunk]
            for i in range(len(self.cells))
            if (i, chunk) in self.finished
        }
        for i in cells:
            if (i, chunk) not in self.finished:
                self.finished[i, chunk] = done[self._key(i)]
                for j, where in list(self.not_finite.items()):
                    if self._key(j) == self._key(i):
                        self.not_finite.setdefault(i, where)
                yield i, chunk

    def _run(self, group: list[int], chunk: int) -> Iterator[tuple[int, int]]:
        ids, targets = self.text[chunk]
        self._rewind(self._baseline, chunk, self._base)
        for i in group:
            self._rewind(self._rules[i], chunk, self._model_of(i))
        found = compared(
            self._evaluation(ids[:-1], group),
            targets,
            len(group),
            self.executor,
            self._reference,
            lambda: self._not_finite(chunk, self._baseline, self._base),
        )
        for i, (paired, finite) in zip(group, found, strict=True):
            if not finite and i not in self.not_finite:
                self.not_finite[i] = self._not_finite(chunk, self._rules[i], self._model_of(i))
            rules = self._rules[i] if self.cells[i].rules else None
            self.finished[i, chunk] = CellChunk(paired, _counts(rules))
            yield i, chunk

    def _evaluation(self, ids: np.ndarray, group: Sequence[int]) -> Generator[np.ndarray, None, None]:
        """Logits by blocks of rows: of each the baseline's, then each cell's."""
        first = self.settings.first_scored
        if self._base_fork is None:
            yield from self._fork.logits(ids, first, [self._rules[i] for i in group], self.on_step)
            return
        again = [self.cells[i].kind == CONTROL for i in group]
        control, own = (
            [self._rules[i] for i, it_is in zip(group, again, strict=True) if it_is == which]
            for which in (True, False)
        )
        base = self._base_fork.logits(ids, first, control, self.on_step)
        mine = self._fork.logits(ids, first, own, self.on_step)
        with contextlib.closing(base), contextlib.closing(mine):
            for logits in base:
                yield logits
                next(mine)  # without rules, which is no baseline here
                for it_is in again:
                    yield next(base if it_is else mine)
            next(mine, None)  # what it holds is given back

    def find_lost(self) -> None:
        """Fill in `not_finite` for cells that `finished` was given, as by a run that is gone on with."""
        for (i, chunk), left in sorted(self.finished.items()):
            if i not in self.not_finite and not all_finite(left.paired.kld):
                self.not_finite[i] = self._not_finite(chunk, self._rules[i], self._model_of(i))

    def _not_finite(self, chunk: int, rules: FakeQuant | None, model: Model) -> dict[str, Any]:
        if rules is not None:
            rules = FakeQuant(rules.values, rules.rules)
            self._rewind(rules, chunk, model)
        return self.text.where_not_finite(chunk, rules, self.executor, self.settings.activations, model)

    def _rewind(self, rules: FakeQuant | None, chunk: int, model: Model) -> None:
        """To where a run stands at the chunk: first-call and stochastic rounding go by the rows before it."""
        if rules is not None:
            rules.reset()
            for value, rows in self._rows[id(model)]:
                rules.pass_by(value.place, chunk * rows)

    def about(self) -> dict[str, Any]:
        """What is measured, on what."""
        about = self.text.about_run() | ({"baseline": list(self.baseline)} if self.baseline else {})
        return about | ({} if self.base_model is None else {"base_model": self.base_model.path})

    def result(self) -> dict[str, Any]:
        """The figures of the chunks that ended in every cell, see `figures`."""
        return add_nodes(figures(self.about(), self.cells, self.finished), self.not_finite)


def _counts(rules: FakeQuant | None) -> np.ndarray:
    if rules is None:
        return np.empty((0, len(COUNT_COLUMNS)))
    counts = [[c.rows_quantised, c.elements, *c.totals] for c in rules.matched if c.totals is not None]
    return np.array(counts, np.float64).reshape(-1, len(COUNT_COLUMNS))
