"""The hyper-parameters of a llama-architecture model, read from GGUF metadata and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FqError
from ..gguf.file import GGUFFile
from ..text.tokenizer import is_known_key

PREFIX = "llama."
# By what follows the prefix. Read below:
_READ = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "expert_count",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.sliding_window", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
})  # fmt: skip
# What no node of the graph stands for, and the values under which none is needed. Others are refused, also
# those that llama.cpp passes over in a llama file (it reads causal and attn_factor): such a file describes
# another model than the graph, and its figures would be nobody's.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),  # 1 / sqrt(head)
    "attention.output_scale": (0.0, 1.0),
    "attention.value_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.key_length_mla": (0,),
    "attention.value_length_mla": (0,),
    "attention.shared_kv_layers": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "hidden_activation": ("silu",),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "nextn_predict_layers": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "rope.dimension_sections": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (-1.0, 0.0),  # -1: by the type
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# What changes nothing here, whatever it says.
_WITHOUT_EFFECT = frozenset({
    # of embeddings, not of logits
    "pooling_type", "embedding_length_out", "classifier.output_labels", "classifier.pooling_type",
    # of norms that the graph does not have
    "attention.layer_norm_epsilon", "attention.group_norm_epsilon", "attention.group_norm_groups",
    # of a sliding window, of YaRN and of experts, which are refused themselves
    "attention.sliding_window_pattern", "attention.key_length_swa", "attention.value_length_swa",
    "rope.freq_base_swa", "rope.dimension_count_swa",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_weights_scale",
    "expert_weights_norm", "expert_gating_func", "leading_dense_block_count", "moe_every_n_layers",
    "interleave_moe_layer_step", "router_logit_softcapping",
    # how the weights came to be
    "rope.scaling.finetuned",
})  # fmt: skip


class ModelError(FqError):
    """A GGUF file that is well-formed but not a llama model that can be run."""


@dataclass(frozen=True)
class HParams:
    """llama.cpp's names; counts are elements, lengths are tokens."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_rot: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rope_freq_base: float
    rope_freq_scale: float
    rms_eps: float


def unknown_keys(metadata: Mapping[str, Any]) -> list[str]:
    """The keys ``llama.*`` and ``tokenizer.*`` that fq has no meaning for, in file order.

    They may change what another program makes of the file. ``general.*`` only describes it.
    """
    known = _READ | _NEUTRAL.keys() | _WITHOUT_EFFECT
    return [
        key
        for key in metadata
        if (key.startswith(PREFIX) and key.removeprefix(PREFIX) not in known)
        or (key.startswith("tokenizer.") and not is_known_key(key))
    ]


