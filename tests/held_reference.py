"""A run under rules against a float64 model that is held against it at each rounding.

It goes on with what came out of the rounding, so that no step can fall otherwise in the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from reference_models import ReferenceModel

from fq import Context, Executor, FakeQuant, Model
from fq_kernels import Executor as KernelExecutor
from fq_kernels import reference
from fq_kernels.rules import POINTS, Place, Site, Value

ALL = slice(None)


class Recorder(FakeQuant):
    """Keeps what its rules round at values that are no norm's, before and after."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: dict[Place, tuple[np.ndarray, np.ndarray]] = {}
        self.read: dict[Place, np.ndarray] = {}

    def round(self, values: Sequence[Value], x: np.ndarray, executor: KernelExecutor | None = None) -> None:
        for value in values:
            before = x.copy()
            super().round([value], x, executor)
            if self.takes(value.place):
                self.seen[value.place] = before, x.copy()

    def rms_norm(self, norm: Place, x: np.ndarray, **options: Any) -> np.ndarray:
        self.read[norm] = x.copy()
        return super().rms_norm(norm, x, **options)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected.reshape(found.shape)).max() / np.abs(expected).max())


def rounded(x: np.ndarray, fmt: str) -> np.ndarray:
    """By numpy and ml_dtypes alone."""
    if fmt == "fp8_e4m3fn":
        return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return reference.round_trip(x, fmt)


def hold(
    path: Path, model: Model, tokens: Sequence[int], rules: Sequence[str], executor: Executor, rtol: float
) -> None:
    """Assert that every rounded value, before and after, and the logits are the reference's within rtol."""
    fake_quant = Recorder(model.values, rules)
    logits = Context(model, 128, executor, fake_quant).eval(tokens, ALL)
    weights = {node.norm: model.vectors[str(node.weight)] for node in model.graph.nodes if node.norm}

    def at(kind: str, layer: int | None, values: np.ndarray) -> np.ndarray:
        counter = fake_quant.counters[Site(Place(kind, layer))]
        if counter.rule is None:
            return values
        before, after = fake_quant.seen.pop(Place(kind, layer))
        assert distance(before, values) < rtol
        assert after.tobytes() == rounded(before, counter.rule.format.name).tobytes()
        assert after.tobytes() != before.tobytes()
        return after.astype(np.float64).reshape(values.shape)

    def at_norm(kind: str, layer: int | None, point: str, values: np.ndarray) -> np.ndarray:
        norm = Place(kind, layer)
        rule = {p: fake_quant.counters[Site(norm, p)].rule for p in POINTS}
        read = fake_quant.read[norm]
        if point == "in":
            if rule["in"] is None:
                return values
            assert distance(read, values) < rtol
            return rounded(read, rule["in"].format.name).astype(np.float64).reshape(values.shape)
        if rule[point] is None:
            return values
        # what it computes of what it reads, before the rounding and after it
        x = read if rule["in"] is None else rounded(read, rule["in"].format.name)
        before = reference.rms_norm_f32(x, eps=model.hparams.rms_eps)
        if point == "weighted":
            if rule["raw"] is not None:
                before = rounded(before, rule["raw"].format.name)
            before = before * weights[norm]
        assert distance(before, values) < rtol
        return rounded(before, rule[point].format.name).astype(np.float64).reshape(values.shape)

    expected = ReferenceModel(path, 128).logits(tokens, at_norm, at)
    assert fake_quant.seen == {}  # all of them were met
    assert distance(logits, expected) < rtol
    plain = ReferenceModel(path, 128).logits(tokens)
    assert distance(plain, expected) > 1e-4
