"""Where a model's values stop being finite: what gave such logits is evaluated again, node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fq_kernels import Executor
from fq_kernels.rules import FakeQuant, Place

from ..arch.graph import N_OUTPUTS, Node
from .context import Context
from .model import Model

Evaluation = tuple[Sequence[int] | np.ndarray, slice | None]  # tokens and outputs of a Context.eval


def all_finite(logits: np.ndarray) -> bool:
    """Whether none of them is an infinity or NaN: minus infinity, too, is no logit of a sound model."""
    if not logits.size:
        return True
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(logits.min()) and np.isfinite(logits.max()))


def rows_seen(rules: FakeQuant | None) -> dict[Place, int]:
    """Where rules stand, for `rules_at`."""
    return {} if rules is None else {v.place: rules.rows_seen(v.place) for v in rules.values}


def rules_at(rules: FakeQuant | None, seen: Mapping[Place, int]) -> FakeQuant | None:
    """The same rules where they stood, which stochastic and first-call go by, with counters of their own."""
    if rules is None:
        return None
    again = FakeQuant(rules.values, rules.rules, count_errors=rules.count_errors)
    for place, rows in seen.items():
        again.pass_by(place, rows)
    return again


def in_batches(ids: np.ndarray, first_output: int, batch: int) -> list[Evaluation]:
    """A sequence as Streams and Fork evaluate it, with logits from token first_output on."""
    return [
        (part, slice(max(first_output - begin, 0), len(part)))
        for begin in range(0, len(ids), batch)
        for part in [ids[begin : begin + batch]]
    ]


class _Found(Exception):
    """Not an error: how the evaluation ends."""


class _Look:
    """In a trace's place: looks at the value of each node."""

    def __init__(self) -> None:
        self.begin = self.first_output = 0  # of the evaluation, in tokens of the sequence
        self.where: dict[str, Any] = {}

    def call(
        self,
        node: Node,
        fake_quant: FakeQuant,
        compute: Callable[..., np.ndarray],
        *args: Any,
        rounds: Node | None = None,
    ) -> Any:
        value = compute(node, *args)
        self._look(node, value)
        if rounds is not None:  # whose value is what this node has read
            self._look(rounds, args[0][0])
        return value

    def _look(self, node: Node, value: np.ndarray) -> None:
        if not all_finite(value):
            row = int(np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(axis=1))[0])
            first = self.first_output if node.shape[0] == N_OUTPUTS else self.begin
            self.where = {"node": node.name, "op": node.op.value, "token": first + row}
            raise _Found

    def evaluated(self, *_: int) -> None:
        pass


def first_not_finite(
    model: Model,
    evaluations: Iterable[Evaluation],
    executor: Executor,
    rules: FakeQuant | None = None,
    activations: str = "exact",
    *,
    decoding: bool = False,
) -> dict[str, Any]:
    """The first node, in order, with a value that is not finite in the first evaluation that has one.

    evaluations are those of a sequence from its start, and rules stand where they stood before them.
    {node: llama.cpp's name, op, token: of the sequence, from 0}; empty if all values are finite.
    """
    evaluations = list(evaluations)
    look: Any = _Look()
    n_ctx = sum(len(ids) for ids, _ in evaluations)
    context = Context(model, n_ctx, executor, rules, look, activations)
    for ids, outputs in evaluations:
        look.begin = context.n_past
        start = len(ids) - 1 if outputs is None else outputs.indices(len(ids))[0]
        look.first_output = look.begin + start
        try:
            context.eval(ids, outputs, decoding=decoding)
        except _Found:
            found: dict[str, Any] = look.where
            return found
    return {}


def not_finite_text(who: str, where: Mapping[str, Any]) -> str:
    """One line; where is `first_not_finite`'s, and may have ``chunk`` (from 0)."""
    chunk = f" in chunk {where['chunk'] + 1}" if "chunk" in where else ""
    place = ""
    if "node" in where:
        place = (
            f"; the first node that is not is {where['node']} ({where['op']}), at token {where['token'] + 1}"
        )
        place += " of the chunk" if chunk else ""
    return f"{who}: the logits are not finite{chunk}{place}"
