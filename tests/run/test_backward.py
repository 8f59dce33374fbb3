"""Backward passes, against differences of an independent float64 forward pass."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from reference_models import ReferenceModel
from tiny_models import TINY, write_tiny

from fq import Executor, FqError, Model
from fq.run.backward import Backward
from fq.run.context import Context

N, FIRST = 21, 9
STEP = 1e-6
DIGEST = "33e21b0d91b44014"  # of a tiny model's gradients, on any machine


class Moving:
    """The reference's logits, with the value at a place moved; a norm's is what its weight has multiplied."""

    def __init__(self, path, ids):
        self.reference, self.ids = ReferenceModel(path, 64), ids
        self.shapes = {}
        self.logits(
            lambda kind, layer, values: self.shapes.setdefault((kind, layer), values.shape) and values
        )

    def logits(self, at):
        def norm(kind, layer, point, values):
            return at(kind, layer, values) if point == "weighted" else values

        return self.reference.logits(self.ids, norm, at)[FIRST:]

    def change(self, place, way):
        """Along a direction, a unit of it."""

        def moved(by):
            return self.logits(lambda k, il, values: values + by * way if (k, il) == place else values)

        return (moved(STEP) - moved(-STEP)) / (2 * STEP)


def gradients_of(model, ids, grad, executor):
    """By place of what rules can round, and the pass."""
    found = {}

    def visit(seen):
        assert seen.grad.shape == (len(grad), *seen.value.shape)
        for one in model.graph.nodes[seen.number].values:
            found[one.place.kind, one.place.layer] = seen.grad

    run = Backward(model, 64, executor)
    logits = run.forward(ids, FIRST)
    run.backward(grad, visit)
    return logits, found, run


@pytest.mark.parametrize("name", TINY)
def test_gradients_of_every_site(name, tmp_path, executor):
    """Of two random sums of logits, along a random direction at each site."""
    path = write_tiny(tmp_path / "m.gguf", TINY[name])
    model = Model(path)
    rng = np.random.default_rng(3)
    ids = rng.integers(0, model.hparams.n_vocab, N)
    grad = rng.standard_normal((2, N - FIRST, model.hparams.n_vocab)).astype(np.float32)
    moving = Moving(path, ids)
    logits, found, _ = gradients_of(model, ids, grad, executor)
    assert logits == pytest.approx(moving.logits(lambda kind, layer, values: values), rel=1e-3, abs=1e-3)
    assert set(found) == {(value.place.kind, value.place.layer) for value in model.values}
    checked = [place for place in moving.shapes if place in found]
    if model.hparams.n_layer > 10:
        checked = checked[::7]
    for place in checked:
        way = rng.standard_normal(moving.shapes[place])
        rows = slice(N - found[place].shape[1], N)  # of the last layer those whose logits are wanted
        way[: rows.start] = 0
        change = moving.change(place, way)
        for s in range(2):
            got = found[place][s].astype(np.float64).reshape(way[rows].shape)
            scale = float(np.linalg.norm(got))
            wanted = float(np.sum(change * grad[s]))
            assert scale > 0 and abs(np.sum(got * way[rows]) - wanted) <= 1e-4 * scale, (place, s)


def test_the_same_bits_with_any_threads_and_instruction_set(isa, tiny):
    ids = np.arange(3, 3 + N)
    grad = np.random.default_rng(1).standard_normal((3, N - FIRST, 512)).astype(np.float32)
    found = {}
    for threads in (1, 3):
        with Executor(threads) as executor:
            _, grads, _ = gradients_of(tiny, ids, grad, executor)
        found[threads] = {place: one.tobytes() for place, one in grads.items()}
    assert found[1] == found[3]
    digest = hashlib.sha256(b"".join(found[1][place] for place in sorted(found[1], key=str)))
    assert digest.hexdigest()[:16] == DIGEST


def test_several_at_once_are_each_alone(tiny, executor):
    ids = np.arange(3, 3 + N)
    grad = np.random.default_rng(1).standard_normal((3, N - FIRST, 512)).astype(np.float32)
    _, together, run = gradients_of(tiny, ids, grad, executor)
    alone = {}
    run.backward(
        grad[2:],
        lambda seen: alone.update(
            {(v.place.kind, v.place.layer): seen.grad for v in tiny.graph.nodes[seen.number].values}
        ),
    )
    assert all(alone[place].tobytes() == together[place][2:].tobytes() for place in together)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_labels_are_the_gradients_of_their_ln_p(name, tmp_path, executor):
    """Of logits that are capped, and that are scaled, too."""
    model = Model(write_tiny(tmp_path / "m.gguf", TINY[name]))
    ids = np.arange(3, 3 + N)
    run, found = Backward(model, 64, executor), {}
    logits = run.forward(ids, FIRST).astype(np.float64)
    labels = np.random.default_rng(2).integers(0, model.hparams.n_vocab, (3, len(logits)))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    grad = np.repeat(-p[None], 3, axis=0)
    for s in range(3):
        grad[s, np.arange(len(logits)), labels[s]] += 1
    run.backward(grad, lambda at: found.__setitem__(at.number, at.grad))
    seen = []

    def visit(at):
        i = at.number
        seen.append(i)
        assert np.abs(at.grad - found[i]).max() <= 1e-5 * np.abs(found[i]).max(), model.graph.nodes[i].name

    run.backward_of(labels, visit)
    assert len(seen) >= len(found) - 3 and min(seen) == min(found)


def test_a_backward_pass_needs_a_forward_pass(tiny, executor):
    with pytest.raises(FqError, match="needs a forward pass before it"):
        Backward(tiny, 16, executor).backward(np.ones((1, 1, 512)), lambda *of: None)


def test_a_weight_taken_in_parts_has_the_same_bits(tiny, executor, monkeypatch):
    """Of 256 rows each, a block of the products' contract."""
    ids = np.arange(3, 3 + N)
    grad = np.random.default_rng(1).standard_normal((1, N - FIRST, 512)).astype(np.float32)
    _, whole, _ = gradients_of(tiny, ids, grad, executor)
    monkeypatch.setattr("fq.run.backward.TURNED_ELEMENTS", 1)
    _, parts, _ = gradients_of(tiny, ids, grad, executor)
    assert all(parts[place].tobytes() == whole[place].tobytes() for place in whole)