def read_hparams(file: GGUFFile) -> HParams:
    """Hyper-parameters of ``file``.

    Raises ModelError for another architecture, a missing key, values that contradict one
    another or the tensors' shapes, and a known key whose value asks for another graph.
    """
    meta = file.metadata

    def fail(message: str) -> ModelError:
        return ModelError(f"{file.path}: {message}")

    def scalar(key: str, kind: type, default: Any = None) -> Any:
        value = meta.get(key, default)
        if type(value) is not kind:  # exactly: an array has no truth value, and a bool is an int to Python
            wrong = f"must be {kind.__name__}, not {type(value).__name__}"
            raise fail(f"{key} {'is missing' if value is None else wrong}")
        return value

    n_parts = scalar("split.count", int, 1)
    if n_parts > 1:
        raise fail(f"one of {n_parts} parts (split.count); join them first (llama-gguf-split --merge)")
    arch = scalar("general.architecture", str)
    if arch != "llama":
        raise fail(f"architecture {arch!r} is not supported; this runs 'llama'")
    prefix = PREFIX

    def count(key: str, default: int | None = None, most: int = 1 << 24) -> int:
        value: int = scalar(prefix + key, int, default)
        if not 0 < value <= most:
            raise fail(f"{prefix}{key} is {value}; it must be between 1 and {most}")
        return value

    def number(key: str, default: float | None, least: float, most: float) -> float:
        value: float = scalar(prefix + key, float, default)
        if not least <= value <= most:  # false for NaN too
            raise fail(f"{prefix}{key} is {value}; it must be between {least} and {most}")
        return value

    n_expert = scalar(prefix + "expert_count", int, 0)
    if n_expert != 0:
        raise fail(f"{prefix}expert_count is {n_expert}; mixture-of-experts models are not supported")

    n_layer = count("block_count", most=1024)
    n_embd = count("embedding_length")

    def layers(key: str, default: int | None = None, most: int = 1 << 24) -> int:
        """A count that may be given as one for each layer; all must be the same."""
        values = meta.get(prefix + key)
        if not isinstance(values, np.ndarray):
            return count(key, default, most)
        if values.dtype.kind not in "iu" or len(values) != n_layer:
            raise fail(f"{prefix}{key} must be int, or {n_layer} of them, one per layer")
        if (values != values[0]).any():
            raise fail(f"{prefix}{key} differs between layers ({_shown(values)}); not supported")
        if not 0 < (value := int(values[0])) <= most:
            raise fail(f"{prefix}{key} is {value}; it must be between 1 and {most}")
        return value

    n_head = layers("attention.head_count", most=4096)
    n_head_kv = layers("attention.head_count_kv", n_head, most=4096)
    if n_head % n_head_kv:
        raise fail(f"{n_head} heads do not share {n_head_kv} key/value heads evenly")
    if prefix + "attention.key_length" not in meta and n_embd % n_head:
        raise fail(f"embedding length {n_embd} is not a multiple of {n_head} heads")
    n_embd_head = count("attention.key_length", n_embd // n_head, most=8192)
    if count("attention.value_length", n_embd_head, most=8192) != n_embd_head:
        raise fail(f"{prefix}attention.value_length differs from the keys' {n_embd_head}; not supported")
    n_rot = count("rope.dimension_count", n_embd_head, most=8192)
    if n_rot % 2 or n_rot > n_embd_head:
        raise fail(f"{prefix}rope.dimension_count is {n_rot}; heads have {n_embd_head} elements")

    # as in llama.cpp: a factor without a type is linear, and older files call it rope.scale_linear
    scaling = scalar(prefix + "rope.scaling.type", str, "linear")
    if scaling not in ("none", "linear"):
        raise fail(f"{prefix}rope.scaling.type {scaling!r} is not supported; there are none, linear")
    factor = 1.0
    if scaling == "linear":
        factor = number("rope.scale_linear", 1.0, 1e-3, 1e6)
        factor = number("rope.scaling.factor", factor, 1e-3, 1e6)

    n_ctx_train = count("context_length", most=1 << 30)
    window = scalar(prefix + "attention.sliding_window", int, 0)
    if 0 != window < n_ctx_train:  # one that is no shorter than the context hides nothing
        raise fail(f"{prefix}attention.sliding_window is {window}; sliding windows are not supported")
    for key, neutral in _NEUTRAL.items():
        value = meta.get(prefix + key)
        if value is not None and not _is_one_of(neutral, value):
            only = " or ".join(map(str, neutral))
            raise fail(f"{prefix}{key} is {_shown(value)}; this runs models where it is {only}")

    embd = file.tensors.get("token_embd.weight")
    if embd is None:
        raise fail("tensor token_embd.weight is missing; is this a vocabulary-only file?")
    if len(embd.shape) != 2 or embd.shape[1] != n_embd:
        raise fail(f"token_embd.weight has shape {embd.shape}; the embedding length is {n_embd}")
    n_vocab = embd.shape[0]
    vocab_size = scalar(prefix + "vocab_size", int, n_vocab)
    if vocab_size != n_vocab:
        raise fail(f"{prefix}vocab_size is {vocab_size}; token_embd.weight has {n_vocab} rows")

    return HParams(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=n_embd_head,
        n_rot=n_rot,
        n_ff=layers("feed_forward_length"),
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        rope_freq_base=number("rope.freq_base", 10000.0, 1.0, 1e12),
        rope_freq_scale=1.0 / factor,
        rms_eps=number("attention.layer_norm_rms_epsilon", None, 0.0, 1.0),
    )


def _is_one_of(neutral: tuple[Any, ...], value: Any) -> bool:
    """Whether a value, or each of an array's, is neutral: exactly, since a bool is an int to Python."""
    if isinstance(value, np.ndarray | list):
        values = value.tolist() if isinstance(value, np.ndarray) else value
        return all(_is_one_of(neutral, v) for v in values)
    return type(value) is type(neutral[0]) and value in neutral


def _shown(value: Any) -> str:
    """A value for a message of one line: it comes from the file and may be long."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
