"""A GGUF file with the same values as float32, for what llama.cpp does without rounding activations; and one
with its matrices packed again."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np


def write_f32(source: Path, target: Path) -> None:
    """Unpack every tensor of ``source``; all metadata but the file type stay."""
    _rewrite(source, target, gguf.LlamaFileType.ALL_F32, packed=None)


def write_q8_0(source: Path, target: Path) -> None:
    """The same with matrices as Q8_0, where their rows allow."""
    _rewrite(source, target, gguf.LlamaFileType.MOSTLY_Q8_0, packed=gguf.GGMLQuantizationType.Q8_0)


def _rewrite(
    source: Path, target: Path, file_type: gguf.LlamaFileType, packed: gguf.GGMLQuantizationType | None
) -> None:
    reader = gguf.GGUFReader(source)
    part = target.with_name(f".fq-{os.getpid()}.part")
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(part, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = file_type if name == "general.file_type" else field.contents()
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        values = values.reshape(tensor.shape[::-1].tolist())
        if packed is not None and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, packed), raw_dtype=packed)
        else:
            writer.add_tensor(tensor.name, values)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
