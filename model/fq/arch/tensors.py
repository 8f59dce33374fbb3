"""A file's tensors against the graph that is to use them."""

from __future__ import annotations

import numpy as np

from ..gguf.file import GGUFFile
from .graph import Graph, RopeAttributes
from .hparams import HParams, ModelError
from .ops import OPS


def check_tensors(file: GGUFFile, hp: HParams, graph: Graph) -> None:
    """Every weight of the graph is there with its shape, and no tensor is left over.

    Raises ModelError naming the tensor. A tensor that the graph does not use (a bias, say)
    is refused: the result without it would be wrong.
    """
    used = set()
    for node in graph.nodes:
        if node.weight is None:
            continue
        used.add(node.weight)
        info = file.tensors.get(node.weight)
        if info is None:
            raise ModelError(f"{file.path}: tensor {node.weight} is missing")
        row = OPS[node.op]
        assert row.weight is not None
        source = graph.nodes[node.inputs[0]].shape if node.inputs else ()
        want = row.weight(node.shape, source, hp.n_vocab)
        if info.shape != want:
            raise ModelError(f"{file.path}: tensor {node.weight} has shape {info.shape}, not {want}")
        if row.vector and info.type.name != "F32":
            raise ModelError(f"{file.path}: tensor {node.weight} has type {info.type.name}, not F32")
    for rope in {node.attributes for node in graph.nodes if isinstance(node.attributes, RopeAttributes)}:
        if rope.factors is not None:
            used.add(rope.factors)
            _check_factors(file, rope.factors, rope.n_rot // 2)
    for name in file.tensors:
        if name not in used:
            raise ModelError(f"{file.path}: tensor {name} is not one that the llama graph uses")


def _check_factors(file: GGUFFile, name: str, n: int) -> None:
    """Of RoPE's angles."""
    info = file.tensors[name]
    if info.shape != (n,) or info.type.name != "F32":
        raise ModelError(f"{file.path}: tensor {name} must be F32 of shape {(n,)}")
    factors = np.frombuffer(file.tensor(name), np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelError(f"{file.path}: tensor {name} must hold positive finite numbers")
