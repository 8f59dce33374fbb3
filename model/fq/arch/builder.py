"""What graphs are built of: the parts that architectures share, with llama.cpp's names of nodes.

An architecture's file reads straight down: its own hyper-parameters, then a layer after the other. Sites are
named by role here, so that no tensor's or node's name has to mean the same in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from fq_kernels import log
from fq_kernels.rules import Place, Value

from .graph import (
    N_OUTPUTS,
    N_TOKENS,
    AttentionAttributes,
    Graph,
    NormAttributes,
    Op,
    RopeAttributes,
    ScaleAttributes,
    Shape,
    SoftCapAttributes,
    Yarn,
)
from .hparams import HParams
from .keys import Keys

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Architecture:
    """What an architecture's file says: its graph, and the keys that it reads itself, by what follows its
    name.

    norms  of which kind its norms are (fq_kernels.units.profiles.NORMS)
    """

    build: Callable[[Builder], None]
    keys: frozenset[str] = frozenset()
    norms: str = "llama"


@dataclass
class Builder:
    """The graph as it grows. Nodes are named by their index; ``il`` is a layer.

    tensors  names of those that the file has
    rows     of how many tokens the values have rows: of the outputs alone from the last layer's residual on
    """

    hp: HParams
    keys: Keys
    tensors: Container[str]
    graph: Graph = field(default_factory=Graph)
    rows: str = N_TOKENS

    def embedding(self, scale: float = 1.0) -> int:
        """Of the tokens, times a scale: the value inp_embd is what enters the first layer."""
        shape, values = (N_TOKENS, self.hp.n_embd), (Value(Place("inp_embd")),)
        embd, scaled = "token_embd.weight", scale != 1.0
        x = self.graph.add("inp_embd", Op.GET_ROWS, (), shape, weight=embd, values=() if scaled else values)
        return self.scaled("inp_scaled", x, scale, *values) if scaled else x

    def scaled(self, name: str, source: int, factor: float, *values: Value, il: int | None = None) -> int:
        """Times a factor, in the source's memory: no other node may read that. By 1: the source itself."""
        if factor == 1.0:
            return source
        shape = self.graph.nodes[source].shape
        return self.graph.add(
            name, Op.SCALE, (source,), shape, layer=il, attributes=ScaleAttributes(factor), values=values
        )

    def norm(
        self,
        kind: str,
        source: int,
        il: int | None = None,
        *,
        name: str | None = None,
        tensor: str | None = None,
        n_head: int = 0,
        norm_n: bool = True,
    ) -> int:
        """RMS norm and its weight.

        kind    its role
        name    the node's, where it is not the role
        tensor  where it is not the role
        n_head  of a norm that each head passes alone
        norm_n  whether llama.cpp calls it, before the weight, norm-N: all of a layer that are built with it
        """
        stem = tensor or kind
        shape = self.graph.nodes[source].shape
        if n_head:
            shape = (shape[0], n_head, self.hp.n_embd_head)
        place = Place(kind, il)
        return self.graph.add(
            name or kind,
            Op.RMS_NORM,
            (source,),
            shape,
            layer=il,
            weight=f"{stem}.weight" if il is None else f"blk.{il}.{stem}.weight",
            attributes=NormAttributes(self.hp.rms_eps),
            values=(Value(place, n_head or 1, norm_n=norm_n and il is not None),),
        )

    def product(
        self,
        name: str,
        tensor: str,
        source: int,
        n_out: int,
        il: int,
        *values: Value,
        first_row: int | None = None,
    ) -> int:
        """With a layer's weight, and its bias if there is one; with first_row, with n_out rows of a weight
        that several share."""
        stem = f"blk.{il}.{tensor}"
        bias = f"{stem}.bias"
        return self.graph.add(
            name,
            Op.MUL_MAT,
            (source,),
            (self.graph.nodes[source].shape[0], n_out),
            layer=il,
            weight=f"{stem}.weight",
            values=values,
            rows=None if first_row is None else (first_row, first_row + n_out),
            bias=bias if bias in self.tensors else None,
        )

    def qkv(self, source: int, il: int, *, turned: bool = True, normed: bool = False) -> tuple[int, int, int]:
        """Projections, from three weights or from one that holds them all. v is cut into heads as it is.

        turned, normed  whether something comes between q or k as projected and as attention takes it
        """
        hp = self.hp
        n_q, n_kv = hp.n_head * hp.n_embd_head, hp.n_head_kv * hp.n_embd_head
        fused = f"blk.{il}.attn_qkv.weight" in self.tensors
        found, row = [], 0
        for letter, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            same = letter == "v" or not (turned or normed)
            values = [Value(Place(f"{letter}_proj", il), duplicate=same)]
            if letter == "v":
                values.append(Value(Place("v", il), hp.n_head_kv))
            tensor = "attn_qkv" if fused else f"attn_{letter}"
            first = row if fused else None
            found.append(
                self.product(f"{letter.upper()}cur", tensor, source, n_out, il, *values, first_row=first)
            )
            row += n_out
        return found[0], found[1], found[2]

    def head_norms(self, q: int, k: int, il: int) -> tuple[int, int]:
        """Of each head of q and k."""
        hp = self.hp
        return (
            self.norm("q_norm", q, il, name="Qcur_normed", tensor="attn_q_norm", n_head=hp.n_head),
            self.norm("k_norm", k, il, name="Kcur_normed", tensor="attn_k_norm", n_head=hp.n_head_kv),
        )

    def rope_attributes(
        self, *, neox: bool, freq_base: float | None = None, scaled: bool = True, factors: bool = False
    ) -> RopeAttributes:
        """Of the hyper-parameters. Raises ModelError for a base that YaRN cannot take.

        freq_base  rope.freq_base_swa's, of layers that have it
        scaled     False: as if the context had not been made longer
        factors    whether the file's, if it has some, divide the angles
        """
        hp = self.hp
        base = hp.rope_freq_base if freq_base is None else freq_base
        tensor = ROPE_FACTORS if factors and ROPE_FACTORS in self.tensors else None
        if not scaled:
            return RopeAttributes(hp.n_rot, base, factors=tensor, neox=neox)
        yarn, magnitude = None, hp.rope_attn_factor
        if hp.yarn_mix:
            if base <= 1:
                key = "rope.freq_base" if freq_base is None else "rope.freq_base_swa"
                raise self.keys.fail(f"{self.keys.prefix}{key} is {base}; YaRN needs one above 1")
            yarn = Yarn(hp.n_ctx_orig, hp.yarn_beta_fast, hp.yarn_beta_slow, hp.yarn_mix)
            magnitude *= max(1.0, 1.0 - 0.1 * log(hp.rope_freq_scale))
        return RopeAttributes(
            hp.n_rot, base, hp.rope_freq_scale, tensor, neox, magnitude=magnitude, yarn=yarn
        )

    def heads(self, q: int, k: int, il: int, rope: RopeAttributes | None) -> tuple[int, int]:
        """q and k as attention takes them: cut into heads and turned; rope None: cut alone."""
        hp, found = self.hp, []
        for letter, source, n_head in (("q", q, hp.n_head), ("k", k, hp.n_head_kv)):
            found.append(
                self.graph.add(
                    f"{letter.upper()}cur",
                    Op.HEADS if rope is None else Op.ROPE,
                    (source,),
                    (N_TOKENS, n_head, hp.n_embd_head),
                    layer=il,
                    attributes=rope,
                    values=(Value(Place(letter, il), n_head),),
                )
            )
        return found[0], found[1]

    def attention(
        self,
        q: int,
        k: int,
        v: int,
        il: int,
        *,
        scale: float | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> int:
        """And its output's product. scale None: 1 / sqrt(head)."""
        hp = self.hp
        scale = 1.0 / math.sqrt(hp.n_embd_head) if scale is None else scale
        attended = self.graph.add(
            "kqv_out",
            Op.ATTENTION,
            (q, k, v),
            (N_TOKENS, hp.n_head * hp.n_embd_head),
            layer=il,
            attributes=AttentionAttributes(hp.n_head, hp.n_head_kv, scale, window, soft_cap),
            values=(Value(Place("kqv_out", il)),),
        )
        return self.product("attn_out", "attn_output", attended, hp.n_embd, il, Value(Place("attn_out", il)))

    def wanted_rows(self, il: int, h: int, x: int) -> tuple[int, int]:
        """In the last layer, as in llama.cpp: from here on only the rows whose logits are wanted."""
        if il < self.hp.n_layer - 1:
            return h, x
        self.rows, shape = N_OUTPUTS, (N_OUTPUTS, self.hp.n_embd)
        h = self.graph.add("attn_out_rows", Op.OUT_ROWS, (h,), shape, layer=il)
        return h, self.graph.add("inpSA_rows", Op.OUT_ROWS, (x,), shape, layer=il)

    def add(self, kind: str, h: int, x: int, il: int, *, name: str | None = None) -> int:
        """To the residual x; kind is the role of the sum."""
        shape = (self.rows, self.hp.n_embd)
        return self.graph.add(name or kind, Op.ADD, (h, x), shape, layer=il, values=(Value(Place(kind, il)),))

    def ffn(self, source: int, il: int, *, op: Op = Op.SWIGLU, fused: bool = False) -> int:
        """Gate, up and down; fused: gate and up are one weight, ffn_up."""
        hp = self.hp
        ff: Shape = (self.rows, hp.n_ff)
        of_gate, of_up, of_act = (Value(Place(kind, il)) for kind in ("ffn_gate", "ffn_up", "ffn_act"))
        if fused:
            gate = self.product("ffn_gate", "ffn_up", source, hp.n_ff, il, of_gate, first_row=0)
            up = self.product("ffn_up", "ffn_up", source, hp.n_ff, il, of_up, first_row=hp.n_ff)
        else:
            gate = self.product("ffn_gate", "ffn_gate", source, hp.n_ff, il, of_gate)
            up = self.product("ffn_up", "ffn_up", source, hp.n_ff, il, of_up)
        name = f"ffn_{op.name.lower()}"
        h = self.graph.add(name, op, (gate, up), ff, layer=il, values=(of_act,))
        return self.product("ffn_out", "ffn_down", h, hp.n_embd, il, Value(Place("ffn_out", il)))

    def output(self, x: int, *, scale: float = 1.0, soft_cap: float = 0.0) -> None:
        """The last norm and the logits; without a matrix of their own by the embedding's."""
        x = self.norm("output_norm", x, name="result_norm")
        weight = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        bias = "output.bias" if "output.bias" in self.tensors else None
        shape = (N_OUTPUTS, self.hp.n_vocab)
        last = scale == 1.0 and not soft_cap
        name = "result_output" if last else "result_product"
        x = self.graph.add(name, Op.MUL_MAT, (x,), shape, weight=weight, bias=bias)
        if soft_cap:
            x = self.scaled("result_scaled", x, scale)
            self.graph.add("result_output", Op.SOFT_CAP, (x,), shape, attributes=SoftCapAttributes(soft_cap))
        else:
            self.scaled("result_output", x, scale)
