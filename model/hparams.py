"""The hyper-parameters of a llama-architecture model, read from GGUF metadata and checked."""

from __future__ import annotations

from dataclasses import dataclass

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

    arch = meta.get("general.architecture")
    if arch != "llama":
        raise fail(f"architecture {arch!r} is not supported; this runs 'llama'")
    prefix = "llama."

    def count(key: str, default: int | None = None, most: int = 1 << 24) -> int:
        value = meta.get(prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            what = "is missing" if value is None else f"must be an integer, not {type(value).__name__}"
            raise fail(f"{prefix}{key} {what}")
        if not 0 < value <= most:
            raise fail(f"{prefix}{key} is {value}; it must be between 1 and {most}")
        return value

    def number(key: str, default: float | None, least: float, most: float) -> float:
        value = meta.get(prefix + key, default)
        if not isinstance(value, float):
            what = "is missing" if value is None else f"must be a float, not {type(value).__name__}"
            raise fail(f"{prefix}{key} {what}")
        if not least <= value <= most:
            raise fail(f"{prefix}{key} is {value}; it must be between {least} and {most}")
        return value

    if meta.get(prefix + "expert_count", 0) != 0:
        raise fail("mixture-of-experts models are not supported")

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
        raise fail("keys and values of different lengths are not supported")
    n_rot = count("rope.dimension_count", n_embd_head, most=8192)
    if n_rot % 2 or n_rot > n_embd_head:
        raise fail(f"{prefix}rope.dimension_count is {n_rot}; heads have {n_embd_head} elements")

    scaling = meta.get(prefix + "rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise fail(f"rope scaling {scaling!r} is not supported; there are none, linear")
    factor = number("rope.scaling.factor", 1.0, 1e-3, 1e6) if scaling == "linear" else 1.0

    embd = file.tensors.get("token_embd.weight")
    if embd is None:
        raise fail("tensor token_embd.weight is missing; is this a vocabulary-only file?")
    if len(embd.shape) != 2 or embd.shape[1] != n_embd:
        raise fail(f"token_embd.weight has shape {embd.shape}; the embedding length is {n_embd}")
    n_vocab = embd.shape[0]
    if meta.get(prefix + "vocab_size", n_vocab) != n_vocab:
        raise fail(f"{prefix}vocab_size is {meta[prefix + 'vocab_size']}; token_embd.weight has {n_vocab} rows")

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
