"""exaone4: EXAONE 4. Norms of q and k and after the blocks.

The 32B has windows in three of four layers, and RoPE in those alone.
"""

from __future__ import annotations

from .builder import Architecture, Builder

N_LAYER_32B = 64


def build(b: Builder) -> None:
    hp, keys = b.hp, b.keys
    windows = [0] * hp.n_layer
    if hp.n_layer == N_LAYER_32B:
        window = keys.count("attention.sliding_window", 4096, most=1 << 30)
        windows = keys.windows(hp.n_layer, window, period=4)
    rope = b.rope_attributes(neox=True, factors=True)

    x = b.embedding()
    for il, window in enumerate(windows):
        q, k, v = b.qkv(x, il, normed=True)
        q, k = b.head_norms(q, k, il)
        q, k = b.heads(q, k, il, rope if window or not any(windows) else None)
        h = b.attention(q, k, v, il, window=window)
        h, x = b.wanted_rows(il, h, x)
        h = b.norm("attn_post_norm", h, il, tensor="post_attention_norm")
        x = b.add("ffn_inp", h, x, il)

        h = b.ffn(x, il)
        h = b.norm("ffn_post_norm", h, il, tensor="post_ffw_norm", norm_n=False)
        x = b.add("l_out", h, x, il)
    b.output(x)


ARCHITECTURE = Architecture(
    build, frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
)
