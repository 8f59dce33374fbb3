"""Variants of the model over the chunks of a text, each compared with one baseline, token by token."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import Executor, default_fpu
from fq_kernels.rules import FakeQuant, Place

from ..errors import NotFiniteError
from ..run.context import Context
from ..run.finite import all_finite, in_batches, not_finite_text, rows_seen, rules_at
from ..run.fork import Fork
from ..run.model import Model
from ..run.trace import Trace
from .chunks import Chunks, Settings, batch_of, check_activations, compared
from .statistics import Paired, ppl_se, score, summarise


@dataclass(frozen=True)
class Stream:
    """One variant of the model.

    name         what it is called in results and traces
    fake_quant   its rules and counters, no other stream's; None: no rules
    activations  "exact" or "ggml" (see Context); None: the settings'
    model        of the same vocabulary, whose its rules are; None: the measurement's
    logits       of some scored positions of a chunk by its position in the run, float32, where they are known
                 and no model is evaluated; None: they are not
    """

    name: str
    fake_quant: FakeQuant | None = None
    activations: str | None = None
    model: Model | None = None
    logits: Callable[[int, slice], np.ndarray] | None = None


class _Chunk(NamedTuple):
    """A chunk's figures: nll of the baseline, then of each stream; comparisons if there is a baseline."""

    nll_base: np.ndarray | None
    nll: list[np.ndarray]
    paired: list[Paired]


