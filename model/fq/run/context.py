"""Contexts: one sequence being evaluated, with its KV cache, rules and counters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fq_kernels import Executor, attention, default_fpu, rope
from fq_kernels.rules import FakeQuant, Rules, rules_text

from ..arch.graph import AttentionAttributes, Node, RopeAttributes
from ..arch.ops import OPS, last_reads
from ..errors import FqError
from .activations import ACTIVATIONS, Rounded, ggml_format, round_as_ggml
from .buffers import Buffers
from .kv_cache import KVCache
from .model import Model
from .rope import RopeTables
from .weights import Weight, can_share, mul_mat, mul_mats

if TYPE_CHECKING:
    from .trace import Trace


class Product(NamedTuple):
    """A product's weight, and those of the products of the same value right after it.

    They are computed with it: a thread's share of each alone is soon done, and the value is put into the
    kernel's order once.

    weights    its own first
    following  index and id of the others' nodes
    shared     whether the kernels take them all
    """

    weights: list[Weight]
    following: list[tuple[int, int]]
    shared: bool


def token_ids(tokens: Sequence[int] | np.ndarray, n_past: int, n_ctx: int, n_vocab: int) -> np.ndarray:
    """As an array. Raises FqError for what does not fit a context with n_past tokens, or the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not ids.size:
        raise FqError("no tokens to evaluate")
    if ids.dtype.kind not in "iu":
        raise FqError(f"token ids must be integers, not {ids.dtype}")
    if n_past + ids.size > n_ctx:
        raise FqError(f"{n_past + ids.size} tokens do not fit a context of {n_ctx}")
    if ids.min() < 0 or ids.max() >= n_vocab:
        raise FqError(f"token ids must be between 0 and {n_vocab - 1}")
    return ids


