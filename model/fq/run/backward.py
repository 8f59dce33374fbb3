"""Backward passes: gradients of activations, layer by layer, from a sequence's logits to its first node.

Of the forward pass what lives between two layers is kept; within a layer all is computed again when its turn
comes, so memory is that of the residuals and of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from fq_kernels import Executor, default_fpu, log_softmax, mul_mats

from ..arch.graph import Node, Op, RopeAttributes
from ..arch.ops import OPS
from ..errors import FqError
from ..gguf.types import GGML_TYPES
from .context import Context, token_ids
from .model import Model
from .rope import RopeTables
from .weights import FLOAT32, Weight, mul_mat

Values = dict[int, np.ndarray]


class Visited(NamedTuple):
    """A node on the way back.

    number     in the graph
    inputs     their values
    value      its own
    grad       of the value, float32 (n_grads, *shape of the value)
    of_inputs  gradients of the inputs that come through this node alone, (n_grads, *shape of the input);
               empty where it hands none back
    """

    number: int
    inputs: Sequence[np.ndarray]
    value: np.ndarray
    grad: np.ndarray
    of_inputs: Sequence[np.ndarray]


Visit = Callable[[Visited], None]

SOFTMAX_ROWS = 16
TURNED_ROWS = 64
# Of a weight, unpacked and turned at a time; their sums are added in order, so that bits depend on it.
TURNED_ELEMENTS = 6 << 20


class Backward:
    """A sequence of up to n_ctx tokens: `forward`, and then `backward` or `backward_of`."""

    def __init__(self, model: Model, n_ctx: int, executor: Executor) -> None:
        self.model, self.executor = model, executor
        self.out_rows = slice(0, 0)
        self._context = Context(model, n_ctx, executor)
        self._rope = RopeTables(n_ctx, model.vectors)
        self._nodes = model.graph.nodes
        by_layer = groupby(range(len(self._nodes)), key=lambda i: self._nodes[i].layer)
        self._layers = [range(nodes[0], nodes[-1] + 1) for nodes in map(list, (run for _, run in by_layer))]
        self._live = [model.graph.live_before(layer.start) for layer in self._layers]
        self._kept: list[Values] = []
        self._last: Values = {}
        self._ids = np.empty(0, np.int64)

    def forward(self, ids: np.ndarray, first_output: int) -> np.ndarray:
        """Logits of the tokens from first_output on, float32 (n, n_vocab), read again on the way back.

        Raises FqError as Context.eval does, and for a first_output that is none of the tokens.
        """
        ids = token_ids(ids, 0, self._context.n_ctx, self.model.hparams.n_vocab).astype(np.int64)
        if not 0 <= first_output < len(ids):
            raise FqError(f"there is no token {first_output} among {len(ids)}")
        self._ids = ids
        self.out_rows = slice(first_output, len(ids))
        self._kept = []
        self._last = {}
        values: Values = {}
        for layer, live in zip(self._layers, self._live, strict=True):
            before = {i: values[i] for i in live}
            # copies: what a later node reuses the memory of is read here again
            self._kept.append({i: one.copy() for i, one in before.items()})
            values = self._compute(layer, before)
        self._last = values
        logits = values[len(self._nodes) - 1]
        logits.flags.writeable = False
        return logits

    def backward(self, grad: np.ndarray, visit: Visit) -> None:
        """From the gradients of the logits, (n_grads, n, n_vocab), to those of all nodes before them.

        ``visit`` gets each node, the last first, whose value the logits depend on. Raises FqError where there
        was no forward pass, or the gradients are of another shape.
        """
        values, grad = self._last_layer(), np.asarray(grad)
        shape = values[len(self._nodes) - 1].shape
        if grad.ndim != 3 or not len(grad) or grad.shape[1:] != shape:
            raise FqError(f"gradients must be of shape (n_grads, {shape[0]}, {shape[1]}), not {grad.shape}")
        self._down({len(self._nodes) - 1: np.ascontiguousarray(grad, np.float32)}, values, visit)

    def backward_of(self, labels: np.ndarray, visit: Visit) -> None:
        """The same of ln p(label), summed over the tokens: labels, int (n_grads, n), have one for each.

        All share the product of the probabilities with the logits' weight. ``visit`` gets none of the nodes
        from there on. Raises FqError where there was no forward pass, or the labels are none of its tokens'.
        """
        values, labels = self._last_layer(), np.asarray(labels)
        n, n_vocab = values[len(self._nodes) - 1].shape
        if labels.ndim != 2 or not len(labels) or labels.shape[1] != n or labels.dtype.kind not in "iu":
            raise FqError(
                f"labels must be integers of shape (n_grads, {n}), not {labels.dtype} {labels.shape}"
            )
        if labels.min() < 0 or labels.max() >= n_vocab:
            raise FqError(f"labels must be between 0 and {n_vocab - 1}")
        with default_fpu(), np.errstate(all="ignore"):
            start, grad = self._of_labels(values, labels)
        self._down({start: grad}, values, visit)

    def _last_layer(self) -> Values:
        if not self._last:
            raise FqError("a backward pass needs a forward pass before it")
        return self._last

    def _of_labels(self, values: Values, labels: np.ndarray) -> tuple[int, np.ndarray]:
        """The node that the logits' product reads, and its gradients: with W its rows and d what the logits
        change by where the product does, of each token d[y] W[y] - (p d) W."""
        product = max(i for i, node in enumerate(self._nodes) if node.op is Op.MUL_MAT)
        logits = values[len(self._nodes) - 1]
        slope = np.ones((1, *logits.shape), np.float32)
        for i in range(len(self._nodes) - 1, product, -1):
            node, back = self._nodes[i], OPS[self._nodes[i].op].back
            assert back is not None
            (slope,) = back(self, node, [values[source] for source in node.inputs], values[i], slope)
        node = self._nodes[product]
        shared = self.product_back(node, _probabilities(logits, self.executor) * slope[0])
        weight, tokens = self.model.weight_of(node), np.arange(len(logits))
        grad = np.stack([weight.unpack(y) * slope[0, tokens, y][:, None] - shared for y in labels])
        return node.inputs[0], grad

    def _down(self, grads: Values, values: Values, visit: Visit) -> None:
        """From the gradients of nodes of the last layer, whose values are given."""
        for k in reversed(range(len(self._layers))):
            if k < len(self._layers) - 1:
                values = self._compute(self._layers[k], self._kept[k])
            with default_fpu(), np.errstate(all="ignore"):
                for i in reversed(self._layers[k]):
                    if (of_value := grads.pop(i, None)) is not None:
                        self._back(i, values, of_value, grads, visit)

    def _back(self, i: int, values: Values, grad: np.ndarray, grads: Values, visit: Visit) -> None:
        node, back = self._nodes[i], OPS[self._nodes[i].op].back
        inputs = [values[source] for source in node.inputs]
        of_inputs = () if back is None else back(self, node, inputs, values[i], grad)
        visit(Visited(i, inputs, values[i], grad.reshape(len(grad), *values[i].shape), of_inputs))
        for source, more in zip(node.inputs, of_inputs, strict=back is not None):
            grads[source] = self._sum(grads[source], more) if source in grads else more

    def _sum(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of two nodes' gradients of one value, one of n_grads a thread at a time."""
        out = np.empty_like(a)

        def one(k: int) -> None:
            with np.errstate(all="ignore"):  # each thread has its own
                np.add(a[k], b[k], out=out[k])

        self.executor.map(one, len(out))
        return out

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
        return _transposed(grad, self.model.weight_of(node), self.executor)


