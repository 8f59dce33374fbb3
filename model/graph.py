"""The graph: named operations in order, built before any data exists."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fq_kernels.rules import POINTS, Norm, Site

# symbolic lengths in shapes
N_TOKENS = "n_tokens"
N_OUTPUTS = "n_outputs"
Shape = tuple[int | str, ...]


class Op(str, Enum):
    """What a node computes; names are ggml's where it has them."""

    GET_ROWS = "GET_ROWS"  # rows of a weight by token id
    RMS_NORM = "RMS_NORM_MUL"  # norm and its weight, the site of fake quantisation
    MUL_MAT = "MUL_MAT"
    ADD = "ADD"
    ROPE = "ROPE"
    ATTENTION = "ATTENTION"  # K and V into the cache, softmax(Q K^T) V
    SWIGLU = "SWIGLU"  # silu(gate) * up
    OUT_ROWS = "OUT_ROWS"  # only the rows whose logits are wanted


@dataclass(frozen=True)
class Node:
    """One operation. ``inputs`` are indices of earlier nodes; ``weight`` is a tensor's name."""

    name: str
    op: Op
    inputs: tuple[int, ...]
    shape: Shape
    layer: int | None = None
    weight: str | None = None
    norm: Norm | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(self.norm, point) for point in POINTS) if self.norm else ()


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
        norm: Norm | None = None,
    ) -> int:
        """Append a node and return its index. With a layer the name becomes ``name-layer``."""
        full_name = name if layer is None else f"{name}-{layer}"
        self.nodes.append(Node(full_name, op, inputs, shape, layer, weight, norm))
        return len(self.nodes) - 1

    @property
    def norms(self) -> list[Norm]:
        return [node.norm for node in self.nodes if node.norm]

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
