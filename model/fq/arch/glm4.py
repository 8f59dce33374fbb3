"""glm4: GLM-4-0414. Norms before and after each block; gate and up are one weight."""

from __future__ import annotations

from .builder import Architecture, Builder


def build(b: Builder) -> None:
    rope = b.rope_attributes(neox=False)

    x = b.embedding()
    for il in range(b.hp.n_layer):
        h = b.norm("attn_norm", x, il)
        q, k, v = b.qkv(h, il)
        q, k = b.heads(q, k, il, rope)
        h = b.attention(q, k, v, il)
        h, x = b.wanted_rows(il, h, x)
        h = b.norm("attn_post_norm", h, il, name="post_attn_norm", tensor="post_attention_norm")
        x = b.add("ffn_inp", h, x, il)

        h = b.norm("ffn_norm", x, il)
        h = b.ffn(h, il, fused=True)
        h = b.norm("ffn_post_norm", h, il, name="post_mlp_norm", tensor="post_ffw_norm")
        x = b.add("l_out", h, x, il)
    b.output(x)


ARCHITECTURE = Architecture(build)
