"""A tiny file of random weights for each architecture, with the quirks that its models have switched on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fq.gguf.synthetic import _add_vocabulary

N_VOCAB = 512


@dataclass(frozen=True)
class Tiny:
    """What a file is made of.

    meta     keys of the architecture beside the sizes
    norms    tensors of a layer that are vectors: their name, and of how many elements
    biases   stems of tensors that have one
    vectors  of the file: name and values
    """

    arch: str
    n_layer: int = 4
    n_embd: int = 48
    n_head: int = 6
    n_head_kv: int = 2
    head_dim: int = 8
    n_rot: int = 8
    n_ff: int = 80
    meta: dict[str, Any] = field(default_factory=dict)
    norms: tuple[tuple[str, str], ...] = (("attn_norm", "embd"), ("ffn_norm", "embd"))
    biases: tuple[str, ...] = ()
    fused_qkv: bool = False
    fused_ffn: bool = False
    tied: bool = False
    vectors: dict[str, tuple[float, ...]] = field(default_factory=dict)


_QK = (("attn_q_norm", "head"), ("attn_k_norm", "head"))
_POST = (("post_attention_norm", "embd"), ("post_ffw_norm", "embd"))
_PRE = (("attn_norm", "embd"), ("ffn_norm", "embd"))
_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}

TINY: dict[str, Tiny] = {
    "llama": Tiny(
        "llama",
        biases=("attn_q", "attn_k", "attn_v", "attn_output"),
        vectors={"rope_freqs.weight": (1.0, 1.5, 2.5, 8.0)},
    ),
    "llama-yarn": Tiny("llama", meta=_YARN, head_dim=16, n_head=3, n_head_kv=1, n_rot=16),
    "llama-linear": Tiny("llama", meta={"rope.scaling.factor": 4.0}),
    "qwen2": Tiny("qwen2", biases=("attn_q", "attn_k", "attn_v"), tied=True),
    "qwen3": Tiny("qwen3", norms=(*_PRE, *_QK), head_dim=16, n_rot=16),
    "gemma": Tiny("gemma", tied=True, head_dim=16, n_rot=16, n_head_kv=1),
    "gemma2": Tiny(
        "gemma2",
        tied=True,
        head_dim=16,
        n_rot=16,
        norms=(*_PRE, *_POST),
        meta={
            "attention.sliding_window": 9,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": Tiny(
        "gemma3",
        n_layer=7,
        tied=True,
        head_dim=16,
        n_rot=16,
        n_head_kv=1,
        norms=(*_PRE, *_QK, *_POST),
        meta={
            "attention.sliding_window": 9,
            "rope.freq_base": 1e6,
            "rope.scaling.factor": 8.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3-pattern": Tiny(
        "gemma3",
        tied=True,
        norms=(*_PRE, *_QK, *_POST),
        meta={
            "attention.sliding_window": 5,
            "attention.sliding_window_pattern": [True, False, False, True],
            "rope.freq_base_swa": 500.0,
        },
    ),
    "phi3": Tiny(
        "phi3",
        n_head=4,
        n_head_kv=4,
        head_dim=12,
        n_rot=8,
        fused_qkv=True,
        fused_ffn=True,
        meta={
            "attention.sliding_window": 8,
            "rope.scaling.attn_factor": 1.19,
            "rope.scaling.original_context_length": 256,
        },
        vectors={
            "rope_factors_long.weight": (1.0, 2.0, 4.0, 8.0),
            "rope_factors_short.weight": (1.0, 1.1, 1.2, 1.3),
        },
    ),
    "smollm3": Tiny("smollm3", n_layer=8, tied=True),
    "olmo2": Tiny("olmo2", norms=(("attn_q_norm", "q"), ("attn_k_norm", "kv"), *_POST)),
    "olmo3": Tiny(
        "olmo2",
        n_layer=5,
        norms=(("attn_q_norm", "q"), ("attn_k_norm", "kv"), *_POST),
        meta={"attention.sliding_window": 9, **_YARN},
    ),
    "granite": Tiny(
        "granite",
        tied=True,
        meta={
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "attention.scale": 0.0625,
            "logit_scale": 8.0,
        },
    ),
    "granite-without-rope": Tiny("granite", meta={"logit_scale": 8.0, "rope.scaling.finetuned": False}),
    "exaone4": Tiny("exaone4", norms=(*_QK, *_POST), vectors={"rope_freqs.weight": (1.0, 1.5, 2.5, 8.0)}),
    "exaone4-32b": Tiny(
        "exaone4",
        n_layer=64,
        n_ff=32,
        norms=(*_QK, *_POST),
        meta={"attention.sliding_window": 9},
    ),
    "glm4": Tiny("glm4", norms=(*_PRE, *_POST), fused_ffn=True, head_dim=16, n_rot=8),
}


def write_tiny(path: Path, tiny: Tiny, *, seed: int = 0, n_ctx: int = 512) -> Path:
    """The same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, tiny.arch)
    sizes = {
        "block_count": tiny.n_layer,
        "context_length": n_ctx,
        "embedding_length": tiny.n_embd,
        "feed_forward_length": tiny.n_ff,
        "attention.head_count": tiny.n_head,
        "attention.head_count_kv": tiny.n_head_kv,
        "attention.key_length": tiny.head_dim,
        "attention.value_length": tiny.head_dim,
        "rope.dimension_count": tiny.n_rot,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": N_VOCAB,
    }
    for key, value in (sizes | tiny.meta).items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(f"{tiny.arch}.{key}", value, kind)
    _add_vocabulary(writer, N_VOCAB)

    def matrix(name: str, n_out: int, n_in: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.normal(0, n_in**-0.5, (n_out, n_in)).astype(np.float32))
        if name.rpartition(".")[2] in tiny.biases:
            writer.add_tensor(f"{name}.bias", rng.normal(0, 0.3, n_out).astype(np.float32))

    n_q, n_kv = tiny.n_head * tiny.head_dim, tiny.n_head_kv * tiny.head_dim
    lengths = {"embd": tiny.n_embd, "head": tiny.head_dim, "q": n_q, "kv": n_kv}
    for name, values in tiny.vectors.items():
        writer.add_tensor(name, np.array(values, np.float32))
    matrix("token_embd", N_VOCAB, tiny.n_embd)
    for il in range(tiny.n_layer):
        for name, length in tiny.norms:
            weights = rng.uniform(0.5, 1.5, lengths[length]).astype(np.float32)
            writer.add_tensor(f"blk.{il}.{name}.weight", weights)
        if tiny.fused_qkv:
            matrix(f"blk.{il}.attn_qkv", n_q + 2 * n_kv, tiny.n_embd)
        else:
            matrix(f"blk.{il}.attn_q", n_q, tiny.n_embd)
            matrix(f"blk.{il}.attn_k", n_kv, tiny.n_embd)
            matrix(f"blk.{il}.attn_v", n_kv, tiny.n_embd)
        matrix(f"blk.{il}.attn_output", tiny.n_embd, n_q)
        if not tiny.fused_ffn:
            matrix(f"blk.{il}.ffn_gate", tiny.n_ff, tiny.n_embd)
        matrix(f"blk.{il}.ffn_up", (1 + tiny.fused_ffn) * tiny.n_ff, tiny.n_embd)
        matrix(f"blk.{il}.ffn_down", tiny.n_embd, tiny.n_ff)
    writer.add_tensor("output_norm.weight", rng.uniform(0.5, 1.5, tiny.n_embd).astype(np.float32))
    if not tiny.tied:
        matrix("output", N_VOCAB, tiny.n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_tokens(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n)


def is_close(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest logit."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())
