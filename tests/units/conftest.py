"""A model of three layers, whose norms take units."""

from __future__ import annotations

import pytest

from fq import Model
from fq.gguf.synthetic import tiny_shape, write_llama_gguf


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("units") / "tiny.gguf"
    write_llama_gguf(
        path, tiny_shape(n_layer=3, n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128), mix="Q8_0"
    )
    return path


@pytest.fixture(scope="session")
def model(path):
    return Model(path)
