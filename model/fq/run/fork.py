"""Several variants of the model over one sequence, layer by layer; what they share is computed once.

A variant whose rules first act at some node is the baseline up to there. It starts from a copy
of the baseline's values at that node, and its logits are the same to the last bit as those of an
evaluation of its own.

All variants pass a layer before any of them enters the next one. Between two layers each holds
its residual alone, K and V of a layer live no longer than its turn there, and a layer's packed
weights are in the processor's cache for all of them. Each unpacks them again, which is 3 to 7 %
of a product with 511 tokens; more tokens in one product lose as much, as their sums leave L2.
Logits come last, of all variants by blocks of rows: those of a whole chunk would take more
memory than all else where the vocabulary is large.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from fq_kernels import Executor
from fq_kernels.rules import FakeQuant

from .context import Context
from .model import Model

# Bytes of logits that are made at a time: those of a large vocabulary take as much as a small model.
MAX_LOGITS = 64 << 20
MIN_BLOCK_ROWS = 16


def row_blocks(n_tokens: int, n_vocab: int) -> list[slice]:
    """The rows whose logits are made at a time: alike in number, fewer last; all if they are not large."""
    n = max(min(-(-4 * n_tokens * n_vocab // MAX_LOGITS), n_tokens // MIN_BLOCK_ROWS), 1)
    edges = [-(-n_tokens * i // n) for i in range(n + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


class Block(NamedTuple):
    """Some of the wanted rows of a batch of a sequence, whose logits are made at a time."""

    batch: int
    rows: slice

    @property
    def n(self) -> int:
        return int(self.rows.stop - self.rows.start)


class Variant(NamedTuple):
    """start: its first node; values: those still to be read, by node, of each batch of the sequence."""

    rules: FakeQuant
    start: int
    values: list[dict[int, np.ndarray]]


class Fork:
    """Evaluates whole sequences of up to n_ctx tokens under several rules at once.

    batch        tokens per matrix product, as of an evaluation by Context
    activations  "exact" or "ggml" (see Context), of all variants
    baseline     rules of the baseline, with which variants then share nothing; None: none
    context      of the model, which others may use as long as nothing is being evaluated here; None: its own
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        executor: Executor,
        batch: int,
        activations: str = "exact",
        baseline: FakeQuant | None = None,
        context: Context | None = None,
    ) -> None:
        self.model, self.batch, self.activations = model, batch, activations
        self.context = context or Context(model, n_ctx, executor, activations=activations)
        self._no_rules = FakeQuant(model.values)
        self._baseline_rules = baseline
        self._sizes = (0, 0)
        self._nodes = model.graph.nodes
        layers = groupby(range(len(self._nodes)), key=lambda i: self._nodes[i].layer)
        groups = [list(group) for _, group in layers]
        # the logits' nodes: what follows the last value that a rule takes, each row alone
        self._head = range(1 + max(i for i, node in enumerate(self._nodes) if node.values), len(self._nodes))
        self._layers = [range(nodes[0], min(nodes[-1] + 1, self._head.start)) for nodes in groups]

    def first_node(self, rules: FakeQuant | None) -> int:
        """Where a variant leaves the baseline: the first node whose value a rule takes.

        0 for one without rules: it is computed from the start, as the control must be; and where the baseline
        has rules.
        """
        if rules is not None and self._baseline_rules is None:
            for i, node in enumerate(self._nodes):
                if any(rules.takes(value.place) for value in node.values):
                    return i
        return 0

    def steps(self, rules: FakeQuant | None, n_tokens: int, first_output: int) -> int:
        """How many layers a variant computes, embedding and last norm among them, and blocks of logits."""
        first = self.first_node(rules)
        layers = sum(nodes.stop > first for nodes in self._layers)
        return layers + len(self.blocks(n_tokens, first_output))

    def logits(
        self,
        ids: np.ndarray,
        first_output: int,
        variants: Sequence[FakeQuant | None],
        on_step: Callable[[], None] = lambda: None,
    ) -> Generator[np.ndarray, None, None]:
        """Logits by blocks of rows: of each block the baseline's, then each variant's in order.

        ids           tokens of one sequence
        first_output  from which token on logits are wanted
        on_step       called for each of a variant's `steps` as it ends

        Yields float32 (rows, n_vocab), which hold until the next ones, the baseline's for its block. A
        variant's rows are in its counters before the first.
        """
        base, *others = passed = self.through_layers(ids, first_output, variants, on_step)
        for block in self.blocks(len(ids), first_output):
            held = self.logits_of(base, block)
            on_step()
            yield held
            for variant in others:
                logits = self.logits_of(variant, block)
                on_step()
                yield logits
                self.give(logits)
            self.give(held)
        self.release(passed)

    def through_layers(
        self,
        ids: np.ndarray,
        first_output: int,
        variants: Sequence[FakeQuant | None] = (),
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Variant]:
        """The baseline and then each variant, up to their logits; to be given to `release` in the end."""
        self._begin(ids, first_output)
        base = self._variant(self._baseline_rules)
        others = [self._variant(rules) for rules in variants]
        for layer in self._layers:
            self._baseline(layer, base, others)
            on_step()
            for variant in others:
                if variant.start < layer.stop:
                    self._advance(range(max(layer.start, variant.start), layer.stop), variant)
                    on_step()
        return [base, *others]

    def logits_of(self, variant: Variant, block: Block) -> np.ndarray:
        """Float32 (rows, n_vocab), in memory that is given back by `give`."""
        context, last = self.context, self._head.stop - 1
        source = self._head.start - 1
        # a copy, as each input's memory is taken back
        values = {source: context.buffers.copy(variant.values[block.batch][source][block.rows])}
        context.fake_quant, context.activations = variant.rules, self.activations
        context.evaluate(self._head, values, self._ids[self._parts[block.batch]], self._outputs[block.batch])
        return values[last]

    def give(self, logits: np.ndarray) -> None:
        self.context.buffers.give(logits)

    def release(self, variants: Sequence[Variant]) -> None:
        for variant in variants:
            for values in variant.values:
                self.context.buffers.give(values.pop(self._head.start - 1))

    def _batches(self, n_tokens: int) -> list[slice]:
        return [slice(b, min(b + self.batch, n_tokens)) for b in range(0, n_tokens, self.batch)]

    def blocks(self, n_tokens: int, first_output: int) -> list[Block]:
        """Of a sequence, in order. They are the same for all models of a vocabulary."""
        n_vocab = self.model.hparams.n_vocab
        return [
            Block(i, rows)
            for i, batch in enumerate(self._batches(n_tokens))
            if (n := batch.stop - max(batch.start, first_output)) > 0
            for rows in row_blocks(n, n_vocab)
        ]

    def _begin(self, ids: np.ndarray, first_output: int) -> None:
        self._ids = ids
        self._parts = self._batches(len(ids))
        self._outputs = [
            slice(max(first_output - part.start, 0), part.stop - part.start) for part in self._parts
        ]
        self._n_outputs = len(ids) - first_output
        if self._sizes != (len(ids), first_output):  # else the last sequence's memory fits this one
            self.context.buffers.clear()
            self._sizes = len(ids), first_output

    def _variant(self, rules: FakeQuant | None) -> Variant:
        return Variant(rules or self._no_rules, self.first_node(rules), [{} for _ in self._parts])

    def _baseline(self, layer: range, base: Variant, others: list[Variant]) -> None:
        """The baseline through a layer; variants that start in it get its values on the way."""
        starts = {variant.start for variant in others if variant.start and variant.start in layer}
        for begin, end in pairwise([layer.start, *sorted(starts - {layer.start}), layer.stop]):
            for variant in others:
                if begin and variant.start == begin:
                    self._fork(base, variant)
            self._advance(range(begin, end), base)

    def _fork(self, base: Variant, variant: Variant) -> None:
        for values, own in zip(base.values, variant.values, strict=True):
            own.update((i, self.context.buffers.copy(value)) for i, value in values.items())
        for node in self._nodes[: variant.start]:
            n_tokens = node.n_tokens(len(self._ids), self._n_outputs)
            for value in node.values:
                variant.rules.pass_by(value.place, n_tokens * value.rows)

    def _advance(self, nodes: range, variant: Variant) -> None:
        context = self.context
        context.fake_quant, context.activations = variant.rules, self.activations
        for part, outputs, values in zip(self._parts, self._outputs, variant.values, strict=True):
            context.n_past = part.start
            context.evaluate(nodes, values, self._ids[part], outputs)
