"""The op table: what each op's weight looks like, and what it computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fq_kernels import Executor, geglu, soft_cap, swiglu
from fq_kernels.rules import FakeQuant

from . import gradients
from .gradients import Differentiation
from .graph import (
    AttentionAttributes,
    Graph,
    Node,
    NormAttributes,
    Op,
    RopeAttributes,
    ScaleAttributes,
    SoftCapAttributes,
)

Values = Sequence[np.ndarray]


class Evaluation(Protocol):
    """What an op may use of the evaluation that it is computed in.

    ids       the tokens, int (n_tokens,)
    out_rows  those among them whose logits are wanted
    """

    ids: np.ndarray
    out_rows: slice
    executor: Executor
    fake_quant: FakeQuant

    def buffer(self, rows: int, n: int) -> np.ndarray:
        """Uninitialised float32 (rows, n)."""

    def vector(self, name: str) -> np.ndarray:
        """A one-dimensional tensor, float32."""

    def rows_of(self, name: str) -> np.ndarray:
        """The tokens' rows of a weight, float32 (n_tokens, n)."""

    def product(self, node: Node, x: np.ndarray) -> np.ndarray:
        """x (rows, n_in) times the node's rows of its weight, and its bias: (rows, n_out)."""

    def rope(self, heads: np.ndarray, attributes: RopeAttributes) -> np.ndarray:
        """heads (n_tokens, n_head, d), turned in place."""

    def attention(self, node: Node, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """q, k, v (n_tokens, heads, d) -> (n_tokens, n_head * d); k and v into the layer's cache."""


@dataclass(frozen=True)
class OpRow:
    """An op.

    compute  the node's value, (rows, n) or (rows, heads, d), from its inputs'
    back     gradients of the inputs from that of the value (`gradients`); None: of no input
    linear   places of the inputs that the value is proportional to, where there is no bias
    reuses   whether the value takes the memory of its first input
    weight   shape of the node's weight, from the shapes of its value and of its first input and the number
             of tokens in the vocabulary; None: it has none
    vector   whether the weight is a vector, which is F32
    """

    compute: Callable[[Evaluation, Node, Values], np.ndarray]
    weight: Callable[[Sequence[Any], Sequence[Any], int], tuple[int, ...]] | None = None
    vector: bool = False
    reuses: bool = False
    linear: tuple[int, ...] = ()
    back: Callable[[Differentiation, Node, Values, np.ndarray, np.ndarray], Values] | None = None


def _get_rows(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    assert node.weight is not None
    return run.rows_of(node.weight)


def _rms_norm(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    (x,) = inputs
    assert node.norm is not None and node.weight is not None and isinstance(node.attributes, NormAttributes)
    weight = run.vector(node.weight)
    out = run.buffer(len(x), math.prod(x.shape[1:]))  # there may be no rows
    n = weight.size
    whole = x.shape == out.shape and n == x.shape[1]  # rows as they are, not the heads in them
    run.fake_quant.rms_norm(
        node.norm,
        x if whole else x.reshape(-1, n),
        eps=node.attributes.eps,
        weight=weight,
        out=out if whole else out.reshape(-1, n),
        executor=run.executor,
    )
    return out


def _mul_mat(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    return run.product(node, inputs[0])


def _add(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    x, y = inputs
    out = run.buffer(*x.shape)
    np.add(x, y, out=out)
    return out


def _rope(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    assert isinstance(node.attributes, RopeAttributes)
    return run.rope(_heads(inputs[0], node.shape[-1]), node.attributes)


def _cut(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    return _heads(inputs[0], node.shape[-1])


def _attention(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    assert isinstance(node.attributes, AttentionAttributes)
    d = inputs[0].shape[-1]
    q, k, v = (_heads(x, d) for x in inputs)
    return run.attention(node, q, k, v)


def _swiglu(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    gate, up = inputs
    return swiglu(gate, up, executor=run.executor)


def _geglu(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    gate, up = inputs
    return geglu(gate, up, executor=run.executor)


def _scale(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    (x,) = inputs
    assert isinstance(node.attributes, ScaleAttributes)
    np.multiply(x, np.float32(node.attributes.factor), out=x)
    return x


def _soft_cap(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    assert isinstance(node.attributes, SoftCapAttributes)
    return soft_cap(inputs[0], node.attributes.cap, executor=run.executor)


def _out_rows(run: Evaluation, node: Node, inputs: Values) -> np.ndarray:
    return inputs[0][run.out_rows]


def _heads(x: np.ndarray, d: Any) -> np.ndarray:
    return x.reshape(len(x), -1, d)


OPS: dict[Op, OpRow] = {
    Op.GET_ROWS: OpRow(_get_rows, weight=lambda value, x, n_vocab: (n_vocab, value[-1])),
    Op.RMS_NORM: OpRow(
        _rms_norm, weight=lambda value, x, n_vocab: (value[-1],), vector=True, back=gradients.rms_norm
    ),
    Op.MUL_MAT: OpRow(
        _mul_mat,
        weight=lambda value, x, n_vocab: (value[-1], x[-1]),
        linear=(0,),
        back=gradients.mul_mat,
    ),
    Op.ADD: OpRow(_add, back=gradients.add),
    Op.ROPE: OpRow(_rope, reuses=True, linear=(0,), back=gradients.rope),
    Op.HEADS: OpRow(_cut, reuses=True, linear=(0,), back=gradients.heads),
    Op.ATTENTION: OpRow(_attention, linear=(2,), back=gradients.attention),
    Op.SWIGLU: OpRow(_swiglu, reuses=True, linear=(1,), back=gradients.swiglu),
    Op.GEGLU: OpRow(_geglu, reuses=True, linear=(1,), back=gradients.geglu),
    Op.SCALE: OpRow(_scale, reuses=True, linear=(0,), back=gradients.scale),
    Op.SOFT_CAP: OpRow(_soft_cap, reuses=True, back=gradients.soft_cap),
    Op.OUT_ROWS: OpRow(_out_rows, reuses=True, linear=(0,), back=gradients.out_rows),
}


def _owners(graph: Graph) -> list[int]:
    """Of each node the one whose value's memory its own lies in."""
    owners: list[int] = []
    for i, node in enumerate(graph.nodes):
        owners.append(owners[node.inputs[0]] if OPS[node.op].reuses else i)
    return owners


def last_reads(graph: Graph) -> list[list[tuple[int, bool]]]:
    """By node, the earlier ones whose values nothing after it reads, and whether their memory is free."""
    owners = _owners(graph)
    users = Counter(owners)
    reads: list[list[tuple[int, bool]]] = []
    for ends in graph.last_uses():
        now: list[tuple[int, bool]] = []
        reads.append(now)
        for source in ends:
            users[owners[source]] -= 1
            now.append((source, not users[owners[source]]))
    return reads


def buffers(graph: Graph) -> dict[tuple[Any, int], int]:
    """How many values an evaluation keeps at most at a time, by (what counts their rows, width).

    Memory is used again for values of the same shape alone, so it takes that of all of these.
    """
    owners = _owners(graph)
    shapes = [(node.shape[0], node.width) for node in graph.nodes]
    live: Counter[tuple[Any, int]] = Counter()
    most: Counter[tuple[Any, int]] = Counter()
    for i, reads in enumerate(last_reads(graph)):
        if owners[i] == i:
            live[shapes[i]] += 1
            most[shapes[i]] = max(most[shapes[i]], live[shapes[i]])
        live.subtract(shapes[owners[source]] for source, free in reads if free)
    return dict(most)