def _probabilities(logits: np.ndarray, executor: Executor) -> np.ndarray:
    """float32, of logits (n, n_vocab); in float64 some rows at a time."""
    p = np.empty_like(logits)
    for begin in range(0, len(logits), SOFTMAX_ROWS):
        some = np.ascontiguousarray(logits[begin : begin + SOFTMAX_ROWS])
        log_p, exact = np.empty((2, *some.shape))
        log_softmax(some, log_p=log_p, p=exact, executor=executor)
        p[begin : begin + SOFTMAX_ROWS] = exact
    return p


def _transposed(x: np.ndarray, weight: Weight, executor: Executor) -> np.ndarray:
    """x (n, n_out) @ weight (n_out, n_in): (n, n_in); some of the weight's rows at a time are unpacked."""
    rows = max(TURNED_ELEMENTS // weight.n_in // 256 * 256, 256)
    out: np.ndarray | None = None
    for begin in range(0, weight.n_out, rows):
        end = min(begin + rows, weight.n_out)
        panel = Weight(
            _turned(weight.cut(begin, end), executor).view(np.uint8), GGML_TYPES[FLOAT32], end - begin
        )
        part = np.empty((len(x), weight.n_in), np.float32)
        mul_mat(np.ascontiguousarray(x[:, begin:end]), panel, executor, part)
        out = part if out is None else np.add(out, part, out=out)
    assert out is not None
    return out


def _turned(weight: Weight, executor: Executor) -> np.ndarray:
    """Its transpose, float32 (n_in, n_out)."""
    turned = np.empty((weight.n_in, weight.n_out), np.float32)

    def some(i: int) -> None:
        rows = slice(i * TURNED_ROWS, min((i + 1) * TURNED_ROWS, weight.n_out))
        turned[:, rows] = weight.unpack(rows).T

    executor.map(some, -(-weight.n_out // TURNED_ROWS))
    return turned
