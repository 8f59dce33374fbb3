"""Variants of the model over the chunks of a text, each compared with one baseline, token by token."""

from __future__ import annotations

import copy
import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import Executor, default_fpu
from fq_kernels.rules import FakeQuant, Norm

from .activations import ACTIVATIONS
from .errors import FqError, NotFiniteError
from .finite import all_finite, first_not_finite, in_batches, not_finite_text, rows_seen, rules_at
from .runner import Context, Model
from .statistics import Paired, compare, ppl_se, score, summarise
from .trace import Trace

DEFAULT_BATCH = 512
ORDERS = ("random", "first")


def first_scored(n_ctx: int) -> int:
    """The first position of a chunk whose prediction is scored."""
    return n_ctx // 2


def n_scored_per_chunk(n_ctx: int) -> int:
    return n_ctx - 1 - first_scored(n_ctx)


def chunk_order(n: int, seed: int) -> list[int]:
    """The numbers below n in a random order that is the same on every machine and in every version.

    By the SHA-256 of "seed:number": no library's generator has a say in it.
    """
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


class Chunks:
    """The chunks of a text, tokenised once, that are evaluated, by their position in the run.

    order    "random": the beginning of one permutation of all chunks of the text, so that a longer
             run contains the shorter; "first": the text's first, as llama-perplexity takes them
    seed     of the permutation, 0 if none is given; None where there is none
    n, n_text
             how many are evaluated, how many the text has
    indices  which of the text's each one is, from 0

    Raises FqError for a text that is too short, a context that does not fit, or an unknown order.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        n_ctx: int,
        chunks: int = -1,
        order: str = "random",
        seed: int | None = None,
    ) -> None:
        ids = np.asarray(tokens, np.int64)
        if n_ctx < 3:
            raise FqError(f"a context of {n_ctx} tokens has nothing to score; take at least 3")
        if n_ctx > model.hparams.n_ctx_train:
            raise FqError(f"context of {n_ctx} tokens: the model allows at most {model.hparams.n_ctx_train}")
        if len(ids) < n_ctx:
            raise FqError(f"the text has {len(ids)} tokens; one chunk needs {n_ctx}")
        if chunks == 0 or chunks < -1:
            raise FqError(f"chunks must be positive, or -1 for all, not {chunks}")
        if order not in ORDERS:
            raise FqError(f"the order of chunks must be {' or '.join(ORDERS)}, not {order!r}")
        if order == "random":
            seed = operator.index(seed or 0)
            if not 0 <= seed < 1 << 64:
                raise FqError("the seed of the chunks' order must be from 0 to 2**64 - 1")
        elif seed is not None:
            raise FqError(f"a seed of the chunks' order is for random order, not for {order}")
        self.model, self.tokens, self.n_ctx = model, ids, n_ctx
        self.n_text = len(ids) // n_ctx
        self.n = self.n_text if chunks == -1 else min(chunks, self.n_text)
        self.order, self.seed = order, seed
        all_of_it = range(self.n_text) if seed is None else chunk_order(self.n_text, seed)
        self.indices = tuple(all_of_it[: self.n])

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of a chunk, BOS in the first one's place; the scored ones among them)."""
        index = self.indices[position]
        ids = self.tokens[index * self.n_ctx : (index + 1) * self.n_ctx].copy()
        targets = ids[first_scored(self.n_ctx) + 1 :].copy()
        tokenizer = self.model.tokenizer
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            ids[0] = tokenizer.bos_id
        return ids, targets

    def about(self) -> dict[str, Any]:
        """Which chunks, as written to JSON."""
        return {"chunk_order": self.order, "chunk_seed": self.seed, "chunk_indices": list(self.indices)}


