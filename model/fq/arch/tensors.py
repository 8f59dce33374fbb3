"""A file's tensors against the graph that is to use them."""

from __future__ import annotations

import numpy as np

from ..gguf.file import GGUFFile
from ..gguf.split import Parts
from .graph import Graph, Node, RopeAttributes
from .hparams import HParams
from .keys import ModelError
from .ops import OPS


def check_tensors(file: GGUFFile | Parts, hp: HParams, graph: Graph) -> None:
    """Every weight of the graph is there with its shape, and no tensor is left over.

    Raises ModelError naming the tensor. A tensor that the graph does not use is refused: the result
    without it would be wrong.
    """
    used = set()
    n_rows: dict[str, int] = {}  # of weights that several nodes share
    for node in graph.nodes:
        if node.weight is not None and node.rows is not None:
            n_rows[node.weight] = max(n_rows.get(node.weight, 0), node.rows[1])
    for node in graph.nodes:
        if node.weight is None:
            continue
        used.add(node.weight)
        want = _shape(node, graph, hp)
        if node.weight in n_rows:
            want = (n_rows[node.weight], *want[1:])
        _check(file, node.weight, want, vector=OPS[node.op].vector)
        if node.bias is not None:
            used.add(node.bias)
            _check(file, node.bias, want[:1], vector=True)
    for rope in {node.attributes for node in graph.nodes if isinstance(node.attributes, RopeAttributes)}:
        for factors in (rope.factors, rope.long_factors):
            if factors is not None:
                used.add(factors)
                _check_factors(file, factors, rope.n_rot // 2)
    for name in file.tensors:
        if name not in used:
            raise ModelError(f"{file.path}: tensor {name} is not one that the {hp.arch} graph uses")


def _shape(node: Node, graph: Graph, hp: HParams) -> tuple[int, ...]:
    """That the node's weight must have."""
    row = OPS[node.op]
    assert row.weight is not None
    source = graph.nodes[node.inputs[0]].shape if node.inputs else ()
    return row.weight(node.shape, source, hp.n_vocab)


def _check(file: GGUFFile | Parts, name: str, want: tuple[int, ...], *, vector: bool) -> None:
    info = file.tensors.get(name)
    if info is None:
        raise ModelError(f"{file.path}: tensor {name} is missing")
    if info.shape != want:
        raise ModelError(f"{file.path}: tensor {name} has shape {info.shape}, not {want}")
    if vector and info.type.name != "F32":
        raise ModelError(f"{file.path}: tensor {name} has type {info.type.name}, not F32")


def _check_factors(file: GGUFFile | Parts, name: str, n: int) -> None:
    """Of RoPE's angles."""
    info = file.tensors.get(name)
    if info is None or info.shape != (n,) or info.type.name != "F32":
        raise ModelError(f"{file.path}: tensor {name} must be F32 of shape {(n,)}")
    factors = np.frombuffer(file.tensor(name), np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelError(f"{file.path}: tensor {name} must hold positive finite numbers")
