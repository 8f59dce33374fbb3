"""phi3: Phi-3 and Phi-4. q, k and v are one weight, gate and up another.

RoPE's factors go by the context's length. Their window is passed over, as in llama.cpp.
"""

from __future__ import annotations

from .builder import LONG_FACTORS, SHORT_FACTORS, Architecture, Builder


def build(b: Builder) -> None:
    rope = b.rope_attributes(neox=True)
    if LONG_FACTORS in b.tensors:
        rope = rope._replace(factors=SHORT_FACTORS, long_factors=LONG_FACTORS, n_ctx_orig=b.hp.n_ctx_orig)

    x = b.embedding()
    for il in range(b.hp.n_layer):
        h = b.norm("attn_norm", x, il)
        q, k, v = b.qkv(h, il)
        q, k = b.heads(q, k, il, rope)
        h = b.attention(q, k, v, il)
        h, x = b.wanted_rows(il, h, x)
        x = b.add("ffn_inp", h, x, il)

        h = b.norm("ffn_norm", x, il)
        h = b.ffn(h, il, fused=True)
        x = b.add("l_out", h, x, il)
    b.output(x)


ARCHITECTURE = Architecture(build, frozenset({"attention.sliding_window"}))