@dataclass(frozen=True)
class Stream:
    """One variant of the model.

    name         what it is called in results and traces
    rules        its rules and counters, no other stream's; None: no rules
    activations  "exact" or "ggml" (see Context)
    """

    name: str
    rules: FakeQuant | None = None
    activations: str = "exact"


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
    n_ctx          tokens per chunk; the second half of each chunk is scored
    chunks         how many chunks, -1 for all that the text has
    chunk_order, chunk_seed
                   which of the text's, and in which order: `Chunks`
    batch          tokens per evaluation
    trace          gets the kernel calls, labelled with stream and chunk: its place in the text, from 0

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
        n_ctx: int = 512,
        chunks: int = -1,
        chunk_order: str = "random",
        chunk_seed: int | None = None,
        executor: Executor,
        batch: int = DEFAULT_BATCH,
        trace: Trace | None = None,
    ) -> None:
        if batch < 1:
            raise FqError(f"batch size must be at least 1, not {batch}")
        self.text = Chunks(model, tokens, n_ctx, chunks, chunk_order, chunk_seed)
        self.streams, self.baseline = tuple(streams), baseline
        self._all = self.streams if baseline is None else (baseline, *self.streams)
        for stream in self._all:
            if stream.activations not in ACTIVATIONS:
                known = " or ".join(ACTIVATIONS)
                raise FqError(f"{stream.name} activations must be {known}, not {stream.activations!r}")
        self.model, self.tokens, self.n_ctx, self.batch = model, self.text.tokens, n_ctx, batch
        self.n_chunks_text, self.n_chunks = self.text.n_text, self.text.n
        self.executor = executor
        self.context = Context(model, n_ctx, executor)
        self.trace = trace
        self.on_step: Callable[[], None] = lambda: None
        self._no_rules = FakeQuant(model.norms)
        self._chunks: list[_Chunk] = []
        self.not_finite: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        names = ", ".join(stream.name for stream in self._all)
        return (
            f"<{type(self).__name__} of {os.path.basename(self.model.path)}: {self.done} of {self.n_chunks} "
            f"chunks of {self.n_ctx}; {names}>"
        )

    @property
    def done(self) -> int:
        """Chunks that ended."""
        return len(self._chunks)

    @property
    def steps(self) -> int:
        """What is left to do, in nodes of the graph computed; ``on_step`` is called as each is."""
        batches = -(-(self.n_ctx - 1) // self.batch)
        per_chunk = batches * len(self.model.graph.nodes) * len(self._all)
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
        rules = [stream.rules for stream in self._all if stream.rules is not None]
        while self.done < self.n_chunks:
            position = self.done
            counters = [copy.deepcopy(r.counters) for r in rules]
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
        base = nll_base = None
        nll, paired = [], []
        if self.baseline is not None:
            seen = rows_seen(self.baseline.rules)
            base = self._logits(position, ids, self.baseline)
            if not all_finite(base):
                where = self._not_finite(position, ids, self.baseline, seen)
                raise NotFiniteError(not_finite_text("baseline", where))
        for i, stream in enumerate(self.streams):
            seen = rows_seen(stream.rules)
            logits = self._logits(position, ids, stream)
            finite = all_finite(logits)
            if base is None:
                nll.append(score(logits, targets, self.executor))
            else:
                paired.append(compare(base, logits, targets, self.executor))
                nll.append(paired[-1].nll)
            del logits  # before the next ones are made
            if not finite and i not in self.not_finite:
                self.not_finite[i] = self._not_finite(position, ids, stream, seen)
        if base is not None:
            nll_base = paired[0].nll_base if paired else score(base, targets, self.executor)
        return _Chunk(nll_base, nll, paired)

    def _not_finite(
        self, position: int, ids: np.ndarray, stream: Stream, seen: dict[Norm, int]
    ) -> dict[str, Any]:
        """Where; ``seen`` is what its rules had seen before the chunk."""
        evaluations = in_batches(ids[:-1], first_scored(self.n_ctx), self.batch)
        rules = rules_at(stream.rules, seen)
        return {"chunk": self.text.indices[position]} | first_not_finite(
            self.model, evaluations, self.executor, rules, stream.activations
        )

    def _logits(self, position: int, ids: np.ndarray, stream: Stream) -> np.ndarray:
        """Logits of the scored positions of a chunk, float32 (n_scored, n_vocab)."""
        self.context.clear()
        self.context.rules = self._no_rules if stream.rules is None else stream.rules
        self.context.activations = stream.activations
        self.context.on_node = self.on_step
        self.context.trace = self.trace and self.trace.labelled(
            stream=stream.name, chunk=self.text.indices[position]
        )
        first, last = first_scored(self.n_ctx), self.n_ctx - 1
        parts = []
        for begin in range(0, last, self.batch):
            end = min(begin + self.batch, last)
            wanted = slice(max(first - begin, 0), max(end - begin, 0))
            part = self.context.eval(ids[begin:end], wanted)
            if len(part):
                parts.append(part)
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
            "n_scored": self.done * n_scored_per_chunk(self.n_ctx),
            **self.text.about(),
        }

    @default_fpu()
    def result(self) -> dict[str, Any]:
        """The figures of the chunks that ended, as written to JSON."""
        ppl, se = ppl_se(np.concatenate(self.nll_base)) if self.nll_base else (math.nan, math.nan)
        streams: list[dict[str, Any]] = []
        for i, stream in enumerate(self.streams):
            figures: dict[str, Any] = {"name": stream.name, "activations": stream.activations}
            if stream.rules is not None:
                figures["fake_quant"] = stream.rules.as_dict()
            if paired := self.paired_of(i):
                figures["comparison"] = summarise(paired)
            figures["not_finite"] = self.not_finite.get(i)
            streams.append(figures)
        return self.about() | {"ppl_base": ppl, "ppl_base_se": se, "streams": streams}
