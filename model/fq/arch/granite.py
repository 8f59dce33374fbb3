"""granite: Granite 3 and 4, dense. llama with scales of the embedding, the residual, attention and logits."""

from __future__ import annotations

from .builder import Architecture, Builder


def build(b: Builder) -> None:
    keys = b.keys
    embedding, residual = keys.scale("embedding_scale"), keys.scale("residual_scale")
    attention = keys.number("attention.scale", 0.0, 0.0, 1e3) or None
    logits = keys.number("logit_scale", None, 1e-6, 1e6)
    # named as if it said how the weights came to be; to llama.cpp's granite it is whether there is RoPE
    turned = keys.flag("rope.scaling.finetuned", True)
    rope = b.rope_attributes(neox=False, factors=True) if turned else None

    x = b.embedding(scale=embedding)
    for il in range(b.hp.n_layer):
        h = b.norm("attn_norm", x, il)
        q, k, v = b.qkv(h, il, turned=turned)
        q, k = b.heads(q, k, il, rope)
        h = b.attention(q, k, v, il, scale=attention)
        h, x = b.wanted_rows(il, h, x)
        h = b.scaled("attn_out_scaled", h, residual, il=il)
        x = b.add("ffn_inp", h, x, il)

        h = b.norm("ffn_norm", x, il)
        h = b.ffn(h, il)
        h = b.scaled("ffn_out_scaled", h, residual, il=il)
        x = b.add("l_out", h, x, il)
    b.output(x, scale=1.0 / logits)


ARCHITECTURE = Architecture(
    build,
    frozenset(
        {
            "embedding_scale",
            "residual_scale",
            "attention.scale",
            "logit_scale",
            "rope.scaling.finetuned",
        }
    ),
)