class Streams:
    """One measurement; iterate over it to run it, chunk by chunk.

    model, tokens  the whole text, tokenised once
    streams        what is evaluated on each chunk, in this order
    baseline       evaluated before them, once a chunk, and compared with each; None: no comparison
    settings       on which chunks, and how; they may be given by name too, as in ``n_ctx=64``
    trace          gets the kernel calls, labelled with stream and chunk: its place in the text, from 0

    What streams share with the baseline is computed once, by `Fork`, unless nothing is shared: other
    activations, rules for the baseline, another model. Logits are made by blocks of rows, which those of a
    large vocabulary need. A trace shows each evaluation whole, logits and all. The bits are the same.

    ``for chunk in run: ...`` yields each chunk's position in the run as it ends. An interrupted run loses at
    most one chunk, whose rows are in no counter either; iterating again goes on with it.
    ``not_finite`` says of each stream, by its place, where its logits were first not finite: chunk
    of the text, node, op, token of the chunk (both from 0); it goes on, and its figures are NaN.
    Raises FqError for a text that is too short or a context that does not fit, and NotFiniteError if
    the baseline's logits are not finite.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        streams: Sequence[Stream],
        *,
        baseline: Stream | None = Stream("baseline"),
        executor: Executor,
        trace: Trace | None = None,
        settings: Settings | None = None,
        **changes: Any,
    ) -> None:
        self.settings, self.model = Settings.changed(settings, changes), model
        self.text = Chunks(model, tokens, self.settings)
        self.streams, self.baseline = tuple(streams), baseline
        self._all = self.streams if baseline is None else (baseline, *self.streams)
        for stream in self._all:
            check_activations(self._activations(stream), f"{stream.name} ")
        n_ctx = self.settings.n_ctx
        self._batch = batch_of(self.settings, [stream.fake_quant for stream in self._all])
        self.tokens, self.n_ctx = self.text.tokens, n_ctx
        self.n_chunks_text, self.n_chunks = self.text.n_text, self.text.n
        self.executor = executor
        self.trace = trace
        alike = baseline is not None and baseline.fake_quant is None
        alike = alike and len({self._activations(stream) for stream in self._all}) == 1
        models = list({id(each): each for each in (model, *map(self._model, self._all))}.values())
        alike = alike and len(models) == 1 and all(stream.logits is None for stream in self._all)
        self._fork: Fork | None = None
        # of each stream, where they share nothing; None: its logits are known
        self._forks: list[Fork | None] = []
        if alike and trace is None:
            self._fork = Fork(model, n_ctx, executor, self._batch, self._activations(self._all[0]))
            self._contexts = {id(model): self._fork.context}
        else:
            self._contexts = {id(each): Context(each, n_ctx, executor) for each in models}
            if trace is None:
                self._forks = [None if stream.logits else self._alone(stream) for stream in self._all]
        self.context = self._contexts[id(model)]
        self.on_step: Callable[[], None] = lambda: None
        self.on_logits: Callable[[np.ndarray], None] = lambda logits: None  # of a baseline that is alone
        self._no_rules = {id(each): FakeQuant(each.values) for each in models}
        self._chunks: list[_Chunk] = []
        self.not_finite: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        names = ", ".join(stream.name for stream in self._all)
        return (
            f"<{type(self).__name__} of {os.path.basename(self.model.path)}: {self.done} of {self.n_chunks} "
            f"chunks of {self.n_ctx}; {names}>"
        )

    def _activations(self, stream: Stream) -> str:
        return stream.activations or self.settings.activations

    def _model(self, stream: Stream) -> Model:
        return stream.model or self.model

    def _alone(self, stream: Stream) -> Fork:
        model = self._model(stream)
        of_stream = self._activations(stream), stream.fake_quant, self._contexts[id(model)]
        return Fork(model, self.settings.n_ctx, self.executor, self._batch, *of_stream)

    @property
    def done(self) -> int:
        """Chunks that ended."""
        return len(self._chunks)

    @property
    def steps(self) -> int:
        """What is left to do, in layers passed or nodes computed; ``on_step`` is called as each is."""
        sizes = self.n_ctx - 1, self.settings.first_scored
        if self._forks:
            per_chunk = sum(fork.steps(None, *sizes) for fork in self._forks if fork is not None)
        elif self._fork is not None:
            per_chunk = sum(self._fork.steps(stream.fake_quant, *sizes) for stream in self._all)
        else:
            batches = -(-(self.n_ctx - 1) // self._batch)
            run = (stream for stream in self._all if stream.logits is None)
            per_chunk = batches * sum(len(self._model(stream).graph.nodes) for stream in run)
        return (self.n_chunks - self.done) * per_chunk

    def nll_of(self, stream: int) -> list[np.ndarray]:
        """Of a stream, by its place in ``streams``, per chunk; -ln p of each scored token."""
        return [chunk.nll[stream] for chunk in self._chunks]

    def paired_of(self, stream: int) -> list[Paired]:
        """A stream beside the baseline, per chunk."""
        return [chunk.paired[stream] for chunk in self._chunks if chunk.paired]

    @property
    def nll_base(self) -> list[np.ndarray]:
        return [chunk.nll_base for chunk in self._chunks if chunk.nll_base is not None]

    @property
    def ppl(self) -> float:
        """Of the chunks so far, of the baseline."""
        return ppl_se(np.concatenate(self.nll_base))[0]

    def __iter__(self) -> Iterator[int]:
        rules = [stream.fake_quant for stream in self._all if stream.fake_quant is not None]
        while self.done < self.n_chunks:
            position = self.done
            counters = [r.kept() for r in rules]
            try:
                # one append keeps all of a chunk's figures, or none, whenever Ctrl-C comes
                self._chunks.append(self._run_chunk(position))
            except BaseException:
                if self.done == position:
                    # the unfinished chunk's rows are in no figure
                    for r, before in zip(rules, counters, strict=True):
                        r.counters = before
                raise
            yield position

    def _run_chunk(self, position: int) -> _Chunk:
        ids, targets = self.text[position]
        seen = [rows_seen(stream.fake_quant) for stream in self._all]
        nll: list[np.ndarray] = []
        if self.baseline is None:
            parts: list[list[np.ndarray]] = [[] for _ in self.streams]
            finite = [True] * len(parts)
            for i, logits in zip(cycle(range(len(parts))), self._evaluation(position, ids), strict=False):
                done = sum(map(len, parts[i]))
                finite[i] &= all_finite(logits)
                parts[i].append(score(logits, targets[done : done + len(logits)], self.executor))
                del logits  # before the next ones are made
            for i, whole in enumerate(finite):
                self._look(i, whole, position, seen[i])
            return _Chunk(None, [np.concatenate(part) for part in parts], [])
        if not self.streams:
            for logits in self._evaluation(position, ids):
                if not all_finite(logits):
                    where = self._not_finite(position, self.baseline, seen[0])
                    raise NotFiniteError(not_finite_text("baseline", where))
                self.on_logits(logits)
                done = sum(map(len, nll))
                nll.append(score(logits, targets[done : done + len(logits)], self.executor))
            return _Chunk(np.concatenate(nll), [], [])
        baseline, paired = self.baseline, []
        for i, (found, whole) in enumerate(
            compared(
                self._evaluation(position, ids),
                targets,
                len(self.streams),
                self.executor,
                None,
                lambda: self._not_finite(position, baseline, seen[0]),
                # a control reads the file, too: the same ln p, which are equal
                [baseline.logits is not None and stream.logits is None for stream in self.streams],
            )
        ):
            paired.append(found)
            self._look(i, whole, position, seen[i + 1])
        return _Chunk(paired[0].nll_base, [one.nll for one in paired], paired)

    def _look(self, i: int, finite: bool, position: int, seen: dict[Place, int]) -> None:
        if not finite and i not in self.not_finite:
            self.not_finite[i] = self._not_finite(position, self.streams[i], seen)

    def _not_finite(self, position: int, stream: Stream, seen: dict[Place, int]) -> dict[str, Any]:
        """Where; ``seen`` is what its rules had seen before the chunk."""
        rules = rules_at(stream.fake_quant, seen)
        activations = self._activations(stream)
        return self.text.where_not_finite(position, rules, self.executor, activations, self._model(stream))

    def _evaluation(self, position: int, ids: np.ndarray) -> Generator[np.ndarray, None, None]:
        """Logits of the scored positions of a chunk, by blocks of rows; of each, each stream's in turn."""
        if self._forks:
            yield from self._each_alone(position, ids[:-1])
        elif self._fork is not None:
            rules = [stream.fake_quant for stream in self.streams]
            yield from self._fork.logits(ids[:-1], self.settings.first_scored, rules, self.on_step)
        else:
            for stream in self._all:
                yield self._logits(position, ids, stream)

    def _each_alone(self, position: int, ids: np.ndarray) -> Generator[np.ndarray, None, None]:
        first = self.settings.first_scored
        blocks = next(fork for fork in self._forks if fork is not None).blocks(len(ids), first)
        passed = [
            (stream, fork, fork.through_layers(ids, first, (), self.on_step) if fork else [])
            for stream, fork in zip(self._all, self._forks, strict=True)
        ]
        done = 0
        for block in blocks:
            rows = slice(done, done := done + block.n)
            with contextlib.ExitStack() as held:
                for i, (stream, fork, variants) in enumerate(passed):
                    if fork is None:
                        assert stream.logits is not None
                        yield stream.logits(position, rows)
                        continue
                    logits = fork.logits_of(variants[0], block)
                    self.on_step()
                    yield logits
                    if i == 0:  # the others are compared with these
                        held.callback(fork.give, logits)
                    else:
                        fork.give(logits)
        for _, fork, variants in passed:
            if fork is not None:
                fork.release(variants)

    def _logits(self, position: int, ids: np.ndarray, stream: Stream) -> np.ndarray:
        if stream.logits is not None:
            return stream.logits(position, slice(None))
        context = self._contexts[key := id(self._model(stream))]
        context.clear()
        context.fake_quant = self._no_rules[key] if stream.fake_quant is None else stream.fake_quant
        context.activations = self._activations(stream)
        context.on_node = self.on_step
        context.trace = self.trace and self.trace.labelled(
            stream=stream.name, chunk=self.text.indices[position]
        )
        parts = [
            context.eval(part, wanted)
            for part, wanted in in_batches(ids[:-1], self.settings.first_scored, self._batch)
        ]
        parts = [part for part in parts if len(part)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def about(self) -> dict[str, Any]:
        """What was measured on, as written to JSON."""
        return {
            "model": self.model.path,
            "n_tokens": len(self.tokens),
            "n_ctx": self.n_ctx,
            "n_chunks": self.done,
            "n_chunks_asked": self.n_chunks,
            "partial": self.done < self.n_chunks,
            "n_scored": self.done * self.settings.n_scored,
            **self.text.about(),
        }

    @default_fpu()
    def result(self) -> dict[str, Any]:
        """The figures of the chunks that ended, as written to JSON."""
        ppl, se = ppl_se(np.concatenate(self.nll_base)) if self.nll_base else (math.nan, math.nan)
        streams: list[dict[str, Any]] = []
        for i, stream in enumerate(self.streams):
            figures: dict[str, Any] = {"name": stream.name, "activations": self._activations(stream)}
            if stream.fake_quant is not None:
                figures["fake_quant"] = stream.fake_quant.as_dict()
            if paired := self.paired_of(i):
                figures["comparison"] = summarise(paired, self.settings.first_scored)
            figures["not_finite"] = self.not_finite.get(i)
            streams.append(figures)
        return self.about() | {"ppl_base": ppl, "ppl_base_se": se, "streams": streams}
