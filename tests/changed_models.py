"""The tiny model with some of its weights changed, or in other types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
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


def rewrite(source, path, tokens=None, change=lambda name, values: values, q8_0=True):
    """Its tensors unpacked, and as Q8_0 if asked for, where rows allow."""
    reader, kinds = gguf.GGUFReader(source), gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value, item = field.contents(), field.types[-1] if field.types[0] == kinds.ARRAY else None
            if name == "tokenizer.ggml.tokens" and tokens is not None:
                value = tokens(value)
            writer.add_key_value(name, value, field.types[0], sub_type=item)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        values = change(tensor.name, values.reshape(tensor.shape[::-1].tolist()))
        if q8_0 and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
