"""Which architectures there are, and the graph of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gguf.file import GGUFFile
from .builder import Architecture, Builder
from .exaone4 import EXAONE4
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .glm4 import GLM4
from .granite import GRANITE
from .graph import Graph
from .hparams import HParams, read_hparams
from .hparams import unknown_keys as unknown_of
from .keys import Keys
from .llama import LLAMA
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        LLAMA,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        PHI3,
        SMOLLM3,
        OLMO2,
        GRANITE,
        EXAONE4,
        GLM4,
    )
}

# What some others have that no graph here has.
_LACKING = {
    "qwen3moe": "mixtures of experts",
    "qwen2moe": "mixtures of experts",
    "granitemoe": "mixtures of experts",
    "mixtral": "mixtures of experts",
    "gpt-oss": "mixtures of experts and attention sinks",
    "lfm2": "short convolutions",
    "qwen35": "linear attention",
    "gemma3n": "per-layer embeddings",
    "gemma4": "per-layer embeddings",
    "gpt2": "LayerNorm",
    "phi2": "LayerNorm",
    "starcoder2": "LayerNorm",
    "falcon": "LayerNorm",
    "bert": "LayerNorm",
    "command-r": "LayerNorm",
}


def read_graph(file: GGUFFile) -> tuple[HParams, Graph]:
    """Of a file whose architecture is known. Raises ModelError saying what is missing."""
    n_parts = file.metadata.get("split.count", 1)
    keys = Keys(file)
    if type(n_parts) is not int:
        raise keys.fail(f"split.count must be int, not {type(n_parts).__name__}")
    if n_parts > 1:
        raise keys.fail(f"one of {n_parts} parts (split.count); join them first (llama-gguf-split --merge)")
    architecture = ARCHITECTURES.get(keys.architecture)
    if architecture is None:
        why = f", as it has {_LACKING[keys.architecture]}" if keys.architecture in _LACKING else ""
        known = ", ".join(ARCHITECTURES)
        raise keys.fail(f"architecture {keys.architecture!r} is not supported{why}; there are {known}")
    hparams = read_hparams(keys, architecture.keys)
    builder = Builder(hparams, keys, file.tensors)
    architecture.build(builder)
    return hparams, builder.graph


def unknown_keys(metadata: Mapping[str, Any]) -> list[str]:
    """The keys of a known architecture and ``tokenizer.*`` that fq has no meaning for, in file order."""
    name = metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        return unknown_of(metadata, None, ())
    return unknown_of(metadata, f"{name}.", architecture.keys)
