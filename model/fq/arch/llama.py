"""The llama graph, straight down, with llama.cpp's node names."""

from __future__ import annotations

import math
from collections.abc import Container

from fq_kernels.rules import Place, Value

from .graph import N_OUTPUTS, N_TOKENS, AttentionAttributes, Graph, NormAttributes, Op, RopeAttributes, Shape
from .hparams import HParams

ROPE_FACTORS = "rope_freqs.weight"


def build_llama(hp: HParams, tensors: Container[str]) -> Graph:
    """The graph of one evaluation of n_tokens tokens, n_outputs of which give logits.

    tensors  names of those that the file has
    """
    g = Graph()
    embd: Shape = (N_TOKENS, hp.n_embd)
    n_q, n_kv = hp.n_head * hp.n_embd_head, hp.n_head_kv * hp.n_embd_head
    q_shape = (N_TOKENS, hp.n_head, hp.n_embd_head)
    kv_shape = (N_TOKENS, hp.n_head_kv, hp.n_embd_head)
    factors = ROPE_FACTORS if ROPE_FACTORS in tensors else None
    rope = RopeAttributes(hp.n_rot, hp.rope_freq_base, hp.rope_freq_scale, factors)
    attention = AttentionAttributes(hp.n_head, hp.n_head_kv, 1.0 / math.sqrt(hp.n_embd_head))

    def norm(name: str, kind: str, source: int, shape: Shape, il: int | None = None) -> int:
        tensor = kind if il is None else f"blk.{il}.{kind}"
        return g.add(
            name,
            Op.RMS_NORM,
            (source,),
            shape,
            layer=il,
            weight=f"{tensor}.weight",
            attributes=NormAttributes(hp.rms_eps),
            values=(Value(Place(kind, il), norm_n=il is not None),),
        )

    of_embd = (Value(Place("inp_embd")),)
    x = g.add("inp_embd", Op.GET_ROWS, (), embd, weight="token_embd.weight", values=of_embd)
    for il in range(hp.n_layer):

        def site(kind: str, rows: int = 1, *, duplicate: bool = False, il: int = il) -> Value:
            return Value(Place(kind, il), rows, duplicate=duplicate)

        def mul_mat(name: str, tensor: str, source: int, shape: Shape, *values: Value, il: int = il) -> int:
            weight = f"blk.{il}.{tensor}.weight"
            return g.add(name, Op.MUL_MAT, (source,), shape, layer=il, weight=weight, values=values)

        h = norm("attn_norm", "attn_norm", x, embd, il)
        q = mul_mat("Qcur", "attn_q", h, (N_TOKENS, n_q), site("q_proj"))
        of_q, of_k = (site("q", hp.n_head),), (site("k", hp.n_head_kv),)
        q = g.add("Qcur", Op.ROPE, (q,), q_shape, layer=il, attributes=rope, values=of_q)
        k = mul_mat("Kcur", "attn_k", h, (N_TOKENS, n_kv), site("k_proj"))
        k = g.add("Kcur", Op.ROPE, (k,), kv_shape, layer=il, attributes=rope, values=of_k)
        # nothing comes between v as projected and v in the cache but the cut into heads
        of_v = site("v_proj", duplicate=True), site("v", hp.n_head_kv)
        v = mul_mat("Vcur", "attn_v", h, (N_TOKENS, n_kv), *of_v)
        h = g.add(
            "kqv_out",
            Op.ATTENTION,
            (q, k, v),
            (N_TOKENS, n_q),
            layer=il,
            attributes=attention,
            values=(site("kqv_out"),),
        )
        h = mul_mat("attn_out", "attn_output", h, embd, site("attn_out"))
        if il == hp.n_layer - 1:
            # as in llama.cpp: from here on only the rows whose logits are wanted
            embd = (N_OUTPUTS, hp.n_embd)
            h = g.add("attn_out_rows", Op.OUT_ROWS, (h,), embd, layer=il)
            x = g.add("inpSA_rows", Op.OUT_ROWS, (x,), embd, layer=il)
        ffn_inp = g.add("ffn_inp", Op.ADD, (h, x), embd, layer=il, values=(site("ffn_inp"),))

        h = norm("ffn_norm", "ffn_norm", ffn_inp, embd, il)
        ff: Shape = (embd[0], hp.n_ff)
        gate = mul_mat("ffn_gate", "ffn_gate", h, ff, site("ffn_gate"))
        up = mul_mat("ffn_up", "ffn_up", h, ff, site("ffn_up"))
        h = g.add("ffn_swiglu", Op.SWIGLU, (gate, up), ff, layer=il, values=(site("ffn_act"),))
        h = mul_mat("ffn_out", "ffn_down", h, embd, site("ffn_out"))
        x = g.add("l_out", Op.ADD, (h, ffn_inp), embd, layer=il, values=(site("l_out"),))

    x = norm("result_norm", "output_norm", x, embd)
    output = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    g.add("result_output", Op.MUL_MAT, (x,), (N_OUTPUTS, hp.n_vocab), weight=output)
    return g
