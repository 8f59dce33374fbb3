"""Which architectures there are, and the graph of a file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..gguf.file import GGUFFile
from ..gguf.split import Parts
from .builder import Architecture, Builder
from .graph import Graph
from .hparams import HParams, read_hparams
from .hparams import unknown_keys as unknown_of
from .keys import Keys, shown

# By their names in ``general.architecture``; each has the module of its name, imported for its files alone.
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "exaone4",
    "glm4",
)

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


def read_graph(file: GGUFFile | Parts) -> tuple[HParams, Graph]:
    """Of a file whose architecture is known. Raises ModelError saying what is missing."""
    keys = Keys(file)
    if keys.architecture not in ARCHITECTURES:
        why = f", as it has {_LACKING[keys.architecture]}" if keys.architecture in _LACKING else ""
        known = ", ".join(ARCHITECTURES)
        raise keys.fail(f"architecture {shown(keys.architecture)} is not supported{why}; there are {known}")
    architecture = _architecture(keys.architecture)
    hparams = read_hparams(keys, architecture.keys)
    builder = Builder(hparams, keys, file.tensors)
    architecture.build(builder)
    return hparams, builder.graph


def kind_of_norms(architecture: str) -> str:
    """Of a known architecture, of fq_kernels.units.profiles.NORMS."""
    return _architecture(architecture).norms


def unknown_keys(metadata: Mapping[str, Any]) -> list[str]:
    """The keys of a known architecture and ``tokenizer.*`` that fq has no meaning for, in file order."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        return unknown_of(metadata, None, ())
    return unknown_of(metadata, f"{name}.", _architecture(name).keys)


def _architecture(name: str) -> Architecture:
    found: Architecture = importlib.import_module(f".{name}", __package__).ARCHITECTURE
    return found
