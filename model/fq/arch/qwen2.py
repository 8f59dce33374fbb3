"""qwen2: Qwen2 and Qwen2.5. llama with biases of q, k and v, and the other pairing of RoPE."""

from __future__ import annotations

from .builder import Architecture, Builder


def build(b: Builder) -> None:
    rope = b.rope_attributes(neox=True)

    x = b.embedding()
    for il in range(b.hp.n_layer):
        h = b.norm("attn_norm", x, il)
        q, k, v = b.qkv(h, il)
        q, k = b.heads(q, k, il, rope)
        h = b.attention(q, k, v, il)
        h, x = b.wanted_rows(il, h, x)
        x = b.add("ffn_inp", h, x, il)

        h = b.norm("ffn_norm", x, il)
        h = b.ffn(h, il)
        x = b.add("l_out", h, x, il)
    b.output(x)


ARCHITECTURE = Architecture(build)
