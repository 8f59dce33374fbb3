"""smollm3: SmolLM3. llama without RoPE in every fourth layer, which no key of the file says."""

from __future__ import annotations

from .builder import Architecture, Builder

NO_ROPE_STEP = 4


def build(b: Builder) -> None:
    rope = b.rope_attributes(neox=False)

    x = b.embedding()
    for il in range(b.hp.n_layer):
        turned = (il + 1) % NO_ROPE_STEP != 0
        h = b.norm("attn_norm", x, il)
        q, k, v = b.qkv(h, il, turned=turned)
        q, k = b.heads(q, k, il, rope if turned else None)
        h = b.attention(q, k, v, il)
        h, x = b.wanted_rows(il, h, x)
        x = b.add("ffn_inp", h, x, il)

        h = b.norm("ffn_norm", x, il)
        h = b.ffn(h, il)
        x = b.add("l_out", h, x, il)
    b.output(x)


ARCHITECTURE = Architecture(build)
