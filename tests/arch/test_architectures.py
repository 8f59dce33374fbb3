"""Every architecture on a tiny file of its own: logits against a float64 reference of what it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference_models import ReferenceModel
from tiny_models import TINY, is_close, some_tokens, write_tiny

from fq import Context, Model
from fq.arch.graph import Yarn
from fq.arch.keys import ModelError
from fq.arch.registry import ARCHITECTURES
from fq.run.rope import _kept_by_yarn

N_TOKENS = 40
# Float32 arithmetic leaves some 1e-6 of the largest logit; the smallest mistake tried leaves 1e-3.
RTOL = 2e-5
# Of tokens 11 and 39 the first eight logits that llama.cpp computes from these files, and the largest of all
# tokens: float32 KV cache, no flash attention, GELU by its formula (its own is a table of float16).
LLAMA_CPP = json.loads((Path(__file__).parent / "llama_cpp_logits.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("tiny"), {}

    def path_of(name: str):
        if name not in paths:
            paths[name] = write_tiny(folder / f"{name}.gguf", TINY[name])
        return paths[name]

    return path_of


def test_each_architecture_has_a_file():
    assert {tiny.arch for tiny in TINY.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_the_references(path_of, executor, name):
    tokens = some_tokens(N_TOKENS)
    for n_ctx in (200, 300):  # below and above what RoPE's long factors are for
        expected = ReferenceModel(path_of(name), n_ctx).logits(tokens)
        model = Model(path_of(name))
        found = Context(model, n_ctx, executor).eval(tokens, slice(None))
        assert is_close(found, expected) < RTOL
        # and token by token, in batches of every way that attention has
        context = Context(model, n_ctx, executor)
        parts = [context.eval(part, slice(None)) for part in np.split(tokens, [1, 2, 5, 21])]
        assert is_close(np.concatenate(parts), expected) < RTOL


@pytest.mark.parametrize("name", TINY)
def test_a_part_without_outputs(path_of, executor, name):
    model, tokens = Model(path_of(name)), some_tokens(N_TOKENS)
    expected = Context(model, 200, executor).eval(tokens, slice(21, None))
    context = Context(model, 200, executor)
    assert context.eval(tokens[:21], slice(0, 0)).shape == (0, model.hparams.n_vocab)
    assert context.eval(tokens[21:], slice(None)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", TINY)
def test_logits_are_llama_cpps(path_of, executor, name):
    model = Model(path_of(name))
    for n_ctx, kept in LLAMA_CPP[name].items():
        found = Context(model, int(n_ctx), executor).eval(some_tokens(N_TOKENS), slice(None))
        for row, expected in kept["rows"].items():
            assert np.abs(found[int(row), :8] - expected).max() < 1e-5 * kept["largest"]


def test_yarn_with_the_least_base_above_1():
    kept = _kept_by_yarn(256, math.nextafter(1, 2), Yarn(1 << 30, 1e-3, 1.0, 1.0))
    assert kept.shape == (128,) and set(kept) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "key"),
    [("llama", "rope.freq_base"), ("gemma2", "rope.freq_base"), ("gemma2", "rope.freq_base_swa")],
)
def test_yarn_needs_a_base_above_1(tmp_path, name, key):
    tiny, yarn = TINY[name], TINY["llama-yarn"].meta
    for meta in (yarn, {key: 1.0}):
        Model(write_tiny(tmp_path / "m.gguf", replace(tiny, meta=tiny.meta | meta)))
    path = write_tiny(tmp_path / "m.gguf", replace(tiny, meta=tiny.meta | yarn | {key: 1.0}))
    with pytest.raises(ModelError, match=rf"{tiny.arch}\.{key} is 1\.0; YaRN needs one above 1"):
        Model(path)


def test_a_cap_that_is_next_to_nothing(tmp_path):
    """As float32 it might be 0, and every logit NaN."""
    tiny = TINY["gemma3"]
    path = write_tiny(tmp_path / "m.gguf", replace(tiny, meta=tiny.meta | {"final_logit_softcapping": 1e-30}))
    with pytest.raises(ModelError, match=r"final_logit_softcapping is 1\S*e-30; it must be between 0.001"):
        Model(path)
