"""Backward passes: gradients of activations, layer by layer, from a sequence's logits to its first node.

Of the forward pass what lives between two layers is kept; within a layer all is computed again when its turn
comes, so memory is that of the residuals and of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np

from fq_kernels import Executor, default_fpu, mul_mats
from fq_kernels.rules import FakeQuant

from ..arch.graph import Node, RopeAttributes
from ..arch.ops import OPS
from ..errors import FqError
from ..gguf.types import GGML_TYPES
from .context import Context
from .model import Model
from .rope import RopeTables
from .weights import FLOAT32, PANEL_ELEMENTS, Weight, mul_mat

# Called with a node's index, its value, and the gradients of that, float32 (n_grads, *shape of the value).
Visit = Callable[[int, np.ndarray, np.ndarray], None]
Values = dict[int, np.ndarray]


class Backward:
    """One sequence of up to n_ctx tokens: `forward`, and then `backward` as often as wanted.

    rules  those that the forward pass runs under; a rounding's gradient is taken for 1
    """

    def __init__(self, model: Model, n_ctx: int, executor: Executor, rules: FakeQuant | None = None) -> None:
        self.model, self.executor = model, executor
        self.out_rows = slice(0, 0)
        self._context = Context(model, n_ctx, executor, rules)
        self._rope = RopeTables(n_ctx, model.vectors)
        self._nodes = model.graph.nodes
        by_layer = groupby(range(len(self._nodes)), key=lambda i: self._nodes[i].layer)
        self._layers = [range(nodes[0], nodes[-1] + 1) for nodes in map(list, (run for _, run in by_layer))]
        self._live = [model.graph.live_before(layer.start) for layer in self._layers]
        self._kept: list[Values] = []
        self._ids = np.empty(0, np.int64)

    def forward(self, ids: np.ndarray, first_output: int) -> np.ndarray:
        """Logits of the tokens from first_output on, float32 (n, n_vocab)."""
        self._ids = np.asarray(ids, np.int64)
        self.out_rows = slice(first_output, len(ids))
        self._kept = []
        values: Values = {}
        for layer, live in zip(self._layers, self._live, strict=True):
            # copies: what a later node reuses the memory of is read here again
            self._kept.append({i: values[i].copy() for i in live})
            values = self._compute(layer, values)
        return values[len(self._nodes) - 1]

    def backward(self, grad: np.ndarray, visit: Visit) -> None:
        """From the gradients of the logits, (n_grads, n, n_vocab), to those of all nodes before them.

        ``visit`` gets each node, the last first, whose value the logits depend on. Raises FqError where there
        was no forward pass.
        """
        if not self._kept:
            raise FqError("a backward pass needs a forward pass before it")
        grads = {len(self._nodes) - 1: np.ascontiguousarray(grad, np.float32)}
        for layer, kept in zip(reversed(self._layers), reversed(self._kept), strict=True):
            values = self._compute(layer, kept)
            with default_fpu(), np.errstate(all="ignore"):
                for i in reversed(layer):
                    if (of_value := grads.pop(i, None)) is not None:
                        self._back(i, values, of_value, grads, visit)

    def _back(self, i: int, values: Values, grad: np.ndarray, grads: Values, visit: Visit) -> None:
        node, back = self._nodes[i], OPS[self._nodes[i].op].back
        visit(i, values[i], grad.reshape(len(grad), *values[i].shape))
        if back is None:
            return
        inputs = [values[source] for source in node.inputs]
        for source, more in zip(node.inputs, back(self, node, inputs, values[i], grad), strict=True):
            grads[source] = grads[source] + more if source in grads else more

    def _compute(self, layer: range, before: Values) -> Values:
        """The values of a layer's nodes, each in memory of its own."""
        context, values = self._context, dict(before)
        context.n_past = 0
        for i in layer:
            node = self._nodes[i]
            inputs = [values[source] for source in node.inputs]
            if OPS[node.op].reuses:
                inputs[0] = inputs[0].copy()
            values[i] = context.value_of(i, inputs, self._ids, self.out_rows)
        return values

    # ---------------------------------------------------------------- arch.gradients.Differentiation

    def vector(self, name: str) -> np.ndarray:
        return self.model.vectors[name]

    def angles(self, attributes: RopeAttributes, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        return self._rope.at(attributes, slice(0, n_tokens))

    def times(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), len(rows)), np.float32)
        return mul_mats(x, [(rows.view(np.uint8), FLOAT32)], [out], executor=None)[0]

    def product_back(self, node: Node, grad: np.ndarray) -> np.ndarray:
        assert node.weight is not None
        weight = self.model.weights[node.weight]
        return _transposed(grad, weight if node.rows is None else weight.cut(*node.rows), self.executor)


def _transposed(x: np.ndarray, weight: Weight, executor: Executor) -> np.ndarray:
    """x (n, n_out) @ weight (n_out, n_in): (n, n_in); some of the weight's rows at a time are unpacked."""
    rows = max(16 * PANEL_ELEMENTS // weight.n_in // 256 * 256, 256)
    out = np.zeros((len(x), weight.n_in), np.float32)
    part = np.empty_like(out)
    for begin in range(0, weight.n_out, rows):
        end = min(begin + rows, weight.n_out)
        panel = np.ascontiguousarray(weight.unpack(slice(begin, end)).T)
        transposed = Weight(panel.view(np.uint8), GGML_TYPES[FLOAT32], end - begin)
        out += mul_mat(np.ascontiguousarray(x[:, begin:end]), transposed, executor, part)
    return out
