"""The graph: named operations in order, built before any data exists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import NamedTuple

from fq_kernels.rules import Place, Site, Value

# symbolic lengths in shapes
N_TOKENS = "n_tokens"
N_OUTPUTS = "n_outputs"
Shape = tuple[int | str, ...]


class Op(str, Enum):
    """What a node computes; names are ggml's where it has them. `ops.OPS` has a row for each."""

    GET_ROWS = "GET_ROWS"  # rows of a weight by token id
    RMS_NORM = "RMS_NORM_MUL"  # norm and its weight
    MUL_MAT = "MUL_MAT"
    ADD = "ADD"
    ROPE = "ROPE"
    HEADS = "RESHAPE"  # rows cut into heads, where nothing is turned
    ATTENTION = "ATTENTION"  # K and V into the cache, softmax(Q K^T) V
    SWIGLU = "SWIGLU"  # silu(gate) * up
    GEGLU = "GEGLU"  # gelu(gate) * up
    SCALE = "SCALE"  # by a number
    SOFT_CAP = "SOFT_CAP"  # cap * tanh(x / cap)
    OUT_ROWS = "OUT_ROWS"  # only the rows whose logits are wanted


class NormAttributes(NamedTuple):
    eps: float


class Yarn(NamedTuple):
    """YaRN: angles of pairs that turn often keep the scale 1, those that turn seldom take freq_scale.

    n_ctx_orig            tokens of context before it
    beta_fast, beta_slow  turns within them, from which on and up to which
    mix                   how much of it
    """

    n_ctx_orig: int
    beta_fast: float
    beta_slow: float
    mix: float


class RopeAttributes(NamedTuple):
    """Elements (2i, 2i+1) of a head, or with neox (i, i + n_rot/2), turn by position * freq_scale /
    freq_base^(2i / n_rot).

    factors       name of a tensor that each angle is divided by, (n_rot / 2,)
    long_factors  the same in contexts of more than n_ctx_orig tokens
    magnitude     what the turned elements are multiplied by
    """

    n_rot: int
    freq_base: float
    freq_scale: float = 1.0
    factors: str | None = None
    neox: bool = False
    long_factors: str | None = None
    n_ctx_orig: int = 0
    magnitude: float = 1.0
    yarn: Yarn | None = None


class AttentionAttributes(NamedTuple):
    """window: how many tokens each one sees, itself among them, 0 for all; soft_cap: of scores, or 0."""

    n_head: int
    n_head_kv: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0


class ScaleAttributes(NamedTuple):
    factor: float


class SoftCapAttributes(NamedTuple):
    cap: float


Attributes = NormAttributes | RopeAttributes | AttentionAttributes | ScaleAttributes | SoftCapAttributes


@dataclass(frozen=True)
class Node:
    """One operation.

    inputs  indices of earlier nodes
    weight  a tensor's name
    rows    which of the weight's rows, where several nodes share it; None: all
    bias    name of a tensor that is added to a product, and of which it takes the same rows
    values  what a rule can round: of a norm its own, of another node its result, which may have two
            names (as rows of tokens, and of heads)
    """

    name: str
    op: Op
    inputs: tuple[int, ...]
    shape: Shape
    layer: int | None = None
    weight: str | None = None
    attributes: Attributes | None = None
    values: tuple[Value, ...] = ()
    rows: tuple[int, int] | None = None
    bias: str | None = None

    @property
    def norm(self) -> Place | None:
        return self.values[0].place if self.op is Op.RMS_NORM else None

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for value in self.values for site in value.sites)

    def n_tokens(self, n_tokens: int, n_outputs: int) -> int:
        """Of how many tokens it has rows, in an evaluation of so many."""
        return n_outputs if self.shape[0] == N_OUTPUTS else n_tokens

    @property
    def width(self) -> int:
        """Elements of its value that a token makes."""
        return _width(self.shape)


def _width(shape: Shape) -> int:
    return math.prod(int(n) for n in shape[1:])


@dataclass
class Graph:
    """Nodes in the order in which they run; the last one is the result."""

    nodes: list[Node] = field(default_factory=list)

    def __repr__(self) -> str:
        layers = {node.layer for node in self.nodes if node.layer is not None}
        return f"<Graph: {len(self.nodes)} nodes, {len(layers)} layers, {len(self.norms)} norms>"

    def add(
        self,
        name: str,
        op: Op,
        inputs: tuple[int, ...],
        shape: Shape,
        *,
        layer: int | None = None,
        weight: str | None = None,
        attributes: Attributes | None = None,
        values: tuple[Value, ...] = (),
        rows: tuple[int, int] | None = None,
        bias: str | None = None,
    ) -> int:
        """Append a node and return its index. With a layer the name becomes ``name-layer``."""
        full_name = name if layer is None else f"{name}-{layer}"
        values = tuple(value._replace(width=_width(shape) // value.rows) for value in values)
        self.nodes.append(Node(full_name, op, inputs, shape, layer, weight, attributes, values, rows, bias))
        return len(self.nodes) - 1

    @property
    def values(self) -> list[Value]:
        """All that can be rounded, in order."""
        return [value for node in self.nodes for value in node.values]

    @property
    def norms(self) -> list[Place]:
        return [node.norm for node in self.nodes if node.norm]

    def products_following(self) -> dict[int, list[tuple[int, Node]]]:
        """By the id of each product's node: those right after it that read the same value, and indices."""
        found: dict[int, list[tuple[int, Node]]] = {}
        for (op, _), run in groupby(enumerate(self.nodes), key=lambda item: (item[1].op, item[1].inputs)):
            nodes = list(run)
            if op is Op.MUL_MAT:
                found.update((id(node), nodes[k + 1 :]) for k, (_, node) in enumerate(nodes))
        return found

    def read_first_by_norms(self) -> dict[Place, Node]:
        """By norm, the node that it reads, where nothing comes between and no norm made it."""
        pairs = [(self.nodes[i - 1], node) for i, node in enumerate(self.nodes) if node.inputs == (i - 1,)]
        return {
            node.norm: source for source, node in pairs if node.norm and source.values and not source.norm
        }

    def live_before(self, i: int) -> list[int]:
        """The nodes before ``i`` whose values it or a later one reads."""
        return sorted({source for node in self.nodes[i:] for source in node.inputs if source < i})

    def last_uses(self) -> list[tuple[int, ...]]:
        """For each node, the earlier nodes whose values nothing after it reads."""
        last = {i: i for i in range(len(self.nodes))}
        for i, node in enumerate(self.nodes):
            for source in node.inputs:
                last[source] = i
        ends: list[list[int]] = [[] for _ in self.nodes]
        for source, i in last.items():
            if source != i:
                ends[i].append(source)
        return [tuple(e) for e in ends]
