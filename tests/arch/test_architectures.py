"""Every architecture on a tiny file of its own: logits against a float64 reference of what it is."""

from __future__ import annotations

import numpy as np
import pytest
from reference_models import ReferenceModel
from tiny_models import TINY, is_close, some_tokens, write_tiny

from fq import Context, Model
from fq.arch.registry import ARCHITECTURES

N_TOKENS = 40
# Float32 arithmetic leaves some 1e-6 of the largest logit; the smallest mistake tried leaves 1e-3.
RTOL = 2e-5


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