def test_memory_is_of_the_residuals_and_one_layer(tmp_path, executor):
    ids = np.arange(3, 63)
    peaks = {}
    for layers in (3, 15):
        tiny = replace(TINY["llama-linear"], n_layer=layers)
        run = Backward(Model(write_tiny(tmp_path / f"{layers}.gguf", tiny)), 64, executor)
        tracemalloc.start()
        run.forward(ids, 50)
        run.backward_of(np.full((1, 10), 7), lambda at: None)
        peaks[layers] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    residual = 4 * len(ids) * tiny.n_embd
    assert peaks[15] - peaks[3] < 12 * 2 * residual


def test_what_is_computed_again_is_what_was(tiny, executor):
    ids = np.arange(3, 3 + N)
    run, seen = Backward(tiny, 64, executor), {}
    logits = run.forward(ids, FIRST)
    assert logits.tobytes() == Context(tiny, 64, executor).eval(ids, slice(FIRST, N)).tobytes()
    run.backward(np.ones((1, *logits.shape)), lambda at: seen.setdefault(at.number, at.value))
    assert seen[len(tiny.graph.nodes) - 1].tobytes() == logits.tobytes()
    nodes = tiny.graph.nodes
    first = {i: nodes[i] for i in seen if not nodes[i].inputs or nodes[i].layer == 0}
    context, values = Context(tiny, 64, executor), {}
    for i, node in enumerate(nodes):
        inputs = [values[source].copy() for source in node.inputs]
        values[i] = context.value_of(i, inputs, ids, slice(FIRST, N))
    assert first and all(seen[i].tobytes() == values[i].tobytes() for i in first)


@pytest.mark.parametrize(
    ("ids", "first", "words"),
    [
        ([], 0, "no tokens"),
        ([1.5, 2.0], 0, "must be integers, not float64"),
        ([-1, 2], 0, "between 0 and 511"),
        ([512], 0, "between 0 and 511"),
        ([1] * 17, 0, "17 tokens do not fit a context of 16"),
        ([1, 2], 2, "no token 2 among 2"),
        ([1, 2], -1, "no token -1 among 2"),
    ],
)
def test_sequences_that_cannot_be(tiny, executor, ids, first, words):
    with pytest.raises(FqError, match=words):
        Backward(tiny, 16, executor).forward(np.array(ids), first)


def test_gradients_and_labels_that_cannot_be(tiny, executor):
    run = Backward(tiny, 16, executor)
    run.forward(np.arange(5), 2)
    for shape in ((3, 512), (1, 512, 3), (0, 3, 512), (1, 2, 512)):
        with pytest.raises(FqError, match=r"must be of shape \(n_grads, 3, 512\), not"):
            run.backward(np.ones(shape), lambda at: None)
    for labels in ([1, 2, 3], [[1, 2]], [[1.0, 2, 3]], np.empty((0, 3), int)):
        with pytest.raises(FqError, match=r"integers of shape \(n_grads, 3\), not"):
            run.backward_of(np.array(labels), lambda at: None)
    for label in (-1, 512):
        with pytest.raises(FqError, match="labels must be between 0 and 511"):
            run.backward_of(np.full((2, 3), label), lambda at: None)
