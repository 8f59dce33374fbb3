"""No figure is made with a library's exponentials, which are others on other processors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fq import Model, Perplexity
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.inference import _log_gamma, t_quantile
from fq_kernels.rules import FakeQuant

NUMPY = (
    "exp",
    "exp2",
    "expm1",
    "log",
    "log1p",
    "log2",
    "log10",
    "cos",
    "sin",
    "tanh",
    "power",
    "matmul",
    "dot",
)
MATH = ("exp", "expm1", "log", "log1p", "log2", "log10", "cos", "sin", "tanh", "pow", "gamma", "lgamma")


@pytest.fixture
def without(monkeypatch):
    """Neither numpy's nor C's."""

    def refuse(*args, **options):
        raise AssertionError("a library's function in the path of a figure")

    for module, names in ((np, NUMPY), (math, MATH)):
        for name in names:
            monkeypatch.setattr(module, name, refuse)


def test_a_run_needs_none(tiny_path, executor, without):
    t_quantile.cache_clear()
    model = Model(tiny_path)
    tokens = model.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))
    rules = FakeQuant(model.values, ["ffn_norm=bf16", "attn_out=int8"])
    run = Perplexity(model, tokens, fake_quant=rules, executor=executor, n_ctx=32, chunks=5, control=True)
    for _ in run:
        pass
    assert run.result()["comparison"]["mean_kld_ci95_chunks"] is not None


@pytest.mark.parametrize("x", [1e-3, 0.5, 1.0, 1.5, 2.0, 7.25, 15.99, 16.0, 100.0, 2040.5, 1e6])
def test_log_gamma(x):
    assert _log_gamma(x) == pytest.approx(math.lgamma(x), rel=4e-15, abs=4e-14)
