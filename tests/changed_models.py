"""The tiny model with some of its weights changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fq import Model
from fq.gguf.synthetic import tiny_shape, write_llama_gguf


def written(path: Path, *changes: tuple[str, Any, Any]) -> Model:
    """A model of random weights with some of them changed: (tensor, index, value)."""
    write_llama_gguf(path, tiny_shape(n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128), mix="F32")
    tensors = Model(path).file.tensors
    for name, index, value in changes:
        data = np.memmap(path, np.float32, "r+", tensors[name].offset, tensors[name].shape)
        data[index] = value
        data.flush()
    return Model(path)


OVERFLOWS = "attn_norm[0].weighted=f16"  # in the model below, at every token


def overflowing(path: Path) -> Model:
    """Its first norm's output is finite, and beyond the largest F16."""
    return written(path, ("blk.0.attn_norm.weight", 3, 1e8))
