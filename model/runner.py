"""Runs the graph: a model (weights in the mapped file) and contexts (KV cache, rules, counters)."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from fq_kernels import (
    ATTENTION_MAX_DIM,
    MATVEC_MAX_TOKENS,
    Executor,
    attention,
    causal_exp,
    default_fpu,
    has_mul_mat,
    rope,
    swiglu,
)
from fq_kernels.rules import FakeQuant, Norm, Rules, rules_text

from .activations import ACTIVATIONS, Rounded, ggml_format, round_as_ggml
from .errors import FqError
from .gguf_file import GGUFFile
from .graph import Graph, Node, Op
from .hparams import HParams, ModelError, read_hparams
from .llama import ROPE_FACTORS, build_llama, check_tensors
from .tokenizer import Tokenizer
from .weights import Weight, blas_threads, can_unpack, mul_mat

if TYPE_CHECKING:
    from .trace import Trace

# Tokens per task of attention by BLAS: enough to pay for the hand-out.
ATTENTION_ROWS = 64


class Model:
    """A GGUF file of llama architecture, checked and ready to run. The weights stay packed in the file.

    Raises GGUFError or ModelError naming what is wrong with the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = GGUFFile(path)
        try:
            self.hparams: HParams = read_hparams(self.file)
            self.graph: Graph = build_llama(
                self.hparams, tied_output="output.weight" not in self.file.tensors
            )
            check_tensors(self.file, self.hparams, self.graph)
            self.weights: dict[str, Weight] = {}
            self.vectors: dict[str, np.ndarray] = {}
            for name, info in self.file.tensors.items():
                packed = self.file.tensor(name)
                if len(info.shape) == 1:
                    # a copy: in the file it may not be aligned
                    self.vectors[name] = np.frombuffer(packed, np.float32).copy()
                elif can_unpack(info.type):
                    self.weights[name] = Weight(packed, info.type, info.shape[1])
                else:
                    raise ModelError(f"{self.path}: cannot unpack tensor {name} of type {info.type.name}")
        except BaseException:
            self.file.close()
            raise

    def __repr__(self) -> str:
        hp = self.hparams
        return (
            f"<Model {os.path.basename(self.path)}: llama, {hp.n_layer} layers, n_embd {hp.n_embd}, "
            f"{hp.n_vocab} tokens>"
        )

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def norms(self) -> list[Norm]:
        return self.graph.norms

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built at first use. Raises TokenizerError."""
        tokenizer = Tokenizer.from_metadata(self.file.metadata)
        if tokenizer.n_vocab != self.hparams.n_vocab:
            raise ModelError(
                f"{self.path}: {tokenizer.n_vocab} tokens in the vocabulary, "
                f"{self.hparams.n_vocab} rows in token_embd.weight"
            )
        return tokenizer


class Context:
    """One sequence being evaluated: the KV cache, the rules and their counters.

    n_ctx is the longest sequence in tokens. ``rules`` may be given as a FakeQuant, as a rule,
    its text or several of either, and is a FakeQuant from then on; it may be replaced between
    two evaluations, for a while by ``fake_quant``, and so may ``trace``, which gets an event
    per node. ``activations`` "ggml" rounds the input of every matrix product as ggml does for
    the weight's type; "exact" leaves them float32. Not for use by two threads at once; several
    contexts of one model are.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        executor: Executor,
        rules: FakeQuant | Rules | None = None,
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
        self.rules = self._rules(() if rules is None else rules)
        self.trace = trace
        self.activations = activations
        self.on_node: Callable[[], None] = lambda: None  # called as each node is computed
        self.n_past = 0
        kv_shape = (hp.n_layer, hp.n_head_kv, n_ctx, hp.n_embd_head)
        self._k = _pages(kv_shape)
        self._v = _pages(kv_shape)
        self._cos, self._sin = np.empty((2, 0, hp.n_rot // 2), np.float32)
        self._ends = model.graph.last_uses()
        self._free: dict[tuple[int, ...], list[np.ndarray]] = {}
        self._sizes = (0, 0)  # n_tokens and n_outputs that the free memory fits
        # the last rounded input of a product: the node it came from, the format, the values
        self._input: tuple[int, str, Rounded] | None = None

    def __repr__(self) -> str:
        return (
            f"<Context of {os.path.basename(self.model.path)}: {self.n_past} of {self.n_ctx} tokens, "
            f"{self.executor}, {self.activations} activations, rules {rules_text(self.rules.rules)}>"
        )

    def _rules(self, rules: FakeQuant | Rules) -> FakeQuant:
        if not isinstance(rules, FakeQuant):
            try:
                return FakeQuant(self.model.norms, rules)
            except ValueError as e:
                raise FqError(str(e)) from None
        if rules.norms != tuple(self.model.norms):
            raise FqError(f"these rules are for a model with other norms than {self.model.path}")
        return rules

    @contextlib.contextmanager
    def fake_quant(self, rules: FakeQuant | Rules) -> Iterator[FakeQuant]:
        """Evaluate under other rules for the length of a ``with`` block; yields them, with their counters.

            with context.fake_quant("ffn_norm[5]=bf16") as fq:
                logits = context.eval(tokens)
            print(fq.as_dict()["sites"])

        rules is a rule, its text, several of either, or a FakeQuant, whose counters go on. The
        sequence goes on too. Raises FqError for a rule that cannot be read or matches no site.
        """
        before, self.rules = self.rules, self._rules(rules)
        try:
            yield self.rules
        finally:
            self.rules = before

    def clear(self) -> None:
        """Forget the sequence; rules and counters stay."""
        self.n_past = 0

    def eval(self, tokens: Sequence[int] | np.ndarray, outputs: slice | None = None) -> np.ndarray:
        """Append ``tokens`` to the sequence and return logits, float32 (n_outputs, n_vocab).

        outputs picks the tokens whose logits are wanted; None: the last one. Raises FqError
        if the context is full or a token is not in the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size:
            raise FqError("no tokens to evaluate")
        if ids.dtype.kind not in "iu":
            raise FqError(f"token ids must be integers, not {ids.dtype}")
        if self.n_past + ids.size > self.n_ctx:
            raise FqError(f"{self.n_past + ids.size} tokens do not fit a context of {self.n_ctx}")
        if ids.min() < 0 or ids.max() >= self.model.hparams.n_vocab:
            raise FqError(f"token ids must be between 0 and {self.model.hparams.n_vocab - 1}")
        values: dict[int, np.ndarray] = {}  # of nodes that are still to be read
        out_rows = slice(ids.size - 1, ids.size) if outputs is None else outputs
        sizes = (ids.size, len(range(*out_rows.indices(ids.size))))
        if sizes != self._sizes:
            self._free.clear()
            self._sizes = sizes
        begin = perf_counter_ns()
        with blas_threads.single():
            self._run(range(len(self.model.graph.nodes)), values, ids, out_rows)
        if self.trace is not None:
            self.trace.evaluated(begin, *sizes, self.n_past)
        self.n_past += ids.size
        return values[len(self.model.graph.nodes) - 1]

    def _run(self, nodes: range, values: dict[int, np.ndarray], ids: np.ndarray, out_rows: slice) -> None:
        """Compute consecutive nodes; ``values`` are those still to be read: before, and then after."""
        self._input = None
        trace = self.trace
        # infinities and NaN are looked for in the logits
        with default_fpu(), np.errstate(all="ignore"):
            for i in nodes:
                node = self.model.graph.nodes[i]
                inputs = [values[source] for source in node.inputs]
                if trace is None:
                    values[i] = self._compute(node, inputs, ids, out_rows)
                else:
                    values[i] = trace.call(node, self.rules, self._compute, inputs, ids, out_rows)
                self.on_node()
                for source in self._ends[i]:
                    self._release(values, source)

    def _compute(self, node: Node, inputs: list, ids: np.ndarray, out_rows: slice) -> np.ndarray:
        weights, executor = self.model.weights, self.executor
        if node.op is Op.GET_ROWS:
            assert node.weight is not None
            weight = weights[node.weight]
            return weight.unpack(ids, self._buffer((ids.size, weight.n_in)))
        x = inputs[0]
        if node.op is Op.RMS_NORM:
            assert node.norm is not None and node.weight is not None
            return self.rules.rms_norm(
                node.norm,
                x,
                eps=self.model.hparams.rms_eps,
                weight=self.model.vectors[node.weight],
                out=self._input_buffer(*x.shape),
                executor=executor,
            )
        if node.op is Op.MUL_MAT:
            assert node.weight is not None
            weight = weights[node.weight]
            if self.activations == "ggml":
                x = self._as_ggml_rounds(x, node.inputs[0], weight)
            return mul_mat(x, weight, executor, self._buffer((inputs[0].shape[0], weight.n_out)))
        if node.op is Op.ADD:
            return np.add(x, inputs[1], out=self._buffer(x.shape))
        if node.op is Op.ROPE:
            now = slice(self.n_past, self.n_past + ids.size)
            if now.stop > len(self._cos):
                # of the positions up to twice as far, so that they are seldom made again
                factors = self.model.vectors.get(ROPE_FACTORS)
                n_positions = min(self.n_ctx, 2 * now.stop)
                self._cos, self._sin = _rope_tables(self.model.hparams, n_positions, factors)
            heads = x.reshape(x.shape[0], -1, self.model.hparams.n_embd_head)
            return rope(heads, self._cos[now], self._sin[now], executor=executor)
        if node.op is Op.ATTENTION:
            assert node.layer is not None
            return self._attention(node.layer, *inputs)
        if node.op is Op.SWIGLU:
            return swiglu(x, inputs[1], executor=executor)
        assert node.op is Op.OUT_ROWS
        return x[out_rows]

    def _as_ggml_rounds(self, x: np.ndarray, source: int, weight: Weight) -> np.ndarray | Rounded:
        """The input x (n_tokens, n_in), node ``source``'s value; rounded once for all products with it."""
        fmt = ggml_format(weight.type)
        if fmt is None:
            return x
        if self._input is None or self._input[:2] != (source, fmt):
            if self._input is not None:
                before = self._input[2].values
                self._free.setdefault(before.shape, []).append(before)
            rounded = round_as_ggml(x, fmt, self._buffer(x.shape), self.executor)
            self._input = (source, fmt, rounded)
        return self._input[2]

    def _attention(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """q (n_tokens, n_head, d), k and v (n_tokens, n_head_kv * d) -> (n_tokens, n_head * d)."""
        n_tokens, n_head, d = q.shape
        keys, values = self._k[layer], self._v[layer]
        k, v = k.reshape(n_tokens, -1, d), v.reshape(n_tokens, -1, d)
        out = self._input_buffer(n_tokens, n_head * d)
        if n_tokens > MATVEC_MAX_TOKENS and not (has_mul_mat() and d <= ATTENTION_MAX_DIM):
            return self._attention_by_blas(q, k, v, keys, values, out)
        return attention(q, k, v, keys, values, self.n_past, out=out, executor=self.executor)

    def _attention_by_blas(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        out: np.ndarray,
    ) -> np.ndarray:
        """As fq_kernels.attention, where that has no kernel for many tokens."""
        n_tokens, n_head, d = q.shape
        n_past, n_head_kv = self.n_past, len(keys)
        group = n_head // n_head_kv
        now = slice(n_past, n_past + n_tokens)
        keys[:, now] = k.transpose(1, 0, 2)
        values[:, now] = v.transpose(1, 0, 2)
        heads = q.reshape(n_tokens, n_head_kv, group, d)
        out_heads = out.reshape(n_tokens, n_head_kv, group, d)
        scale = np.float32(1.0 / np.sqrt(d))
        n_blocks = -(-n_tokens // ATTENTION_ROWS)

        def attend(task: int) -> None:
            # the last blocks see the most keys: first, so that no thread is left with one
            block, head = divmod(task, n_head_kv)
            begin = (n_blocks - 1 - block) * ATTENTION_ROWS
            end = min(begin + ATTENTION_ROWS, n_tokens)
            n_kv = n_past + end
            block_q = heads[begin:end, head].transpose(1, 0, 2) * scale  # (group, rows, d)
            with np.errstate(all="ignore"):  # each thread has its own
                # the heads of a group as more rows: one product rather than several
                p = np.matmul(block_q.reshape(-1, d), keys[head, :n_kv].T)  # (group * rows, n_kv)
                sums = causal_exp(p.reshape(group, end - begin, n_kv), n_past + begin + 1)
                attended = np.matmul(p, values[head, :n_kv]).reshape(block_q.shape)
                attended /= sums[:, :, None]
            out_heads[begin:end, head] = attended.transpose(1, 0, 2)

        self.executor.map(attend, n_blocks * n_head_kv)
        return out

    def _buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uninitialised float32; memory is used again, as fresh pages cost more than the arithmetic."""
        free = self._free.get(shape)
        return free.pop() if free else np.empty(shape, np.float32)

    def _input_buffer(self, rows: int, n: int) -> np.ndarray:
        """As _buffer, for a product: rows a multiple of 4096 bytes apart would share cache lines."""
        gap = 16 if rows > MATVEC_MAX_TOKENS and 4 * n % 4096 == 0 else 0
        return self._buffer((rows, n + gap))[:, :n]

    def _release(self, values: dict[int, np.ndarray], i: int) -> None:
        """Give back node i's memory unless another live value shares it."""
        array = values.pop(i)
        owner = array if array.base is None else array.base
        if not isinstance(owner, np.ndarray) or owner.base is not None:
            return
        for other in values.values():
            if other is owner or other.base is owner:
                return
        if owner.dtype == np.float32 and owner.flags.c_contiguous and owner.ndim == 2:
            self._free.setdefault(owner.shape, []).append(owner)


def _pages(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, float32, whose memory is taken as they are written to, by the smallest page.

    numpy asks for pages of 2 MB, which for the keys of many heads, each a stretch of its own, would
    be all of the cache from the first token on. It begins at a page, so at a cache line: attention at
    one token reads it at full width. Raises MemoryError.
    """
    try:
        memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise MemoryError(f"no room for an array of shape {shape}") from None
    with contextlib.suppress(OSError, AttributeError):  # where there are no other pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


def _rope_tables(hp: HParams, n: int, factors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the first n positions' angles, float32 (n, n_rot / 2)."""
    freq = hp.rope_freq_base ** (-np.arange(0, hp.n_rot, 2, dtype=np.float64) / hp.n_rot)
    freq *= hp.rope_freq_scale
    if factors is not None:
        freq /= factors
    angles = np.arange(n, dtype=np.float64)[:, None] * freq
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
