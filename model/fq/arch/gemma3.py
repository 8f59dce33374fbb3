"""gemma3: Gemma 3. As Gemma 2, with norms of q and k, and five layers with a window to one without."""

from __future__ import annotations

import math

from .builder import Architecture, Builder
from .graph import Op

N_LAYER_27B = 62


def build(b: Builder) -> None:
    hp, keys = b.hp, b.keys
    window = keys.count("attention.sliding_window", 0, most=1 << 30, least=0)
    windows = keys.windows(hp.n_layer, window, period=6)
    local_base = keys.number("rope.freq_base_swa", 10000.0, 1.0, 1e12)
    final_cap = keys.cap("final_logit_softcapping")
    scale = 1 / math.sqrt(hp.n_embd // hp.n_head) if hp.n_layer == N_LAYER_27B else None

    rope = b.rope_attributes(neox=True)
    local = b.rope_attributes(neox=True, freq_base=local_base, scaled=False)

    x = b.embedding(scale=math.sqrt(hp.n_embd))
    for il, window in enumerate(windows):
        h = b.norm("attn_norm", x, il)
        q, k, v = b.qkv(h, il, normed=True)
        q, k = b.head_norms(q, k, il)
        q, k = b.heads(q, k, il, local if window else rope)
        h = b.attention(q, k, v, il, scale=scale, window=window)
        h, x = b.wanted_rows(il, h, x)
        h = b.norm("attn_post_norm", h, il, tensor="post_attention_norm")
        x = b.add("ffn_inp", h, x, il, name="sa_out")

        h = b.norm("ffn_norm", x, il)
        h = b.ffn(h, il, op=Op.GEGLU)
        h = b.norm("ffn_post_norm", h, il, tensor="post_ffw_norm", norm_n=False)
        x = b.add("l_out", h, x, il)
    b.output(x, soft_cap=final_cap)


ARCHITECTURE = Architecture(
    build,
    frozenset({
        "attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping",
        "rope.freq_base_swa",
    }),
    norms="gemma",
)  # fmt: skip
