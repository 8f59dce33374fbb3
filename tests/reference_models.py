"""Forward passes in float64, straight from what the architectures are, without any code of the product."""

from __future__ import annotations

import math
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

NEOX = {"qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "exaone4"}
PERIODS = {"gemma2": 2, "gemma3": 6, "olmo2": 4}


class ReferenceModel:
    """The whole model, unpacked."""

    def __init__(self, path: str | os.PathLike[str], n_ctx: int = 512) -> None:
        reader = GGUFReader(path)
        self.meta = {name: field.contents() for name, field in reader.fields.items()}
        self.arch = self.meta["general.architecture"]
        self.n_ctx = n_ctx
        self.weights: dict[str, Array] = {
            t.name: np.array(dequantize(t.data, t.tensor_type), np.float64) for t in reader.tensors
        }

    def hparam(self, key: str, default: Any = None) -> Any:
        return self.meta.get(f"{self.arch}.{key}", default)

    def windows(self) -> list[int]:
        n_layer, window = self.hparam("block_count"), self.hparam("attention.sliding_window", 0)
        period = PERIODS.get(self.arch)
        if self.arch == "exaone4" and n_layer == 64:
            window, period = window or 4096, 4
        if period is None:
            return [0] * n_layer
        if self.arch == "gemma2":
            window = window or 4096
        pattern = self.hparam("attention.sliding_window_pattern", period)
        if not isinstance(pattern, int):
            return [window * bool(flag) for flag in pattern]
        return [window if (il + 1) % pattern else 0 for il in range(n_layer)]

    def logits(
        self, tokens: Sequence[int], round_norm: RoundNorm | None = None, at: RoundValue | None = None
    ) -> Array:
        """Logits of every token, (n_tokens, n_vocab)."""
        at = at or (lambda kind, layer, values: values)
        arch, w, n = self.arch, self.weights, len(tokens)
        n_embd, n_layer = self.hparam("embedding_length"), self.hparam("block_count")
        n_head = self.hparam("attention.head_count")
        n_head_kv = self.hparam("attention.head_count_kv", n_head)
        head_dim = self.hparam("attention.key_length", n_embd // n_head)
        gemma = arch.startswith("gemma")
        windows = self.windows()

        def norm(x: Array, kind: str, layer: int | None, tensor: str | None = None) -> Array:
            tensor = tensor or kind
            weight = w[f"{tensor}.weight" if layer is None else f"blk.{layer}.{tensor}.weight"]
            if round_norm:
                x = round_norm(kind, layer, "in", x)
            raw = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.hparam(
                "attention.layer_norm_rms_epsilon"))  # fmt: skip
            raw = round_norm(kind, layer, "raw", raw) if round_norm else raw
            weighted = raw * weight
            return round_norm(kind, layer, "weighted", weighted) if round_norm else weighted

        def product(x: Array, layer: int, name: str) -> Array:
            stem = f"blk.{layer}.{name}"
            return x @ w[f"{stem}.weight"].T + w.get(f"{stem}.bias", 0.0)

        x = w["token_embd.weight"][list(tokens)]  # (n, n_embd)
        if gemma:
            x = x * math.sqrt(n_embd)
        x = at("inp_embd", None, x * (self.hparam("embedding_scale", 0.0) or 1.0))
        residual = self.hparam("residual_scale", 0.0) or 1.0
        for il in range(n_layer):
            h = norm(x, "attn_norm", il) if f"blk.{il}.attn_norm.weight" in w else x
            if f"blk.{il}.attn_qkv.weight" in w:
                n_q, n_kv = n_head * head_dim, n_head_kv * head_dim
                q, k, v = np.split(product(h, il, "attn_qkv"), [n_q, n_q + n_kv], axis=1)
            else:
                q, k, v = (product(h, il, f"attn_{letter}") for letter in "qkv")
            q, k, v = (
                at(f"{letter}_proj", il, value) for letter, value in zip("qkv", (q, k, v), strict=True)
            )
            if arch == "olmo2":
                q, k = (norm(value, f"{c}_norm", il, f"attn_{c}_norm") for c, value in (("q", q), ("k", k)))
            q, k, v = (value.reshape(n, -1, head_dim) for value in (q, k, v))
            if f"blk.{il}.attn_q_norm.weight" in w and arch != "olmo2":
                q, k = (norm(value, f"{c}_norm", il, f"attn_{c}_norm") for c, value in (("q", q), ("k", k)))
            if self.turns(il, windows):
                angles, magnitude = self.angles(n, windows[il])
                q, k = (self.rotate(value, angles, magnitude) for value in (q, k))
            q, k, v = at("q", il, q), at("k", il, k), at("v", il, v)

            scale = self.hparam("attention.scale", 0.0) or 1 / math.sqrt(head_dim)
            cap = self.hparam("attn_logit_softcapping", 50.0) if arch == "gemma2" else 0.0
            past = np.arange(n)[:, None] - np.arange(n)  # how far back a key is
            hidden = (past < 0) | ((past >= windows[il]) if windows[il] else False)
            attended = np.empty((n, n_head, head_dim))
            for head in range(n_head):
                shared = head // (n_head // n_head_kv)  # neighbouring heads share keys and values
                scores = q[:, head] @ k[:, shared].T * scale
                scores = cap * np.tanh(scores / cap) if cap else scores
                scores[hidden] = -np.inf
                p = np.exp(scores - scores.max(axis=-1, keepdims=True))
                attended[:, head] = p / p.sum(axis=-1, keepdims=True) @ v[:, shared]
            attended = at("kqv_out", il, attended.reshape(n, n_head * head_dim))
            h = at("attn_out", il, product(attended, il, "attn_output"))
            if f"blk.{il}.post_attention_norm.weight" in w:
                h = norm(h, "attn_post_norm", il, "post_attention_norm")
            x = at("ffn_inp", il, x + residual * h)

            h = norm(x, "ffn_norm", il) if f"blk.{il}.ffn_norm.weight" in w else x
            if f"blk.{il}.ffn_gate.weight" in w:
                gate, up = product(h, il, "ffn_gate"), product(h, il, "ffn_up")
            else:
                gate, up = np.split(product(h, il, "ffn_up"), 2, axis=1)
            gate, up = at("ffn_gate", il, gate), at("ffn_up", il, up)
            act = gelu(gate) if gemma else gate * sigmoid(gate)
            h = at("ffn_out", il, product(at("ffn_act", il, act * up), il, "ffn_down"))
            if f"blk.{il}.post_ffw_norm.weight" in w:
                h = norm(h, "ffn_post_norm", il, "post_ffw_norm")
            x = at("l_out", il, x + residual * h)
        x = norm(x, "output_norm", None)
        logits = (
            x @ w.get("output.weight", w["token_embd.weight"]).T / (self.hparam("logit_scale", 0.0) or 1.0)
        )
        cap = self.hparam("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0)
        return cap * np.tanh(logits / cap) if cap else logits

    def turns(self, il: int, windows: list[int]) -> bool:
        """Whether the layer has RoPE."""
        if self.arch == "smollm3":
            return (il + 1) % 4 != 0
        if self.arch == "granite":
            return bool(self.hparam("rope.scaling.finetuned", True))
        return not (self.arch == "exaone4" and any(windows)) or bool(windows[il])

    def angles(self, n_tokens: int, window: int) -> tuple[Array, float]:
        """((n_tokens, n_rot / 2), what the turned values are multiplied by) of a layer with this window."""
        head = self.hparam("embedding_length") // self.hparam("attention.head_count")
        n_rot = self.hparam("rope.dimension_count", self.hparam("attention.key_length", head))
        base = float(self.hparam("rope.freq_base", 10000.0))
        local = bool(window)
        if local and self.arch.startswith("gemma"):
            default = 10000.0 if self.arch == "gemma3" else base
            base = float(self.hparam("rope.freq_base_swa", default))
        freq = base ** (-np.arange(0, n_rot, 2) / n_rot)
        magnitude = self.hparam("rope.scaling.attn_factor", 1.0)
        n_ctx_orig = self.hparam("rope.scaling.original_context_length", self.hparam("context_length"))
        length = "long" if self.n_ctx > n_ctx_orig else "short"
        for name in ("rope_freqs.weight", f"rope_factors_{length}.weight"):
            freq = freq / self.weights.get(name, 1.0)
        if local and self.arch in ("gemma3", "olmo2"):
            return np.arange(n_tokens)[:, None] * freq, magnitude
        kind = self.hparam("rope.scaling.type", "linear")
        factor = 1.0 if kind == "none" else self.hparam(
            "rope.scaling.factor", self.hparam("rope.scale_linear", 1.0))  # fmt: skip
        if kind == "yarn":
            pair = [n_rot * math.log(n_ctx_orig / (b * 2 * math.pi)) / (2 * math.log(base)) for b in (32, 1)]
            low, high = max(0, math.floor(pair[0])), min(n_rot - 1, math.ceil(pair[1]))
            stretched = np.clip((np.arange(n_rot // 2) - low) / max(0.001, high - low), 0, 1)
            freq = freq * (1 - stretched) + freq / factor * stretched
            magnitude *= 1 + 0.1 * math.log(factor)
        else:
            freq = freq / factor
        return np.arange(n_tokens)[:, None] * freq, magnitude

    def rotate(self, x: Array, angles: Array, magnitude: float) -> Array:
        """x (n_tokens, n_head, head_dim): pairs turn by their angles, elements past n_rot stay."""
        cos, sin = (magnitude * f(angles)[:, None] for f in (np.cos, np.sin))  # (n_tokens, 1, n_rot / 2)
        n_rot = 2 * angles.shape[1]
        if self.arch in NEOX:
            first, second = slice(0, n_rot // 2), slice(n_rot // 2, n_rot)
        else:
            first, second = slice(0, n_rot, 2), slice(1, n_rot, 2)
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: Array) -> Array:
    t = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1.0, t) / (1.0 + t)
