"""The llama graph, straight down, with llama.cpp's node names."""

from __future__ import annotations

import numpy as np

from fq_kernels.rules import Norm

from .gguf_file import GGUFFile
from .graph import N_OUTPUTS, N_TOKENS, Graph, Op
from .hparams import HParams, ModelError

ROPE_FACTORS = "rope_freqs.weight"


def build_llama(hp: HParams, *, tied_output: bool) -> Graph:
    """The graph of one evaluation of n_tokens tokens, n_outputs of which give logits."""
    g = Graph()
    embd: tuple[str, int] = (N_TOKENS, hp.n_embd)
    n_q, n_kv = hp.n_head * hp.n_embd_head, hp.n_head_kv * hp.n_embd_head
    q_shape = (N_TOKENS, hp.n_head, hp.n_embd_head)
    kv_shape = (N_TOKENS, hp.n_head_kv, hp.n_embd_head)

    x = g.add("inp_embd", Op.GET_ROWS, (), embd, weight="token_embd.weight")
    for il in range(hp.n_layer):

        def mul_mat(name: str, tensor: str, source: int, shape: tuple[int | str, ...], il: int = il) -> int:
            return g.add(name, Op.MUL_MAT, (source,), shape, layer=il, weight=f"blk.{il}.{tensor}.weight")

        h = g.add(
            "attn_norm",
            Op.RMS_NORM,
            (x,),
            embd,
            layer=il,
            weight=f"blk.{il}.attn_norm.weight",
            norm=Norm("attn_norm", il),
        )
        q = mul_mat("Qcur", "attn_q", h, (N_TOKENS, n_q))
        q = g.add("Qcur", Op.ROPE, (q,), q_shape, layer=il)
        k = mul_mat("Kcur", "attn_k", h, (N_TOKENS, n_kv))
        k = g.add("Kcur", Op.ROPE, (k,), kv_shape, layer=il)
        v = mul_mat("Vcur", "attn_v", h, (N_TOKENS, n_kv))
        h = g.add("kqv_out", Op.ATTENTION, (q, k, v), (N_TOKENS, n_q), layer=il)
        h = mul_mat("attn_out", "attn_output", h, embd)
        if il == hp.n_layer - 1:
            # as in llama.cpp: from here on only the rows whose logits are wanted
            embd = (N_OUTPUTS, hp.n_embd)
            h = g.add("attn_out_rows", Op.OUT_ROWS, (h,), embd, layer=il)
            x = g.add("inpSA_rows", Op.OUT_ROWS, (x,), embd, layer=il)
        ffn_inp = g.add("ffn_inp", Op.ADD, (h, x), embd, layer=il)

        h = g.add(
            "ffn_norm",
            Op.RMS_NORM,
            (ffn_inp,),
            embd,
            layer=il,
            weight=f"blk.{il}.ffn_norm.weight",
            norm=Norm("ffn_norm", il),
        )
        gate = mul_mat("ffn_gate", "ffn_gate", h, (embd[0], hp.n_ff))
        up = mul_mat("ffn_up", "ffn_up", h, (embd[0], hp.n_ff))
        h = g.add("ffn_swiglu", Op.SWIGLU, (gate, up), (embd[0], hp.n_ff), layer=il)
        h = mul_mat("ffn_out", "ffn_down", h, embd)
        x = g.add("l_out", Op.ADD, (h, ffn_inp), embd, layer=il)

    x = g.add(
        "result_norm", Op.RMS_NORM, (x,), embd, weight="output_norm.weight", norm=Norm("output_norm", None)
    )
    g.add(
        "result_output",
        Op.MUL_MAT,
        (x,),
        (N_OUTPUTS, hp.n_vocab),
        weight="token_embd.weight" if tied_output else "output.weight",
    )
    return g


def check_tensors(file: GGUFFile, hp: HParams, graph: Graph) -> None:
    """Every weight of the graph is there with its shape, and no tensor is left over.

    Raises ModelError naming the tensor. A tensor that the graph does not use (a bias, say)
    is refused: the result without it would be wrong.
    """
    used = {ROPE_FACTORS}
    for node in graph.nodes:
        if node.weight is None:
            continue
        used.add(node.weight)
        info = file.tensors.get(node.weight)
        if info is None:
            raise ModelError(f"{file.path}: tensor {node.weight} is missing")
        if node.op is Op.GET_ROWS:
            want: tuple[int | str, ...] = (hp.n_vocab, hp.n_embd)
        elif node.op is Op.RMS_NORM:
            want = (hp.n_embd,)
        else:
            want = (node.shape[-1], graph.nodes[node.inputs[0]].shape[-1])
        if info.shape != want:
            raise ModelError(f"{file.path}: tensor {node.weight} has shape {info.shape}, not {want}")
        if node.op is Op.RMS_NORM and info.type.name != "F32":
            raise ModelError(f"{file.path}: tensor {node.weight} has type {info.type.name}, not F32")
    if ROPE_FACTORS in file.tensors:
        info = file.tensors[ROPE_FACTORS]
        if info.shape != (hp.n_rot // 2,) or info.type.name != "F32":
            raise ModelError(f"{file.path}: tensor {ROPE_FACTORS} must be F32 of shape {(hp.n_rot // 2,)}")
        factors = np.frombuffer(file.tensor(ROPE_FACTORS), np.float32)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ModelError(f"{file.path}: tensor {ROPE_FACTORS} must hold positive finite numbers")
    for name in file.tensors:
        if name not in used:
            raise ModelError(f"{file.path}: tensor {name} is not one that the llama graph uses")
