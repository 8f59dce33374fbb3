"""Each op's vector-Jacobian product, against differences of the op in float64, which is written anew here."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from fq.arch import gradients
from fq.arch.graph import (
    AttentionAttributes,
    Node,
    NormAttributes,
    Op,
    RopeAttributes,
    ScaleAttributes,
    SoftCapAttributes,
)
from fq.arch.ops import OPS
from fq_kernels import Executor
from fq_kernels.rules import Place, Value

STEP, CLOSE = 1e-5, 2e-5
F32 = np.float32


class Run:
    """What a gradient may use; its products are numpy's."""

    def __init__(self, executor, weight=None, angles=None, out_rows=slice(0, 0)):
        self.executor, self.weight, self._angles, self.out_rows = executor, weight, angles, out_rows

    def vector(self, name):
        return self.weight

    def product_back(self, node, grad):
        return (grad.astype(np.float64) @ self.weight).astype(F32)

    def times(self, x, rows):
        return (x.astype(np.float64) @ rows.T.astype(np.float64)).astype(F32)

    def angles(self, attributes, n_tokens):
        return self._angles


@pytest.fixture(scope="module")
def threads():
    with Executor(3) as executor:
        yield executor


def check(run, op, forward, inputs, rng, attributes=None, weight=None, n_grads=2):
    """Of a node with these inputs, along random directions in each of them."""
    inputs = [x.astype(F32) for x in inputs]
    value = forward(*(x.astype(np.float64) for x in inputs))
    values = (Value(Place("ffn_norm", 0)),) if op is Op.RMS_NORM else ()
    shape = tuple(value.shape)
    node = Node(op.name, op, tuple(range(len(inputs))), shape, 0, weight, attributes, values)
    grad = rng.standard_normal((n_grads, *shape)).astype(F32)
    back = OPS[op].back(run, node, inputs, value.astype(F32), grad)
    assert len(back) == len(inputs)
    for k, (x, of_x) in enumerate(zip(inputs, back, strict=True)):
        assert of_x.shape == (n_grads, *x.shape) and of_x.dtype == F32
        way = rng.standard_normal(x.shape)

        def moved(by, k=k, way=way):
            wide = [one.astype(np.float64) for one in inputs]
            return forward(*(one + by * way if i == k else one for i, one in enumerate(wide)))

        change = (moved(STEP) - moved(-STEP)) / (2 * STEP)
        for s in range(n_grads):
            wanted, got = np.sum(change * grad[s]), np.sum(of_x[s].astype(np.float64) * way)
            scale = np.linalg.norm(of_x[s].astype(np.float64)) * math.sqrt(x.size) + np.linalg.norm(change)
            assert abs(got - wanted) <= CLOSE * (1 + scale), (op, k)


sizes = st.integers(1, 9)


@given(seeds, sizes, st.integers(1, 40), st.floats(-8, 4))
def test_rms_norm(threads, seed, rows, n, size):
    rng = np.random.default_rng(seed)
    weight, eps = rng.standard_normal(n).astype(F32), 1e-3
    x = rng.standard_normal((rows, n)) * 10.0 ** (size / 8)

    def forward(x):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight

    check(Run(threads, weight), Op.RMS_NORM, forward, [x], rng, NormAttributes(eps), "w")


@given(seeds, sizes, sizes, sizes)
def test_rms_norm_of_heads(threads, seed, rows, heads, n):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(n).astype(F32)

    def forward(x):
        of = x.reshape(rows, heads, n)
        return of / np.sqrt((of * of).mean(axis=-1, keepdims=True) + 1e-2) * weight

    x = rng.standard_normal((rows, heads * n))
    check(Run(threads, weight), Op.RMS_NORM, forward, [x], rng, NormAttributes(1e-2), "w")


@given(seeds, sizes, sizes, sizes)
def test_mul_mat(threads, seed, rows, n_in, n_out):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n_out, n_in)).astype(F32)
    x = rng.standard_normal((rows, n_in))
    check(Run(threads, weight), Op.MUL_MAT, lambda x: x @ weight.T.astype(np.float64), [x], rng, weight="w")


@given(seeds, sizes, sizes)
def test_add_scale_soft_cap_and_heads(threads, seed, rows, n):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, rows, n))
    run = Run(threads)
    check(run, Op.ADD, lambda x, y: x + y, [x, y], rng)
    check(run, Op.SCALE, lambda x: -2.5 * x, [x], rng, ScaleAttributes(-2.5))
    check(run, Op.SOFT_CAP, lambda x: 3 * np.tanh(x / 3), [4 * x], rng, SoftCapAttributes(3.0))
    check(run, Op.HEADS, lambda x: x.reshape(rows, n, 2), [np.repeat(x, 2, axis=1)], rng)


