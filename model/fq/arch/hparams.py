"""The hyper-parameters that all architectures have, read from GGUF metadata and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fq_kernels import GGUFStrings

from ..text.tokenizer import is_known_key
from .keys import Keys, shown

# By what follows the architecture's name. Read below:
_READ = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "expert_count",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.sliding_window", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
})  # fmt: skip
# What no node of the graph stands for, unless the architecture reads it, and the values under which none is
# needed. Others are refused, also those that llama.cpp passes over: such a file describes another model than
# the graph, and its figures would be nobody's.
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
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# What changes nothing here, whatever it says.
_WITHOUT_EFFECT = frozenset({
    # of embeddings, not of logits
    "pooling_type", "embedding_length_out", "classifier.output_labels", "classifier.pooling_type",
    # of norms that the graph does not have
    "attention.layer_norm_epsilon", "attention.group_norm_epsilon", "attention.group_norm_groups",
    # of a sliding window and of experts, which are refused themselves
    "attention.sliding_window_pattern", "attention.key_length_swa", "attention.value_length_swa",
    "rope.freq_base_swa", "rope.dimension_count_swa",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_weights_scale",
    "expert_weights_norm", "expert_gating_func", "leading_dense_block_count", "moe_every_n_layers",
    "interleave_moe_layer_step", "router_logit_softcapping",
    # how the weights came to be
    "rope.scaling.finetuned",
})  # fmt: skip
_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True)
class HParams:
    """llama.cpp's names; counts are elements, lengths are tokens.

    n_ctx_orig  what the model was trained on before its context was made longer
    yarn_mix    how much of YaRN: 0 for none
    """

    arch: str
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
    n_ctx_orig: int = 0
    rope_attn_factor: float = 1.0
    yarn_mix: float = 0.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0


def unknown_keys(metadata: Mapping[str, Any], prefix: str | None, read: Collection[str]) -> list[str]:
    """The keys of the architecture and ``tokenizer.*`` that fq has no meaning for, in file order.

    prefix  the architecture's name and a dot; None where it is not known
    read    what it reads itself, by what follows

    They may change what another program makes of the file. ``general.*`` only describes it.
    """
    known = _READ | _NEUTRAL.keys() | _WITHOUT_EFFECT | set(read)
    return [
        key
        for key in metadata
        if (prefix is not None and key.startswith(prefix) and key.removeprefix(prefix) not in known)
        or (key.startswith("tokenizer.") and not is_known_key(key))
    ]


def _check_neutral(keys: Keys, read: Collection[str]) -> None:
    """Raises ModelError for a known key, none of those that the architecture reads itself, whose value asks
    for another graph."""
    for key, neutral in _NEUTRAL.items():
        value = keys.value(key)
        if key not in read and value is not None and not _is_one_of(neutral, value):
            only = " or ".join(map(str, neutral))
            raise keys.fail(f"{keys.prefix}{key} is {shown(value)}; this runs models where it is {only}")


def read_hparams(keys: Keys, read: Collection[str]) -> HParams:
    """Of the file; ``read`` is what its architecture reads itself.

    Raises ModelError for a missing key, values that contradict one another or the tensors' shapes, and
    what asks for another graph.
    """
    fail, prefix, file = keys.fail, keys.prefix, keys.file
    n_expert = keys.count("expert_count", 0, least=0)
    if n_expert != 0:
        raise fail(f"{prefix}expert_count is {n_expert}; mixture-of-experts models are not supported")

    n_layer = keys.count("block_count", most=1024)
    n_embd = keys.count("embedding_length")
    n_head = keys.of_layers("attention.head_count", n_layer, most=4096)
    n_head_kv = keys.of_layers("attention.head_count_kv", n_layer, n_head, most=4096)
    if n_head % n_head_kv:
        raise fail(f"{n_head} heads do not share {n_head_kv} key/value heads evenly")
    if keys.value("attention.key_length") is None and n_embd % n_head:
        raise fail(f"embedding length {n_embd} is not a multiple of {n_head} heads")
    n_embd_head = keys.count("attention.key_length", n_embd // n_head, most=8192)
    if keys.count("attention.value_length", n_embd_head, most=8192) != n_embd_head:
        raise fail(f"{prefix}attention.value_length differs from the keys' {n_embd_head}; not supported")
    n_rot = keys.count("rope.dimension_count", n_embd_head, most=8192)
    if n_rot % 2 or n_rot > n_embd_head:
        raise fail(f"{prefix}rope.dimension_count is {n_rot}; heads have {n_embd_head} elements")

    # as in llama.cpp: a factor without a type is linear, and older files call it rope.scale_linear
    freq_base = keys.number("rope.freq_base", 10000.0, 1.0, 1e12)
    scaling = keys.text("rope.scaling.type", "linear")
    if scaling not in _SCALINGS:
        raise fail(
            f"{prefix}rope.scaling.type {shown(scaling)} is not supported; there are {', '.join(_SCALINGS)}"
        )
    factor = 1.0
    if scaling != "none":
        factor = keys.number("rope.scale_linear", 1.0, 1e-3, 1e6)
        factor = keys.number("rope.scaling.factor", factor, 1e-3, 1e6)
    mix = keys.number("rope.scaling.yarn_ext_factor", -1.0, -1.0, 1.0)
    if mix < 0:  # by the type
        mix = 1.0 if scaling == "yarn" else 0.0

    n_ctx_train = keys.count("context_length", most=1 << 30)
    if "attention.sliding_window" not in read:
        window = keys.count("attention.sliding_window", 0, most=1 << 32, least=0)
        if 0 != window < n_ctx_train:  # one that is no shorter than the context hides nothing
            raise fail(
                f"{prefix}attention.sliding_window is {window}; {keys.architecture} has no windows here"
            )
    _check_neutral(keys, read)

    embd = file.tensors.get("token_embd.weight")
    if embd is None:
        raise fail("tensor token_embd.weight is missing; is this a vocabulary-only file?")
    if len(embd.shape) != 2 or embd.shape[1] != n_embd:
        raise fail(f"token_embd.weight has shape {embd.shape}; the embedding length is {n_embd}")
    n_vocab = embd.shape[0]
    vocab_size = keys.count("vocab_size", n_vocab, most=1 << 32, least=-(1 << 63))
    if vocab_size != n_vocab:
        raise fail(f"{prefix}vocab_size is {vocab_size}; token_embd.weight has {n_vocab} rows")

    return HParams(
        arch=keys.architecture,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=n_embd_head,
        n_rot=n_rot,
        n_ff=keys.of_layers("feed_forward_length", n_layer),
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        rope_freq_base=freq_base,
        rope_freq_scale=1.0 / factor,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon", None, 0.0, 1.0),
        n_ctx_orig=keys.count("rope.scaling.original_context_length", n_ctx_train, most=1 << 30),
        rope_attn_factor=keys.number("rope.scaling.attn_factor", 1.0, 1e-3, 1e3),
        yarn_mix=mix,
        yarn_beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, 1e-3, 1e6),
        yarn_beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, 1e-3, 1e6),
    )


def _is_one_of(neutral: tuple[Any, ...], value: Any) -> bool:
    """Whether a value, or each of an array's, is neutral: exactly, since a bool is an int to Python."""
    if isinstance(value, np.ndarray | GGUFStrings | list):
        values = value.tolist() if isinstance(value, np.ndarray) else value
        return all(_is_one_of(neutral, v) for v in values)
    return type(value) is type(neutral[0]) and value in neutral
