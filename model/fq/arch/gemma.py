"""gemma: Gemma 1. The embedding is scaled, the FFN's activation is GELU."""

from __future__ import annotations

import math

from .builder import Architecture, Builder
from .graph import Op


def build(b: Builder) -> None:
    rope = b.rope_attributes(neox=True)

    x = b.embedding(scale=math.sqrt(b.hp.n_embd))
    for il in range(b.hp.n_layer):
        h = b.norm("attn_norm", x, il)
        q, k, v = b.qkv(h, il)
        q, k = b.heads(q, k, il, rope)
        h = b.attention(q, k, v, il)
        h, x = b.wanted_rows(il, h, x)
        x = b.add("ffn_inp", h, x, il, name="sa_out")

        h = b.norm("ffn_norm", x, il)
        h = b.ffn(h, il, op=Op.GEGLU)
        x = b.add("l_out", h, x, il)
    b.output(x)


ARCHITECTURE = Architecture(build, norms="gemma")