@given(seeds, sizes, sizes, st.data())
def test_out_rows(threads, seed, rows, n, data):
    rng = np.random.default_rng(seed)
    wanted = slice(data.draw(st.integers(0, rows - 1)), rows)
    run = Run(threads, out_rows=wanted)
    check(run, Op.OUT_ROWS, lambda x: x[wanted], [rng.standard_normal((rows, n))], rng)


@given(seeds, sizes, st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_rope(threads, seed, rows, heads, pairs, rest, neox):
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-3, 3, (rows, pairs))
    # a magnitude may be in them
    cos, sin = 1.3 * np.cos(angles), 1.3 * np.sin(angles)
    cos, sin = cos.astype(F32), sin.astype(F32)
    n_rot, d = 2 * pairs, 2 * pairs + rest

    def forward(x):
        of = x.reshape(rows, heads, d)
        out = of.copy()
        for i in range(pairs):
            a, b = (i, pairs + i) if neox else (2 * i, 2 * i + 1)
            c, s = cos[:, i, None].astype(np.float64), sin[:, i, None].astype(np.float64)
            out[..., a], out[..., b] = of[..., a] * c - of[..., b] * s, of[..., a] * s + of[..., b] * c
        return out

    x = rng.standard_normal((rows, heads * d))
    attributes = RopeAttributes(n_rot, 1e4, neox=neox)
    check(Run(threads, angles=(cos, sin)), Op.ROPE, forward, [x], rng, attributes)


@given(seeds, st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5),
       st.sampled_from([0.0, 2.0]), st.integers(1, 8))  # fmt: skip
def test_attention(threads, seed, n, n_kv, shared, d, window, cap, at_once):
    rng = np.random.default_rng(seed)
    attributes = AttentionAttributes(n_kv * shared, n_kv, 0.7, window, cap)

    def forward(q, k, v):
        out = np.empty((n, n_kv * shared, d))
        for h in range(n_kv * shared):
            scores = 0.7 * q[:, h] @ k[:, h // shared].T
            scores = cap * np.tanh(scores / cap) if cap else scores
            for t in range(n):
                first = max(0, t + 1 - window) if window else 0
                p = np.exp(scores[t, first : t + 1] - scores[t, first : t + 1].max())
                out[t, h] = (p / p.sum()) @ v[first : t + 1, h // shared]
        return out.reshape(n, -1)

    q = rng.standard_normal((n, n_kv * shared, d))
    k, v = rng.standard_normal((2, n, n_kv, d))
    with patch.object(gradients, "QUERIES", at_once):
        check(Run(threads), Op.ATTENTION, forward, [q, k, v], rng, attributes)


@given(seeds, sizes, sizes, st.floats(0.1, 6))
def test_gates(threads, seed, rows, n, size):
    rng = np.random.default_rng(seed)
    gate, up = size * rng.standard_normal((2, rows, n))
    check(Run(threads), Op.SWIGLU, lambda g, u: g / (1 + np.exp(-g)) * u, [gate, up], rng)

    def geglu(g, u):
        return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u

    check(Run(threads), Op.GEGLU, geglu, [gate, up], rng)


def test_pieces_of_many_rows(threads, monkeypatch):
    """More than are computed with at a time."""
    monkeypatch.setattr("fq.arch.gradients.PIECE", 13 * 400)
    rng = np.random.default_rng(2)
    gate, up = rng.standard_normal((2, 30, 400))
    check(Run(threads), Op.SWIGLU, lambda g, u: g / (1 + np.exp(-g)) * u, [gate, up], rng)
    weight = rng.standard_normal(400).astype(F32)

    def norm(x):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-3) * weight

    check(Run(threads, weight), Op.RMS_NORM, norm, [gate], rng, NormAttributes(1e-3), "w")


def test_what_overflows_says_nothing(threads):
    """In whatever thread: warnings are errors here."""
    huge = np.full((40, 1 << 13), 3e38, F32)
    weight, attributes = np.ones(1 << 13, F32), NormAttributes(1e-3)
    node = Node("norm", Op.RMS_NORM, (0,), huge.shape, 0, "w", attributes, ())
    with np.errstate(all="ignore"):  # as Backward has it
        OPS[Op.RMS_NORM].back(Run(threads, weight), node, [huge], huge, huge[None])


def test_every_op_with_inputs_hands_something_back():
    assert {op for op, row in OPS.items() if row.back is None} == {Op.GET_ROWS}
