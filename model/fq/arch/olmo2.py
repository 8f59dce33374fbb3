"""olmo2: OLMo 2 and 3. Norms after the blocks alone; those of q and k go over all heads at once."""

from __future__ import annotations

from .builder import Architecture, Builder


def build(b: Builder) -> None:
    hp, keys = b.hp, b.keys
    # OLMo 3: a window in three of four layers, and there no longer context of RoPE
    window = keys.count("attention.sliding_window", 0, most=1 << 30, least=0)
    windows = keys.windows(hp.n_layer, window, period=4)
    rope = b.rope_attributes(neox=True)
    local = b.rope_attributes(neox=True, scaled=False)

    x = b.embedding()
    for il, window in enumerate(windows):
        q, k, v = b.qkv(x, il, normed=True)
        q = b.norm("q_norm", q, il, name="Qcur_normed", tensor="attn_q_norm")
        k = b.norm("k_norm", k, il, name="Kcur_normed", tensor="attn_k_norm")
        q, k = b.heads(q, k, il, local if window else rope)
        h = b.attention(q, k, v, il, window=window)
        h, x = b.wanted_rows(il, h, x)
        h = b.norm("attn_post_norm", h, il, tensor="post_attention_norm")
        x = b.add("ffn_inp", h, x, il)

        h = b.ffn(x, il)
        h = b.norm("ffn_post_norm", h, il, tensor="post_ffw_norm", norm_n=False)
        x = b.add("l_out", h, x, il)
    b.output(x)


ARCHITECTURE = Architecture(
    build, frozenset({"attention.sliding_window", "attention.sliding_window_pattern"}), norms="olmo2"
)
