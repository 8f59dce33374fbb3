"""A llama forward pass in float64, straight from the architecture; it shares no code with the product."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

Array = np.ndarray[Any, np.dtype[np.float64]]
# (kind, layer, point, values) -> values: where a test rounds a norm's output
RoundNorm = Callable[[str, int | None, str, Array], Array]
# (kind, layer, values) -> values: where a test rounds any other value, by its site's name
RoundValue = Callable[[str, int | None, Array], Array]


class ReferenceLlama:
    """The whole model, unpacked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        reader = GGUFReader(path)
        self.meta = {name: field.contents() for name, field in reader.fields.items()}
        self.weights: dict[str, Array] = {
            t.name: np.array(dequantize(t.data, t.tensor_type), np.float64) for t in reader.tensors
        }

    def hparam(self, key: str, default: Any = None) -> Any:
        return self.meta.get(f"llama.{key}", default)

    def logits(
        self, tokens: Sequence[int], round_norm: RoundNorm | None = None, at: RoundValue | None = None
    ) -> Array:
        """Logits of every token, (n_tokens, n_vocab)."""
        at = at or (lambda kind, layer, values: values)
        w, eps = self.weights, self.hparam("attention.layer_norm_rms_epsilon")
        n_head = self.hparam("attention.head_count")
        n_head_kv = self.hparam("attention.head_count_kv", n_head)
        head_dim = self.hparam("attention.key_length", self.hparam("embedding_length") // n_head)
        n_tokens = len(tokens)
        angles = self.angles(n_tokens, self.hparam("rope.dimension_count", head_dim))

        def norm(x: Array, kind: str, layer: int | None) -> Array:
            name = kind if layer is None else f"blk.{layer}.{kind}"
            if round_norm:
                x = round_norm(kind, layer, "in", x)
            raw = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
            if round_norm:
                raw = round_norm(kind, layer, "raw", raw)
            weighted = raw * w[f"{name}.weight"]
            return round_norm(kind, layer, "weighted", weighted) if round_norm else weighted

        x = at("inp_embd", None, w["token_embd.weight"][list(tokens)])  # (n_tokens, n_embd)
        for layer in range(self.hparam("block_count")):
            blk = {name: w[f"blk.{layer}.{name}.weight"] for name in (
                "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}  # fmt: skip
            h = norm(x, "attn_norm", layer)
            q, k, v = (at(f"{c}_proj", layer, h @ blk[f"attn_{c}"].T) for c in "qkv")
            q = at("q", layer, rotate(q.reshape(n_tokens, n_head, head_dim), angles))
            k = at("k", layer, rotate(k.reshape(n_tokens, n_head_kv, head_dim), angles))
            v = at("v", layer, v.reshape(n_tokens, n_head_kv, head_dim))
            attended = np.empty_like(q)
            for head in range(n_head):
                shared = head // (n_head // n_head_kv)  # neighbouring heads share keys and values
                scores = q[:, head] @ k[:, shared].T / np.sqrt(head_dim)  # (n_tokens, n_tokens)
                scores[np.arange(n_tokens)[:, None] < np.arange(n_tokens)] = -np.inf
                p = np.exp(scores - scores.max(axis=-1, keepdims=True))
                attended[:, head] = p / p.sum(axis=-1, keepdims=True) @ v[:, shared]
            attended = at("kqv_out", layer, attended.reshape(n_tokens, n_head * head_dim))
            x = at("ffn_inp", layer, x + at("attn_out", layer, attended @ blk["attn_output"].T))
            h = norm(x, "ffn_norm", layer)
            gate = at("ffn_gate", layer, h @ blk["ffn_gate"].T)  # (n_tokens, n_ff)
            up = at("ffn_up", layer, h @ blk["ffn_up"].T)
            act = at("ffn_act", layer, gate * sigmoid(gate) * up)
            x = at("l_out", layer, x + at("ffn_out", layer, act @ blk["ffn_down"].T))
        x = norm(x, "output_norm", None)
        return x @ w.get("output.weight", w["token_embd.weight"]).T

    def angles(self, n_tokens: int, n_rot: int) -> Array:
        """(n_tokens, n_rot / 2)"""
        freq = float(self.hparam("rope.freq_base", 10000.0)) ** (-np.arange(0, n_rot, 2) / n_rot)
        freq = freq / self.weights.get("rope_freqs.weight", np.ones(n_rot // 2))
        if self.hparam("rope.scaling.type", "linear") == "linear":
            freq = freq / self.hparam("rope.scaling.factor", self.hparam("rope.scale_linear", 1.0))
        return np.arange(n_tokens)[:, None] * freq


def rotate(x: Array, angles: Array) -> Array:
    """x (n_tokens, n_head, head_dim): elements 2i and 2i + 1 turn by angle i, those past n_rot stay."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # (n_tokens, 1, n_rot / 2)
    n_rot = 2 * angles.shape[1]
    even, odd = x[..., 0:n_rot:2], x[..., 1:n_rot:2]
    out = x.copy()
    out[..., 0:n_rot:2] = even * cos - odd * sin
    out[..., 1:n_rot:2] = even * sin + odd * cos
    return out


def sigmoid(x: Array) -> Array:
    t = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1.0, t) / (1.0 + t)