class Context:
    """One sequence being evaluated: the KV cache, the rules and their counters.

    n_ctx is the longest sequence in tokens. ``fake_quant`` may be given as a FakeQuant, as a rule,
    its text or several of either, and is a FakeQuant from then on; it may be replaced between
    two evaluations, for a while by ``under``, and so may ``trace``, which gets an event
    per node. ``activations`` "ggml" rounds the input of every matrix product as ggml does for
    the weight's type; "exact" leaves them float32. Not for use by two threads at once; several
    contexts of one model are.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        executor: Executor,
        fake_quant: FakeQuant | Rules | None = None,
        trace: Trace | None = None,
        activations: str = "exact",
    ) -> None:
        hp = model.hparams
        if activations not in ACTIVATIONS:
            raise FqError(f"activations must be {' or '.join(ACTIVATIONS)}, not {activations!r}")
        if not 0 < n_ctx <= hp.n_ctx_train:
            raise FqError(f"context of {n_ctx} tokens: the model allows 1 to {hp.n_ctx_train}")
        self.model = model
        self.n_ctx = n_ctx
        self.executor = executor
        self.fake_quant = self._fake_quant(() if fake_quant is None else fake_quant)
        self.trace = trace
        self.activations = activations
        self.on_node: Callable[[], None] = lambda: None  # called as each node is computed
        self.n_past = 0
        self.buffers = Buffers()
        self._cache = KVCache(hp.n_layer, hp.n_head_kv, n_ctx, hp.n_embd_head)
        self._rope_tables = RopeTables(n_ctx, model.vectors)
        # of each node: how it is computed, from whose values, and whose nothing reads after it
        self._steps = [
            (node, OPS[node.op].compute, node.inputs, reads)
            for node, reads in zip(model.graph.nodes, last_reads(model.graph), strict=True)
        ]
        self._sizes = (0, 0)  # n_tokens and n_outputs that the free memory fits
        # the last rounded input of a product: the node it came from, the format, the values
        self._input: tuple[int, str, Rounded] | None = None
        self._decoding = False
        self._products = _products_of(model)
        self._ready: dict[int, np.ndarray] = {}
        # norms that read a node's value before all else, which is no norm's
        found = model.graph.read_first_by_norms()
        self._first_readers = {id(source): norm for norm, source in found.items()}
        self._nodes_read_first = found
        self._nodes = range(0)
        self.ids: np.ndarray = np.empty(0, np.int64)
        self.out_rows = slice(0, 0)

    def __repr__(self) -> str:
        return (
            f"<Context of {os.path.basename(self.model.path)}: {self.n_past} of {self.n_ctx} tokens, "
            f"{self.executor}, {self.activations} activations, rules {rules_text(self.fake_quant.rules)}>"
        )

    def _fake_quant(self, rules: FakeQuant | Rules) -> FakeQuant:
        if not isinstance(rules, FakeQuant):
            try:
                return FakeQuant(self.model.values, rules)
            except ValueError as e:
                raise FqError(str(e)) from None
        if rules.values != self.model.values:
            raise FqError(f"these rules are for a model with other sites than {self.model.path}")
        return rules

    @contextlib.contextmanager
    def under(self, rules: FakeQuant | Rules) -> Iterator[FakeQuant]:
        """Evaluate under other rules for the length of a ``with`` block; yields them, with their counters.

            with context.under("ffn_norm[5]=bf16") as fake_quant:
                logits = context.eval(tokens)
            print(fake_quant.as_dict()["sites"])

        rules is a rule, its text, several of either, or a FakeQuant, whose counters go on. The
        sequence goes on too. Raises FqError for a rule that cannot be read or matches no site.
        """
        before, self.fake_quant = self.fake_quant, self._fake_quant(rules)
        try:
            yield self.fake_quant
        finally:
            self.fake_quant = before

    def clear(self) -> None:
        """Forget the sequence; rules and counters stay."""
        self.n_past = 0

    def eval(
        self, tokens: Sequence[int] | np.ndarray, outputs: slice | None = None, *, decoding: bool = False
    ) -> np.ndarray:
        """Append ``tokens`` to the sequence and return logits, float32 (n_outputs, n_vocab).

        outputs   the tokens whose logits are wanted; None: the last one
        decoding  up to MATVEC_MAX_TOKENS tokens are evaluated in another order of summation, which is
                  faster. Else the logits have the same bits however a sequence is cut into evaluations

        Raises FqError if the context is full or a token is not in the vocabulary.
        """
        ids = token_ids(tokens, self.n_past, self.n_ctx, self.model.hparams.n_vocab)
        values: dict[int, np.ndarray] = {}  # of nodes that are still to be read
        out_rows = slice(ids.size - 1, ids.size) if outputs is None else outputs
        sizes = (ids.size, len(range(*out_rows.indices(ids.size))))
        if sizes != self._sizes:
            self.buffers.clear()
            self._sizes = sizes
        begin = perf_counter_ns()
        self.evaluate(range(len(self.model.graph.nodes)), values, ids, out_rows, decoding=decoding)
        if self.trace is not None:
            self.trace.evaluated(begin, *sizes, self.n_past)
        self.n_past += ids.size
        return values[len(self.model.graph.nodes) - 1]

    def evaluate(
        self,
        nodes: range,
        values: dict[int, np.ndarray],
        ids: np.ndarray,
        out_rows: slice,
        *,
        decoding: bool = False,
    ) -> None:
        """Compute consecutive nodes for the tokens ``ids`` at positions n_past and on.

        values    of nodes that are still to be read: those before, and then those after
        out_rows  the tokens whose logits are wanted
        decoding  as of `eval`
        """
        self.ids, self.out_rows, self._input, self._decoding = ids, out_rows, None, decoding
        self._nodes = nodes
        self._ready.clear()
        trace, rounds_values = self.trace, self.fake_quant.rounds_values
        # infinities and NaN are looked for in the logits
        with default_fpu(), np.errstate(all="ignore"):
            for i in nodes:
                node, compute, sources, reads = self._steps[i]
                inputs = [values[source] for source in sources]
                if trace is None and not rounds_values:
                    values[i] = compute(self, node, inputs)
                elif trace is None:
                    values[i] = self._compute(node, inputs)
                else:
                    values[i] = trace.call(
                        node, self.fake_quant, self._compute, inputs, rounds=self._rounded_behind(node)
                    )
                self.on_node()
                for source, free in reads:
                    value = values.pop(source)
                    if free:
                        self.buffers.give(value)

    def value_of(self, i: int, inputs: Sequence[np.ndarray], ids: np.ndarray, out_rows: slice) -> np.ndarray:
        """Node i's value alone, of the tokens ``ids`` from n_past on, in memory that nothing else gets.

        inputs  those of the node, whose memory it may take (`OpRow.reuses`)
        """
        self.ids, self.out_rows, self._input, self._decoding = ids, out_rows, None, False
        self._nodes = range(i, i + 1)
        with default_fpu(), np.errstate(all="ignore"):
            return self._compute(self.model.graph.nodes[i], inputs)

    def _compute(self, node: Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
        value = OPS[node.op].compute(self, node, inputs)
        if self.fake_quant.rounds_values:
            if not node.norm:  # norms round as they compute
                if node.values and not self._rounded_later(node):
                    self.fake_quant.round(node.values, value, self.executor)
            elif (source := self._rounded_behind(node)) is not None:
                self.fake_quant.round(source.values, inputs[0], self.executor)
        return value

    def _rounded_behind(self, node: Node) -> Node | None:
        """Whose value is rounded once this norm has read it."""
        unrounded = node.norm is not None and self.fake_quant.reads_unrounded(node.norm)
        return self._nodes_read_first.get(node.norm) if unrounded and node.norm is not None else None

    def _rounded_later(self, node: Node) -> bool:
        """Whether a norm reads its value first, and reads it unrounded."""
        reader = self._first_readers.get(id(node))
        return reader is not None and self.fake_quant.reads_unrounded(reader)

    # ---------------------------------------------------------------- arch.ops.Evaluation

    def buffer(self, rows: int, n: int) -> np.ndarray:
        return self.buffers.take(rows, n)

    def vector(self, name: str) -> np.ndarray:
        return self.model.vectors[name]

    def rows_of(self, name: str) -> np.ndarray:
        weight = self.model.weights[name]
        return weight.unpack(self.ids, self.buffers.take(self.ids.size, weight.n_in))

    def product(self, node: Node, x: np.ndarray) -> np.ndarray:
        out = self._ready.pop(id(node), None) if self._ready else None
        if out is None:
            out = self._product(node, x)
        if node.bias is not None:
            out += self.model.vectors[node.bias][slice(*(node.rows or (None,)))]
        return out

    def _product(self, node: Node, x: np.ndarray) -> np.ndarray:
        product = self._products[id(node)]
        if product.shared and self.activations == "exact" and self.trace is None:
            following = [identity for i, identity in product.following if i in self._nodes]
            weights = product.weights[: 1 + len(following)]
            outs = [self.buffers.take(len(x), w.n_out) for w in weights]
            mul_mats(x, weights, self.executor, outs, decoding=self._decoding)
            self._ready.update(zip(following, outs[1:], strict=True))
            return outs[0]
        weight = product.weights[0]
        read = x if self.activations == "exact" else self._as_ggml_rounds(x, node.inputs[0], weight)
        out = self.buffers.take(len(x), weight.n_out)
        return mul_mat(read, weight, self.executor, out, decoding=self._decoding)

    def rope(self, heads: np.ndarray, attributes: RopeAttributes) -> np.ndarray:
        now = slice(self.n_past, self.n_past + self.ids.size)
        cos, sin = self._rope_tables.at(attributes, now)
        return rope(heads, cos, sin, neox=attributes.neox, executor=self.executor)

    def attention(self, node: Node, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        assert node.layer is not None and isinstance(node.attributes, AttentionAttributes)
        return attention(
            q,
            k,
            v,
            self._cache.keys[node.layer],
            self._cache.values[node.layer],
            self.n_past,
            scale=node.attributes.scale,
            window=node.attributes.window,
            soft_cap=node.attributes.soft_cap,
            out=self.buffers.take(len(q), q[:1].size),
            decoding=self._decoding,
            executor=self.executor,
        )

    def _as_ggml_rounds(self, x: np.ndarray, source: int, weight: Weight) -> np.ndarray | Rounded:
        """The input x (n_tokens, n_in), node ``source``'s value; rounded once for all products with it."""
        fmt = ggml_format(weight.type)
        if fmt is None:
            return x
        if self._input is None or self._input[:2] != (source, fmt):
            if self._input is not None:
                self.buffers.give(self._input[2].values)
            rounded = round_as_ggml(x, fmt, self.buffers.take(*x.shape), self.executor)
            self._input = (source, fmt, rounded)
        return self._input[2]


def _products_of(model: Model) -> dict[int, Product]:
    """By the id of each product's node."""
    found = {}
    together = model.graph.products_following()
    for node in model.graph.nodes:
        if (following := together.get(id(node))) is None:
            continue
        weights = [model.weight_of(product) for product in (node, *(other for _, other in following))]
        others = [(i, id(other)) for i, other in following]
        found[id(node)] = Product(weights, others, all(map(can_share, weights)))
    return found
