"""The hyper-parameters of a llama-architecture model, read from GGUF metadata and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import FqError
from .gguf_file import GGUFFile


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


def read_hparams(file: GGUFFile) -> HParams:
    """Hyper-parameters of ``file``.

    Raises ModelError for another architecture, a missing key, or values that contradict
    one another or the tensors' shapes.
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
    prefix = "llama."

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
    n_head = count("attention.head_count", most=4096)
    n_head_kv = count("attention.head_count_kv", n_head, most=4096)
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
        n_ff=count("feed_forward_length"),
        n_vocab=n_vocab,
        n_ctx_train=count("context_length", most=1 << 30),
        rope_freq_base=number("rope.freq_base", 10000.0, 1.0, 1e12),
        rope_freq_scale=1.0 / factor,
        rms_eps=number("attention.layer_norm_rms_epsilon", None, 0.0, 1.0),
    )
