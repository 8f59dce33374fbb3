"""What each op hands back: the gradients of its inputs from that of its value (vector-Jacobian products).

Several objectives go backward at once, which share what the forward pass left: a gradient is float32
(n_grads, *shape of the value). Weights have none. The order of sums depends on neither the processor nor the
threads: of products it is the kernels', of means numpy's for a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fq_kernels import Executor, causal_exp, exp
from fq_kernels import rope as rotate

from .graph import (
    AttentionAttributes,
    Node,
    NormAttributes,
    RopeAttributes,
    ScaleAttributes,
    SoftCapAttributes,
)

Values = Sequence[np.ndarray]
Activation = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
F32 = np.float32
PIECE = 1 << 17  # elements that are computed with at a time
QUERIES = 256  # of attention, at a time


class Differentiation(Protocol):
    """What an op may use of the pass that it is differentiated in.

    out_rows  the tokens among all whose logits are wanted
    """

    out_rows: slice
    executor: Executor

    def vector(self, name: str) -> np.ndarray:
        """A one-dimensional tensor, float32."""

    def product_back(self, node: Node, grad: np.ndarray) -> np.ndarray:
        """grad (rows, n_out) times the node's rows of its weight: (rows, n_in)."""

    def times(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """x (n, k) times rows (m, k), both float32: (n, m)."""

    def angles(self, attributes: RopeAttributes, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of the first positions, float32 (n_tokens, n_rot / 2) each."""


def rms_norm(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    """With s the inverse root and u = grad * weight: s * u - x * s^3 * mean(u * x)."""
    assert node.weight is not None and isinstance(node.attributes, NormAttributes)
    weight, eps = run.vector(node.weight), float(node.attributes.eps)
    n = len(weight)
    x, grad = inputs[0].reshape(-1, n), grad.reshape(len(grad), -1, n)
    back = np.empty_like(grad)

    def some(rows: slice) -> None:
        u = grad[:, rows] * weight
        s = 1 / np.sqrt(_mean(x[rows], x[rows]) + eps)
        along = _mean(u, x[rows]) * (s * s * s)
        back[:, rows] = u * s[..., None].astype(F32) - x[rows] * along[..., None].astype(F32)

    _by_rows(run, some, x)
    return (back.reshape(len(grad), *inputs[0].shape),)


def _by_rows(run: Differentiation, some: Callable[[slice], None], x: np.ndarray) -> None:
    """All rows of x, some at a time, which stay in the cache; each row has nothing to do with the others."""
    step = max(PIECE // max(x.shape[-1], 1), 1)
    _map(run, lambda k: some(slice(k * step, (k + 1) * step)), -(-len(x) // step))


def _map(run: Differentiation, task: Callable[[int], None], n: int) -> None:
    def quiet(i: int) -> None:
        with np.errstate(all="ignore"):  # each thread has its own
            task(i)

    run.executor.map(quiet, n)


def _mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last axis: products in float32, as ggml's norm has them, their sum in float64."""
    total = np.asarray(np.sum(a * b, axis=-1, dtype=np.float64))
    total /= a.shape[-1]
    return total


def mul_mat(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    rows = run.product_back(node, np.ascontiguousarray(grad).reshape(-1, value[0].size))
    return (rows.reshape(len(grad), *inputs[0].shape),)


def add(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    return grad, grad


def heads(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    return (grad.reshape(len(grad), *inputs[0].shape),)


def rope(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    """Turned back."""
    assert isinstance(node.attributes, RopeAttributes)
    cos, sin = run.angles(node.attributes, len(value))
    back = grad.reshape(len(grad), *value.shape).copy()
    for one in back:
        rotate(one, cos, -sin, neox=node.attributes.neox, executor=run.executor)
    return (back.reshape(len(grad), *inputs[0].shape),)


def attention(
    run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray
) -> Values:
    """Of a sequence from its first token on. With P the weights of the values, O = P V and D = grad V^T the
    scores' gradient is P * (D - rowsum(grad * O)), of capped scores times 1 - (score / cap)^2. Some queries
    at a time, with the keys that they see."""
    a = node.attributes
    assert isinstance(a, AttentionAttributes)
    n, d, n_grads = len(value), inputs[0].shape[-1], len(grad)
    q, k, v = (x.reshape(n, -1, d) for x in inputs)
    grad = grad.reshape(n_grads, n, a.n_head, d)
    backs = tuple(np.empty((n_grads, *x.shape), F32) for x in (q, k, v))
    shared = a.n_head // a.n_head_kv
    # of the keys and the values, which heads share
    of_heads = [np.empty((a.n_head, n_grads, n, d), F32) for _ in range(2)]

    def of_head(h: int) -> None:
        of_k, of_v = (of[h] for of in of_heads)
        of_k.fill(0)
        of_v.fill(0)
        for first in range(0, n, QUERIES):
            rows = slice(first, min(first + QUERIES, n))
            keys = slice(max(first - a.window + 1, 0) if a.window else 0, rows.stop)
            mine = np.ascontiguousarray(q[rows, h])
            k_seen, v_seen = (np.ascontiguousarray(x[keys, h // shared]) for x in (k, v))
            g = np.ascontiguousarray(grad[:, rows, h])
            p, slope = _weights(run.times(mine, k_seen), first - keys.start + 1, a)
            out = run.times(p, _turned(v_seen))
            of_scores = run.times(g.reshape(-1, d), v_seen).reshape(n_grads, *p.shape)
            of_scores -= (_mean(g, out) * d)[..., None].astype(F32)
            of_scores *= p * slope
            of_q = run.times(of_scores.reshape(-1, p.shape[1]), _turned(k_seen))
            backs[0][:, rows, h] = of_q.reshape(g.shape)
            turned = np.ascontiguousarray(of_scores.transpose(0, 2, 1)).reshape(-1, len(mine))
            of_k[:, keys] += run.times(turned, _turned(mine)).reshape(n_grads, -1, d)
            g_turned = np.ascontiguousarray(g.transpose(0, 2, 1)).reshape(-1, len(mine))
            of_values = run.times(_turned(p), g_turned)
            of_v[:, keys] += of_values.reshape(-1, n_grads, d).transpose(1, 0, 2)

    def of_shared(i: int) -> None:
        """In one order, whichever thread was first with a head."""
        for back, heads in zip(backs[1:], of_heads, strict=True):
            total = heads[i * shared]
            for h in range(i * shared + 1, (i + 1) * shared):
                total += heads[h]
            back[:, :, i] = total

    _map(run, of_head, a.n_head)
    _map(run, of_shared, a.n_head_kv)
    return tuple(back.reshape(n_grads, *x.shape) for back, x in zip(backs, inputs, strict=True))


def _turned(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T)


def _weights(scores: np.ndarray, n_first: int, a: AttentionAttributes) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of scaled scores, of which the first row sees n_first, and what they change by where the
    unscaled ones do."""
    slope = np.float64(a.scale)
    if a.soft_cap:
        t = _tanh(scores.astype(np.float64) * (a.scale / a.soft_cap))
        scores, slope = (a.soft_cap * t).astype(F32), a.scale * (1 - t * t)
    else:
        scores *= F32(a.scale)
    scores /= causal_exp(scores[None], n_first, a.window)[0, :, None]
    return scores, np.asarray(slope, F32)


def _tanh(x: np.ndarray) -> np.ndarray:
    y: np.ndarray = 1 - 2 / (exp(2 * np.clip(x, -300, 300)) + 1)
    return y


def swiglu(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    return _gated(run, inputs, grad, _silu)


def _silu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = 1 / (1 + exp(-np.clip(x, -700, 700)))
    return x * share, share * (1 + x * (1 - share))


def _gated(run: Differentiation, inputs: Values, grad: np.ndarray, function: Activation) -> Values:
    """Of function(gate) * up; the function gives its values and slopes, in float64."""
    gate, up = inputs
    backs = np.empty_like(grad), np.empty_like(grad)

    def some(rows: slice) -> None:
        act, slope = function(gate[rows].astype(np.float64))
        np.multiply(grad[:, rows], (slope * up[rows]).astype(F32), out=backs[0][:, rows])
        np.multiply(grad[:, rows], act.astype(F32), out=backs[1][:, rows])

    _by_rows(run, some, gate)
    return backs


def geglu(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    return _gated(run, inputs, grad, _gelu)


def _gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c = math.sqrt(2 / math.pi)
    t = _tanh(c * (x + 0.044715 * x * x * x))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), slope


def scale(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    assert isinstance(node.attributes, ScaleAttributes)
    return (grad * F32(node.attributes.factor),)


def soft_cap(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    assert isinstance(node.attributes, SoftCapAttributes)
    t = value / F32(node.attributes.cap)
    return (grad * (1 - t * t),)


def out_rows(run: Differentiation, node: Node, inputs: Values, value: np.ndarray, grad: np.ndarray) -> Values:
    back = np.zeros((len(grad), *inputs[0].shape), F32)
    back[:, run.out_rows] = grad
    return (back,)
