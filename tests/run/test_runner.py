"""The graph, the checks on a model file, and the runner: against a float64 reference and against itself."""

from __future__ import annotations

import mmap
import threading
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from reference_models import ReferenceModel
from weight_blocks import random_matrix

from fq.arch.builder import Builder
from fq.arch.graph import N_OUTPUTS, N_TOKENS, Graph, Op
from fq.arch.hparams import HParams
from fq.arch.keys import Keys, ModelError
from fq.arch.llama import build
from fq.arch.ops import last_reads
from fq.arch.registry import unknown_keys
from fq.errors import FqError
from fq.gguf.synthetic import tiny_shape, write_llama_gguf
from fq.gguf.types import GGML_TYPES
from fq.run import context as context_module
from fq.run.context import Context
from fq.run.kv_cache import pages
from fq.run.model import Model
from fq.run.trace import Trace
from fq.run.weights import Weight, can_unpack
from fq_kernels import MATVEC_MAX_TOKENS, Executor, bf16_round_trip, rms_norm_f32
from fq_kernels.rules import FakeQuant, Place, Rule, Site

# Largest |difference| over largest |logit|. Float32 arithmetic leaves about 1e-6; eps forgotten or the
# rope base off by a hundredth, the smallest mistakes tried, leave 5e-4.
RTOL = 5e-6

SMALL = {"n_embd": 64, "n_head": 4, "n_head_kv": 2, "n_ff": 96, "n_vocab": 512, "n_ctx_train": 400}
ALL = slice(None)

Write = Callable[..., Path]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def some_tokens(n: int, seed: int = 1, n_vocab: int = 512) -> list[int]:
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def rewrite(
    source: Path,
    target: Path,
    *,
    meta: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    arch: str = "llama",
    alignment: int | None = None,
) -> Path:
    """Copy a file without its vocabulary. `meta` replaces or adds keys, `tensors` arrays or
    (bytes, type) pairs; None drops one."""
    meta, tensors = meta or {}, tensors or {}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    kept = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "tokenizer.", "general.architecture"))
    }
    for key, value in (kept | meta).items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    data: dict[str, Any] = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    for name, value in (data | tensors).items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        elif value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """write(mix=, tied_output=, rope_factors=, **sizes) -> path; each file is written once."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def write(mix: str = "F32", tied_output: bool = False, rope_factors: Any = None, **sizes: int) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.gguf"
        shape = tiny_shape(**(sizes if mix == "Q4_K_M" else SMALL | sizes))  # Q4_K has rows of 256
        write_llama_gguf(path, shape, mix=mix, tied_output=tied_output, rope_factors=rope_factors)
        return path

    return write


@pytest.fixture
def small(write: Write) -> Model:
    """Two layers, F32."""
    return Model(write())


@pytest.fixture(scope="module")
def executor() -> Any:
    with Executor(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def one_thread() -> Any:
    with Executor(1) as executor:
        yield executor


def new_context(model: Model, executor: Executor, rules: Any = None) -> Context:
    return Context(model, model.hparams.n_ctx_train, executor, rules)


# ---------------------------------------------------------------- the graph

HPARAMS = HParams(arch="llama", n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_embd_head=24, n_rot=16,
                  n_ff=96, n_vocab=512, n_ctx_train=400, rope_freq_base=1e4, rope_freq_scale=1.0,
                  rms_eps=1e-5)  # fmt: skip


def layer_names(il: int, last: bool) -> list[str]:
    """llama.cpp's names, except for the two that it leaves to the backend (``*_rows``)."""
    names = ["attn_norm", "Qcur", "Kcur", "Vcur", "Qcur", "Kcur", "kqv_out", "attn_out"]
    if last:
        names += ["attn_out_rows", "inpSA_rows"]
    names += ["ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out", "l_out"]
    return [f"{name}-{il}" for name in names]


@pytest.fixture(params=[False, True], ids=["separate", "tied"])
def graph(request: pytest.FixtureRequest) -> Graph:
    keys = Keys(SimpleNamespace(path="", metadata={"general.architecture": "llama"}))
    builder = Builder(HPARAMS, keys, [] if request.param else ["output.weight"])
    build(builder)
    return builder.graph


def test_graph_names_are_llama_cpps(graph: Graph) -> None:
    names = [node.name for node in graph.nodes]
    assert names == [
        "inp_embd", *layer_names(0, False), *layer_names(1, True), "result_norm", "result_output"
    ]  # fmt: skip


def test_graph_norms_and_sites(graph: Graph) -> None:
    norms = [Place(kind, il) for il in (0, 1) for kind in ("attn_norm", "ffn_norm")]
    assert graph.norms == [*norms, Place("output_norm", None)]
    for node in graph.nodes:
        assert (node.norm is not None) == (node.op is Op.RMS_NORM)
        if node.norm:
            kind, layer = node.norm
            assert node.name == ("result_norm" if layer is None else f"{kind}-{layer}")
            assert node.layer == layer
            assert [site.point for site in node.sites] == ["in", "raw", "weighted"]
        else:
            assert all(site.point is None and site.place.layer == node.layer for site in node.sites)
    of_layer = ["q_proj", "k_proj", "v_proj", "v", "q", "k", "kqv_out", "attn_out", "ffn_inp"]
    of_layer += ["ffn_gate", "ffn_up", "ffn_act", "ffn_out", "l_out"]
    others = [Place("inp_embd"), *(Place(kind, il) for il in (0, 1) for kind in of_layer)]
    assert [value.place for value in graph.values if not value.is_norm] == others
    rows = {value.place.kind: value.rows for value in graph.values if value.rows != 1}
    assert rows == {"q": HPARAMS.n_head, "k": HPARAMS.n_head_kv, "v": HPARAMS.n_head_kv}
    assert {value.place.kind for value in graph.values if value.norm_n} == {"attn_norm", "ffn_norm"}
    assert {value.place.kind for value in graph.values if value.duplicate} == {"v_proj"}


def test_graph_reads_each_weight_once(graph: Graph) -> None:
    weights = [node.weight for node in graph.nodes if node.weight]
    tied = graph.nodes[-1].weight == "token_embd.weight"
    assert len(set(weights)) == len(weights) - tied == 1 + 2 * 9 + 1 + (not tied)
    for node in graph.nodes:
        if node.weight and node.layer is not None:
            assert node.weight.startswith(f"blk.{node.layer}.")


def test_graph_inputs_are_earlier_and_all_used(graph: Graph) -> None:
    for i, node in enumerate(graph.nodes):
        assert all(0 <= source < i for source in node.inputs)
        assert (node.op is Op.GET_ROWS) == (not node.inputs)
    used = {source for node in graph.nodes for source in node.inputs}
    assert used == set(range(len(graph.nodes) - 1))


def test_graph_shapes_agree(graph: Graph) -> None:
    width = {Op.ROPE: 2, Op.ATTENTION: 2}  # axes that flatten to the row

    def row(i: int) -> int:
        return int(np.prod(graph.nodes[i].shape[1:]))

    for i, node in enumerate(graph.nodes):
        sources = [graph.nodes[source] for source in node.inputs]
        if node.op is Op.OUT_ROWS:
            assert (sources[0].shape[0], node.shape[0]) == (N_TOKENS, N_OUTPUTS)
        else:
            assert all(source.shape[0] == node.shape[0] for source in sources)
        if node.op in (Op.RMS_NORM, Op.ADD, Op.SWIGLU):
            assert all(source.shape == node.shape for source in sources)
        if node.op in width:
            assert row(node.inputs[0]) == row(i)
    assert graph.nodes[-1].shape == (N_OUTPUTS, HPARAMS.n_vocab)
    assert {node.shape[0] for node in graph.nodes if node.name.endswith("-0")} == {N_TOKENS}


def test_graph_frees_each_value_once_after_its_last_reader(graph: Graph) -> None:
    ends = graph.last_uses()
    freed = [source for sources in ends for source in sources]
    assert sorted(freed) == list(range(len(graph.nodes) - 1))  # the result is the caller's
    for i, sources in enumerate(ends):
        for source in sources:
            assert source in graph.nodes[i].inputs
            assert not any(source in later.inputs for later in graph.nodes[i + 1 :])


def test_memory_is_free_when_the_last_value_in_it_has_been_read(write: Write, executor: Executor) -> None:
    """As told from the graph alone, beside the arrays of an evaluation."""
    context = new_context(Model(write("Q8_0")), executor)
    nodes, reads = context.model.graph.nodes, last_reads(context.model.graph)
    assert [[source for source, _ in now] for now in reads] == [
        list(ends) for ends in context.model.graph.last_uses()
    ]
    values: dict[int, np.ndarray] = {}
    ids, seen = np.arange(3), 0
    for i in range(len(nodes) - 1):
        read = {source: values[source] for source in nodes[i].inputs}
        context.evaluate(range(i, i + 1), values, ids, slice(0, 3))
        for k, (source, free) in enumerate(reads[i], 1):
            left = [*values.values(), *(read[later] for later, _ in reads[i][k:])]
            assert free is not any(np.may_share_memory(read[source], other) for other in left), nodes[i].name
            seen += free
    assert seen > len(nodes) / 2


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("tied", [False, True], ids=["separate", "tied"])
@pytest.mark.parametrize("mix", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M"])
def test_logits_equal_the_reference(write: Write, executor: Executor, mix: str, tied: bool) -> None:
    path = write(mix, tied)
    tokens = some_tokens(12)
    logits = new_context(Model(path), executor).eval(tokens, ALL)
    assert logits.dtype == np.float32
    assert distance(logits, ReferenceModel(path).logits(tokens)) < RTOL


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_head": 4, "n_head_kv": 4},  # MHA
        {"n_head": 4, "n_head_kv": 1},  # MQA
        {"n_head": 8, "n_head_kv": 2, "n_ff": 128},
        {"n_head": 1, "n_head_kv": 1},
        {"n_head": 2, "n_head_kv": 1, "n_layer": 1},  # the first layer is the last
        {"n_layer": 5},
        {"n_embd": 256, "n_vocab": 1100},  # several panels of the output matrix, the last one short
    ],
    ids=lambda sizes: "-".join(f"{key}{value}" for key, value in sizes.items()),
)
@pytest.mark.parametrize("n_tokens", [5, 20], ids=["few", "many"])
def test_shapes(write: Write, executor: Executor, sizes: dict[str, int], n_tokens: int) -> None:
    path = write(**sizes)
    tokens = some_tokens(n_tokens)
    logits = new_context(Model(path), executor).eval(tokens, ALL)
    assert distance(logits, ReferenceModel(path).logits(tokens)) < RTOL


KEY_LENGTH_24 = {
    f"blk.{il}.{name}.weight": shape
    for il in (0, 1)
    for name, shape in {
        "attn_q": (4 * 24, 64), "attn_k": (2 * 24, 64), "attn_v": (2 * 24, 64), "attn_output": (64, 4 * 24)
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(
    "meta",
    [
        {"llama.rope.dimension_count": 12},  # n_rot < head_dim
        {"llama.rope.dimension_count": 2},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},  # llama.cpp takes it for linear
        {"llama.rope.scale_linear": 4.0},  # the older key
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.freq_base": 1e6},
        {"llama.rope.freq_base": None},
        {"llama.attention.layer_norm_rms_epsilon": 0.25},
        {"llama.attention.key_length": 24, "llama.attention.value_length": 24,
         "llama.rope.dimension_count": 16},  # n_embd != n_head * head_dim
    ],
    ids=lambda meta: ",".join(f"{key.removeprefix('llama.')}={value}" for key, value in meta.items()),
)  # fmt: skip
def test_metadata_that_changes_the_result(
    write: Write, executor: Executor, tmp_path: Path, meta: dict[str, Any]
) -> None:
    tensors = {}
    if "llama.attention.key_length" in meta:
        rng = np.random.default_rng(2)
        tensors = {
            name: rng.standard_normal(shape, np.float32) / np.float32(8)
            for name, shape in KEY_LENGTH_24.items()
        }
    plain = write(n_head=4)
    path = rewrite(plain, tmp_path / "m.gguf", meta=meta, tensors=tensors)
    tokens = some_tokens(40)
    expected = ReferenceModel(path).logits(tokens)
    assert distance(new_context(Model(path), executor).eval(tokens, ALL), expected) < RTOL
    if meta not in ({"llama.rope.freq_base": None}, {"llama.rope.scaling.type": "none"}):
        changed = distance(expected, ReferenceModel(plain).logits(tokens))
        assert (changed > 1e-3) == (meta.get("llama.rope.scaling.type") != "none")


def test_rope_factors(write: Write, executor: Executor) -> None:
    factors = (1.0, 1.5, 2.0, 4.0, 8.0, 0.5, 32.0, 32.0)
    path = write(rope_factors=factors)
    tokens = some_tokens(40)
    logits = new_context(Model(path), executor).eval(tokens, ALL)
    assert distance(logits, ReferenceModel(path).logits(tokens)) < RTOL
    assert distance(logits, ReferenceModel(write()).logits(tokens)) > 1e-3


def test_long_prompts_and_a_full_context(write: Write, executor: Executor) -> None:
    """More rows and keys than attention takes at a time, with and without a past."""
    model, tokens, cut = Model(write()), some_tokens(400), 90
    context = new_context(model, executor)
    logits = np.concatenate([context.eval(tokens[:cut], ALL), context.eval(tokens[cut:], ALL)])
    assert distance(logits, ReferenceModel(write()).logits(tokens)) < RTOL


def test_large_scores_and_gates_do_not_overflow(write: Write, executor: Executor, tmp_path: Path) -> None:
    """exp of the largest score or of -gate is beyond float32 here."""
    weights = ReferenceModel(write()).weights
    tensors = {
        name: (weights[name] * factor).astype(np.float32)
        for name, factor in (("blk.0.attn_q.weight", 300), ("blk.0.ffn_gate.weight", 200))
    }
    path = rewrite(write(), tmp_path / "m.gguf", tensors=tensors)
    tokens = some_tokens(20)
    logits = new_context(Model(path), executor).eval(tokens, ALL)
    # scores of 1e3 carry an error of 1e-4 into exp
    assert distance(logits, ReferenceModel(path).logits(tokens)) < 1e-4


@pytest.mark.parametrize("name", [t.name for t in GGML_TYPES.values() if can_unpack(t)])
def test_every_weight_type(write: Write, tmp_path: Path, name: str) -> None:
    """All matrices of one type: a prompt of one token, of few, and of many go different ways."""
    plain = write(n_layer=1, n_embd=256, n_ff=512, n_vocab=530)
    type_ = gguf.GGMLQuantizationType[name]
    tensors = {
        t.name: (random_matrix(name, *t.shape[::-1].tolist(), seed=i), type_)
        for i, t in enumerate(gguf.GGUFReader(plain).tensors)
        if len(t.shape) == 2
    }
    path = rewrite(plain, tmp_path / "m.gguf", tensors=tensors)
    reference, model = ReferenceModel(path), Model(path)
    prompts = [some_tokens(n, seed=n, n_vocab=530) for n in (1, 5, 40)]
    results = []
    for threads in (1, 2, 3, 7):
        with Executor(threads) as executor:
            results.append([new_context(model, executor).eval(tokens, ALL) for tokens in prompts])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    with Executor(2) as executor:
        decoded = [new_context(model, executor).eval(tokens, ALL, decoding=True) for tokens in prompts]
    for tokens, logits in zip([*prompts, *prompts], [*results[0], *decoded], strict=True):
        expected = reference.logits(tokens)
        assert 1 < np.abs(expected).max() < 20  # so that what follows is 4e-4 at most
        assert distance(logits, expected) < 4 * RTOL  # sums over groups of weights of one sign cancel


def test_tensors_need_no_alignment(write: Write, executor: Executor, tmp_path: Path) -> None:
    """With general.alignment 1 a float tensor may start at any byte."""
    # the length of some key decides where
    paths = [rewrite(write(), tmp_path / f"{n}.gguf", alignment=1, meta={"x" * n: 1}) for n in range(1, 5)]
    model = Model(next(path for path in paths if odd_start(path)))
    tokens = some_tokens(12)
    expected = new_context(Model(write()), executor).eval(tokens, ALL)
    assert same_bits(new_context(model, executor).eval(tokens, ALL), expected)


def odd_start(path: Path) -> bool:
    return any(t.data_offset % 4 for t in gguf.GGUFReader(path).tensors)


# ---------------------------------------------------------------- sequences and buffers


def test_pieces_give_the_logits_of_the_whole(write: Write, executor: Executor) -> None:
    model, tokens = Model(write("Q8_0")), some_tokens(30)
    whole = new_context(model, executor).eval(tokens, ALL)
    # one at a time, the most that matvec takes, one more than that, and a mixture
    few, many = MATVEC_MAX_TOKENS, MATVEC_MAX_TOKENS + 1
    for sizes in ([1] * 30, [few] * 3 + [30 - 3 * few], [many] * 3 + [30 - 3 * many], [20, 1, 9]):
        context = new_context(model, executor)
        ends = np.cumsum(sizes)
        pieces = [context.eval(tokens[end - size : end], ALL) for size, end in zip(sizes, ends, strict=True)]
        assert context.n_past == 30
        assert same_bits(np.concatenate(pieces), whole), sizes


@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("mix", ["Q8_0", "Q4_K_M"])
def test_products_together_or_each_alone(
    write: Write, executor: Executor, tmp_path: Path, mix: str, decoding: bool
) -> None:
    """A trace times each product alone."""
    model, tokens = Model(write(mix)), some_tokens(5)
    together = new_context(model, executor).eval(tokens, ALL, decoding=decoding)
    with Trace(tmp_path / "trace.json", {}) as trace:
        alone = Context(model, 64, executor, trace=trace).eval(tokens, ALL, decoding=decoding)
    assert same_bits(together, alone)
    nodes = model.graph.nodes
    q = next(node for node in nodes if node.name == "Qcur-0")
    following = model.graph.products_following()[id(q)]
    assert [nodes[i] for i, _ in following] == [node for _, node in following]
    assert [node.name for _, node in following] == ["Kcur-0", "Vcur-0"]


def test_products_are_together_as_far_as_they_are_wanted(
    write: Write, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's baseline stops where a variant leaves it, in the midst of q, k and v perhaps."""
    context = new_context(Model(write("Q8_0")), executor)
    first = next(i for i, node in enumerate(context.model.graph.nodes) if node.name == "Qcur-0")
    made = []

    def mul_mats(x: np.ndarray, weights: list[Weight], *args: Any, **options: Any) -> None:
        made.append(len(weights))
        real(x, weights, *args, **options)

    real = context_module.mul_mats
    monkeypatch.setattr(context_module, "mul_mats", mul_mats)
    whole: dict[int, np.ndarray] = {}
    pieces: dict[int, np.ndarray] = {}
    ids = np.arange(3)
    context.evaluate(range(first + 3), whole, ids, slice(0, 3))
    for nodes in (range(first + 2), range(first + 2, first + 3)):
        context.evaluate(nodes, pieces, ids, slice(0, 3))
    assert made == [3, 2, 1]
    assert whole.keys() == pieces.keys() and all(same_bits(whole[i], pieces[i]) for i in whole)


def test_products_of_other_values_are_not_together() -> None:
    graph = Graph()
    for source in (0, 0, 1, 1, 0):
        graph.add(f"of-{source}", Op.MUL_MAT, (source,), (N_TOKENS, 8))
    following = graph.products_following()
    assert [[i for i, _ in following[id(node)]] for node in graph.nodes] == [[1], [], [3], [], []]


@pytest.mark.parametrize("mix", ["Q8_0", "Q4_K_M"])
def test_same_bits_on_any_number_of_threads(write: Write, mix: str) -> None:
    model = Model(write(mix))
    results = []
    for threads in (1, 2, 3):
        with Executor(threads) as executor:
            context = new_context(model, executor)
            results.append([context.eval(some_tokens(n, seed=n), ALL) for n in (150, 1, 5, 70)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_same_bits_again_whatever_ran_before(write: Write, executor: Executor) -> None:
    """Memory is used again between evaluations; nothing of an earlier one may show."""
    model, n = Model(write("Q8_0")), (12, 1, 3, 70)
    first = {k: new_context(model, executor).eval(some_tokens(k, seed=k), ALL) for k in n}
    context = new_context(model, executor)
    for k in (12, 12, 1, 1, 70, 3, 12, 70, 1, 3, 3, 12):
        context.clear()
        assert same_bits(context.eval(some_tokens(k, seed=k), ALL), first[k]), k


def test_logits_stay_the_callers(small: Model, executor: Executor) -> None:
    context = new_context(small, executor)
    results = [context.eval(some_tokens(8, seed=i), ALL) for i in range(3)]
    copies = [result.copy() for result in results]
    for i in range(3):
        results[i][:] = np.nan  # nor may writing to them reach the context
        context.clear()
        assert same_bits(context.eval(some_tokens(8, seed=0), ALL), copies[0])
    later = [context.eval(some_tokens(8, seed=i), ALL) for i in range(2)]
    assert not any(np.shares_memory(a, b) for a in later for b in results)


def test_memory_does_not_grow(small: Model, one_thread: Executor) -> None:
    """Neither with the number of evaluations nor with the number of different lengths."""
    context = new_context(small, one_thread)

    def traced_after(n: int) -> int:
        context.clear()
        context.eval(some_tokens(n))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        traced_after(99)  # so that no memory from before the tracing is used
        first = traced_after(100)
        same_length = [traced_after(100) for _ in range(20)]
        other_lengths = [traced_after(n) for n in range(60, 101)]
    finally:
        tracemalloc.stop()
    one_array = 100 * 64 * 4  # (n_tokens, n_embd)
    assert same_length[-1] - first < one_array
    assert other_lengths[-1] - first < one_array


@pytest.mark.parametrize(
    "outputs",
    [slice(3, 9), slice(0, 1), slice(-1, None), slice(5, None), slice(None, None, 3), slice(11, None, -4)],
    ids=str,
)
def test_outputs_are_rows_of_the_whole(small: Model, executor: Executor, outputs: slice) -> None:
    tokens = some_tokens(12)
    whole = new_context(small, executor).eval(tokens, ALL)
    context = new_context(small, executor)
    logits = context.eval(tokens, outputs)
    assert distance(logits, whole[outputs]) < RTOL
    # the sequence itself is complete
    expected = new_context(small, executor).eval([*tokens, 7])
    assert distance(context.eval([7]), expected) < RTOL


def test_the_last_token_by_default_and_no_outputs(small: Model, executor: Executor) -> None:
    context, tokens = new_context(small, executor), some_tokens(12)
    assert context.eval(tokens[:10], slice(0, 0)).shape == (0, 512)
    assert context.eval(tokens[10:11], slice(1, None)).shape == (0, 512)
    logits = context.eval(tokens[11:])
    assert logits.shape == (1, 512)
    assert distance(logits, new_context(small, executor).eval(tokens, ALL)[-1:]) < RTOL


def test_clear_forgets(small: Model, executor: Executor) -> None:
    context, tokens = new_context(small, executor), some_tokens(12)
    expected = context.eval(tokens, ALL)
    assert distance(context.eval(tokens, ALL), expected) > 1e-3  # one sequence goes on ...
    assert context.n_past == 24
    context.clear()
    assert context.n_past == 0
    assert same_bits(context.eval(tokens, ALL), expected)  # ... or another begins


def test_context_overflow(small: Model, executor: Executor) -> None:
    context, tokens = Context(small, 10, executor), some_tokens(10)
    expected = new_context(small, executor).eval(tokens, ALL)
    with pytest.raises(FqError, match="11 tokens do not fit a context of 10"):
        context.eval([*tokens, 1])
    first = context.eval(tokens[:9], ALL)
    with pytest.raises(FqError, match="11 tokens"):
        context.eval(tokens[:2])
    # a refused evaluation leaves the sequence as it was, and the last place can be filled
    assert context.n_past == 9
    assert distance(np.concatenate([first, context.eval(tokens[9:])]), expected) < RTOL
    with pytest.raises(FqError, match="11 tokens"):
        context.eval([1])


@pytest.mark.parametrize(
    "tokens", [[-1], [512], [3, 512, 4], [2**40], [2**63], [2**70], [1.5], ["a"], [True], [], [[1, 2]], 3],
    ids=str,
)  # fmt: skip
def test_bad_tokens(small: Model, executor: Executor, tokens: Any) -> None:
    context = new_context(small, executor)
    with pytest.raises(FqError, match="token"):
        context.eval(tokens)
    assert context.n_past == 0
    assert not any(counter.rows_seen for counter in context.fake_quant.counters.values())


@pytest.mark.parametrize("n_ctx", [0, -1, 401])
def test_bad_context_lengths(small: Model, executor: Executor, n_ctx: int) -> None:
    with pytest.raises(FqError, match="1 to 400"):
        Context(small, n_ctx, executor)


# ---------------------------------------------------------------- fake quantisation


class Recorder(FakeQuant):
    """Keeps each norm's input and output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[Place, tuple[np.ndarray, np.ndarray]] = {}

    def rms_norm(self, norm: Place, x: np.ndarray, **kwargs: Any) -> np.ndarray:
        before = x.copy()
        result = super().rms_norm(norm, x, **kwargs)
        self.seen[norm] = before, result.copy()
        return result


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest, ties to even, for ordinary numbers: what the hook does to the reference's float64."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def norm_weight(model: Model, norm: Place) -> np.ndarray:
    name = norm.kind if norm.layer is None else f"blk.{norm.layer}.{norm.kind}"
    return model.vectors[f"{name}.weight"]


def plain_norm(model: Model, norm: Place, x: np.ndarray) -> np.ndarray:
    return rms_norm_f32(x, eps=model.hparams.rms_eps, weight=norm_weight(model, norm))


SITES = [
    ("attn_norm", 0, "raw"), ("attn_norm", 0, "weighted"), ("attn_norm", 2, "raw"),
    ("ffn_norm", 0, "raw"), ("ffn_norm", 1, "weighted"), ("ffn_norm", 2, "raw"), ("ffn_norm", 2, "weighted"),
    ("output_norm", None, "raw"), ("output_norm", None, "weighted"),
]  # fmt: skip


@pytest.mark.parametrize("kind, layer, point", SITES)
def test_rounding_moves_the_logits_as_the_reference_says(
    write: Write, executor: Executor, kind: str, layer: int | None, point: str
) -> None:
    path, tokens = write(n_layer=3), some_tokens(24)
    model, reference = Model(path), ReferenceModel(path)
    rule = Rule("bf16", kind, -1 if layer is None else layer, point)

    def hook(*args: Any) -> np.ndarray:
        *site, values = args
        return round_bf16(values) if site == [kind, layer, point] else values

    context = new_context(model, executor)
    moved = -context.eval(tokens, ALL).astype(np.float64)
    context.clear()
    with context.under(rule):
        moved += context.eval(tokens, ALL)
    expected = reference.logits(tokens, hook) - reference.logits(tokens)
    error = np.linalg.norm(moved - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # Now and then float32 and float64 fall on either side of a rounding step, which moves a row by a
    # tenth or two of its whole change. Another site, point or rounding rule moves all rows by 1 or more.
    assert np.median(error) < 3e-3
    assert error.max() < 0.5


@pytest.mark.parametrize("kind, layer, point", SITES)
def test_only_the_named_site_is_rounded(
    write: Write, executor: Executor, kind: str, layer: int | None, point: str
) -> None:
    model, tokens = Model(write(n_layer=3)), some_tokens(12)
    site = Place(kind, layer)
    rule = Rule("bf16", kind, -1 if layer is None else layer, point)
    plain, rounded = Recorder(model.values), Recorder(model.values, [rule])
    contexts = [new_context(model, executor, recorder) for recorder in (plain, rounded)]
    logits = [context.eval(tokens, ALL) for context in contexts]
    assert not same_bits(*logits)

    before = model.norms[: model.norms.index(site)]
    for norm in before:
        assert same_bits(plain.seen[norm][0], rounded.seen[norm][0])
        assert same_bits(plain.seen[norm][1], rounded.seen[norm][1])
    # the site: the same input, and the plain result rounded at the point
    x, found = rounded.seen[site]
    assert same_bits(plain.seen[site][0], x)
    weight = norm_weight(model, site)
    raw = rms_norm_f32(x, eps=model.hparams.rms_eps)
    expected = bf16_round_trip(raw) * weight if point == "raw" else bf16_round_trip(raw * weight)
    assert same_bits(found, expected)
    assert not same_bits(found, plain.seen[site][1])
    # keys and values: those of every layer that the site does not reach
    reached = 3 if layer is None else layer if kind == "attn_norm" else layer + 1
    for il in range(3):
        for name in ("keys", "values"):
            a, b = (getattr(context._cache, name)[il, :, : len(tokens)] for context in contexts)
            assert same_bits(a, b) == (il < reached)
    # the norms after it see other inputs, and round nothing
    for norm in model.norms:
        x, found = rounded.seen[norm]
        assert same_bits(found, plain_norm(model, norm, x)) == (norm != site)
        assert rounded.rows_quantised(norm) == (len(tokens) if norm == site else 0)


@pytest.mark.parametrize("point", ["raw", "weighted"])
def test_output_norm_alone(write: Write, executor: Executor, point: str) -> None:
    """The logits are the rounded vector times the output matrix, no more and no less."""
    path, tokens = write(), some_tokens(12)
    model = Model(path)
    recorder = Recorder(model.values, [Rule("bf16", "output_norm", point=point)])
    logits = new_context(model, executor, recorder).eval(tokens, ALL)
    x, _ = recorder.seen[Place("output_norm", None)]
    weight = norm_weight(model, Place("output_norm", None))
    raw = rms_norm_f32(x, eps=model.hparams.rms_eps)
    rounded = round_bf16(raw) * weight if point == "raw" else round_bf16(raw * weight)
    assert distance(logits, rounded @ ReferenceModel(path).weights["output.weight"].T) < 1e-6


@pytest.fixture(scope="module")
def deep(write: Write) -> Model:
    """TinyLlama's 22 layers, thin ones."""
    return Model(write(n_layer=22, n_embd=32, n_head=2, n_head_kv=1, n_ff=48))


def rows_seen(fake_quant: FakeQuant, il: int) -> int:
    return sum(fake_quant.rows_seen(Place(kind, il)) for kind in ("attn_norm", "ffn_norm"))


def test_rows_of_the_counting_experiment(deep: Model, executor: Executor) -> None:
    """A prompt of 3 and 5 tokens written: the last layer's FFN sees only rows whose logits are wanted."""
    context = new_context(deep, executor)
    context.eval([1, 2, 3])
    for token in (4, 5, 6, 7):
        context.eval([token])
    rows = [rows_seen(context.fake_quant, il) for il in range(22)]
    assert rows == [14] * 21 + [12]
    assert sum(rows) == 306
    assert context.fake_quant.rows_seen(Place("output_norm", None)) == 5


def test_rows_of_the_original_experiment(deep: Model, executor: Executor) -> None:
    """Its "30 calls per layer": 14 tokens of prompt and one decoded, seen by two norms."""
    context = new_context(deep, executor)
    context.eval(some_tokens(14))
    context.eval([9])
    assert [rows_seen(context.fake_quant, il) for il in range(22)] == [30] * 21 + [17]
    context.clear()  # forgets the sequence, not the counts
    assert rows_seen(context.fake_quant, 0) == 30
    context.fake_quant.reset()
    assert rows_seen(context.fake_quant, 0) == 0


def test_first_call_rounds_one_row_of_each_site(deep: Model, executor: Executor) -> None:
    recorder = Recorder(deep.values, [Rule("bf16", "ffn_norm", mode="first-call")])
    context = new_context(deep, executor, recorder)
    for _ in range(2):  # a reset begins anew
        context.clear()
        recorder.reset()
        context.eval([1, 2, 3], slice(1, 3))
        assert_row_0_rounded(deep, recorder)
        context.eval([4])
        for norm in deep.norms:
            x, found = recorder.seen[norm]
            assert same_bits(found, plain_norm(deep, norm, x))
        assert [c.site for c in recorder.matched] == [Site(Place("ffn_norm", il), "raw") for il in range(22)]
        assert [recorder.rows_quantised(norm) for norm in deep.norms] == [0, 1] * 22 + [0]
        assert [c.rows_seen for c in recorder.matched] == [4] * 21 + [3]
        assert [c.elements for c in recorder.matched] == [32] * 22
        assert all(0 < c.changed <= 32 for c in recorder.matched)


def assert_row_0_rounded(model: Model, recorder: Recorder) -> None:
    for norm in model.norms:
        x, found = recorder.seen[norm]
        expected = plain_norm(model, norm, x)
        assert same_bits(found[1:], expected[1:])
        assert same_bits(found[0], expected[0]) == (norm.kind != "ffn_norm")


def test_first_call_is_row_0_of_the_prompt_at_once_or_in_pieces(deep: Model, executor: Executor) -> None:
    whole, pieces = (new_context(deep, executor, "*[4]=bf16:first-call") for _ in range(2))
    expected = whole.eval([1, 2, 3, 4], ALL)
    found = np.concatenate([pieces.eval([token]) for token in (1, 2, 3, 4)])
    plain = new_context(deep, executor).eval([1, 2, 3, 4], ALL)
    assert distance(plain, expected) > 1e-5
    assert distance(found, expected) < RTOL


def test_norm_n_first_call_is_row_0_of_each_attention_norm(deep: Model, executor: Executor) -> None:
    """The original experiment's mode, over all layers: 22 rows, none of them an FFN norm's."""
    recorder = Recorder(deep.values, "norm[*]=bf16:first-call")
    context = new_context(deep, executor, recorder)
    context.eval([1, 2, 3])
    for norm in deep.norms:
        x, found = recorder.seen[norm]
        expected = plain_norm(deep, norm, x)
        assert same_bits(found[1:], expected[1:])
        assert same_bits(found[0], expected[0]) == (norm.kind != "attn_norm")
    context.eval([4])
    assert [recorder.rows_quantised(norm) for norm in deep.norms] == [1, 0] * 22 + [0]


def test_rules_change_between_evaluations(small: Model, executor: Executor) -> None:
    tokens = some_tokens(12)
    rules = ["ffn_norm=bf16", Rule("bf16:truncate", "ffn_norm", layer=1)]
    expected = [new_context(small, executor, rules[:n]).eval(tokens, ALL) for n in range(3)]
    assert len({e.tobytes() for e in expected}) == 3  # the second rule wins over the first in layer 1
    context = new_context(small, executor)
    for n in (0, 1, 2, 0, 2, 1):
        context.clear()
        with context.under(rules[:n]) as fq:
            assert same_bits(context.eval(tokens, ALL), expected[n]), n
        assert fq.rows_quantised(Place("ffn_norm", 0)) == (12 if n else 0)
    # with the sequence going on: the keys and values before the change stay
    mixed = context.eval([5])
    assert not same_bits(mixed, new_context(small, executor).eval([*tokens, 5]))
    assert context.n_past == 13


def test_fake_quant_is_for_a_block(small: Model, executor: Executor) -> None:
    context = new_context(small, executor, "attn_norm=f16")
    before, ffn = context.fake_quant, Place("ffn_norm", 0)
    own = FakeQuant(small.values, "ffn_norm=bf16")
    with context.under(own) as outer:
        assert outer is context.fake_quant is own
        context.eval([1, 2])
        with context.under(["ffn_norm[0]=f16", "output_norm=bf16"]) as inner:
            context.eval([3])
            assert [str(c.site) for c in inner.matched] == ["ffn_norm[0].raw", "output_norm.raw"]
        with pytest.raises(FqError, match="a context of 400"), context.under("output_norm=f16"):
            context.eval([1] * 500)
        assert context.fake_quant is own
        context.eval([4])
    assert context.fake_quant is before
    context.eval([5])
    with context.under(own):  # its counters go on
        context.eval([6])
    assert [fq.rows_quantised(ffn) for fq in (own, inner, before)] == [4, 1, 0]
    assert before.rows_quantised(Place("attn_norm", 0)) == before.rows_seen(ffn) == 1


def test_rules_that_do_not_fit_the_model(small: Model, deep: Model, executor: Executor) -> None:
    context = new_context(small, executor)
    before = context.fake_quant
    for rules, message in (
        ("ffn_norm", "rule 'ffn_norm': there is no =FORMAT"),
        (
            ["*=bf16", "ffn_norm[2]=bf16"],
            r"ffn_norm\[2\].raw=bf16 matches no site; there are inp_embd, attn_norm\[0-1\]",
        ),
        (FakeQuant(deep.values), "for a model with other sites"),
    ):
        with pytest.raises(FqError, match=message), context.under(rules):
            raise AssertionError("entered")
        with pytest.raises(FqError, match=message):
            new_context(small, executor, rules)
    assert context.fake_quant is before


def test_a_second_run_of_the_baseline_differs_by_nothing(write: Write, executor: Executor) -> None:
    """The control stream: the same bits from another context, a rounded one working beside it."""
    model, tokens = Model(write("Q4_K_M")), some_tokens(40)
    baseline, control = new_context(model, executor), new_context(model, executor)
    rounded = new_context(model, executor, "*=bf16")
    for chunk in (tokens[:16], tokens[16:17], tokens[17:]):
        expected = baseline.eval(chunk, ALL)
        assert not same_bits(rounded.eval(chunk, ALL), expected)
        assert same_bits(control.eval(chunk, ALL), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["one executor", "two executors"])
def test_two_contexts_from_two_threads(write: Write, shared: bool) -> None:
    """Each with rules of its own, which it changes on its way."""
    model = Model(write("Q8_0"))
    rules = [["attn_norm=f16", ()], ["*=bf16", "ffn_norm=bf16:truncate,first-call"]]
    lengths = [30, 1, 5, 140, 1, 1, 12]

    def run(i: int, executor: Executor) -> list[np.ndarray]:
        context = new_context(model, executor)
        logits = []
        for n in lengths:
            with context.under(rules[i][n % 2]) as fq:
                logits.append(context.eval(some_tokens(n, seed=n + i), ALL))
            rounded = [fq.rows_quantised(norm) for norm in model.norms]
            n_rows = {(0, 0): (n, 0, 0), (0, 1): (0, 0, 0), (1, 0): (n, n, n), (1, 1): (0, 1, 0)}[i, n % 2]
            assert rounded == [
                n_rows[("attn_norm", "ffn_norm", "output_norm").index(norm.kind)] for norm in model.norms
            ]
        return logits

    with Executor(2) as executor:
        expected = [run(i, executor) for i in range(2)]
    with Executor(2) as first, Executor(2) as second:
        executors = [first, first if shared else second]
        found: list[list[list[np.ndarray]]] = [[], []]
        start = threading.Barrier(2)

        def work(i: int) -> None:
            start.wait()
            for _ in range(3):
                found[i].append(run(i, executors[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        assert len(found[i]) == 3
        for repeat in found[i]:
            assert all(same_bits(a, b) for a, b in zip(repeat, expected[i], strict=True))


# ---------------------------------------------------------------- files that cannot be run

NAN, INF = float("nan"), float("inf")
EPS, BASE = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"


@pytest.mark.parametrize(
    "meta, message",
    [
        *(({key: None}, f"{key} is missing") for key in (
            "llama.block_count", "llama.embedding_length", "llama.attention.head_count",
            "llama.feed_forward_length", "llama.context_length", EPS)),
        *(({key: 0}, f"{key} is 0") for key in (
            "llama.block_count", "llama.embedding_length", "llama.attention.head_count",
            "llama.attention.head_count_kv", "llama.feed_forward_length", "llama.context_length",
            "llama.rope.dimension_count", "llama.attention.key_length")),
        ({"llama.block_count": -1}, "llama.block_count is -1"),
        ({"llama.block_count": 2**31 - 1}, "llama.block_count is 2147483647"),
        ({"llama.block_count": 2.0}, "llama.block_count must be int, not float"),
        ({"llama.block_count": True}, "llama.block_count must be int, not bool"),
        ({"llama.attention.head_count": [4, 4, 4]}, "head_count must be int, or 2 of them, one per layer"),
        ({"llama.attention.head_count": [4.0, 4.0]}, "head_count must be int, or 2 of them"),
        ({"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv differs between layers .\[2, 4\]."),
        ({"llama.feed_forward_length": [96, 64]}, "feed_forward_length differs between layers"),
        ({"llama.feed_forward_length": [0, 0]}, "feed_forward_length is 0"),
        ({"llama.attention.head_count": 5}, "5 heads do not share 2 key/value heads"),
        ({"llama.attention.head_count": 5, "llama.attention.head_count_kv": 5},
         "embedding length 64 is not a multiple of 5 heads"),
        ({"llama.attention.head_count_kv": 3}, "4 heads do not share 3 key/value heads"),
        ({"llama.attention.head_count_kv": 8}, "4 heads do not share 8 key/value heads"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length"),
        ({"llama.rope.dimension_count": 15}, "llama.rope.dimension_count is 15"),
        ({"llama.rope.dimension_count": 18}, "llama.rope.dimension_count is 18"),
        *(({EPS: value}, f"{EPS} is {value}") for value in (NAN, INF, -INF, -0.5)),
        *(({BASE: value}, f"{BASE} is {value}") for value in (NAN, INF, -INF, -10000.0, 0.0)),
        ({EPS: 1}, f"{EPS} must be float, not int"),
        *(({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": value},
           f"llama.rope.scaling.factor is {value}") for value in (NAN, INF, -2.0, 0.0)),
        ({"llama.rope.scale_linear": NAN}, "llama.rope.scale_linear is nan"),
        ({"llama.rope.scaling.type": "dynamic", "llama.rope.scaling.factor": 2.0}, "'dynamic'"),
        ({"llama.rope.scaling.type": [1, 2]}, "llama.rope.scaling.type must be str"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.expert_count": [8, 8]}, "llama.expert_count must be int"),
        ({"llama.vocab_size": 511}, "llama.vocab_size is 511"),
        ({"llama.vocab_size": [512, 512]}, "llama.vocab_size must be int"),
        ({"llama.embedding_length": 128}, "token_embd.weight has shape"),
        ({"llama.feed_forward_length": 95}, "ffn_gate.weight"),
        ({"llama.block_count": 1}, "blk.1.attn_norm.weight"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_metadata(write: Write, tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    path = rewrite(write(), tmp_path / "m.gguf", meta=meta)
    with pytest.raises(ModelError, match=message) as caught:
        Model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Each asks for another graph; llama.cpp's result with causal = False differs by a mean KL of 0.1.
OTHER_GRAPHS = {
    "attention.causal": [False, 1],
    "attention.sliding_window": [64, -1],
    "attention.clamp_kqv": [8.0],
    "attention.max_alibi_bias": [8.0],
    "attention.scale": [0.5],
    "attention.temperature_scale": [0.1],
    "attention.kv_lora_rank": [16],
    "attention.shared_kv_layers": [1],
    "attn_logit_softcapping": [50.0],
    "final_logit_softcapping": [30.0, NAN],
    "logit_scale": [0.5],
    "residual_scale": [0.25],
    "embedding_scale": [12.0],
    "hidden_activation": ["gelu"],
    "use_parallel_residual": [True],
    "tensor_data_layout": ["another"],
    "nextn_predict_layers": [1],
    "expert_used_count": [2, [0, 2]],
    "rope.dimension_sections": [[4, 4, 0, 0]],
    "rope.scaling.alpha": [2.0],
    "rope.scaling.yarn_log_multiplier": [0.1],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OTHER_GRAPHS.items() for value in values]
)
def test_metadata_that_asks_for_another_graph(write: Write, tmp_path: Path, key: str, value: Any) -> None:
    path = rewrite(write(), tmp_path / "m.gguf", meta={f"llama.{key}": value})
    with pytest.raises(ModelError) as caught:
        Model(path)
    message = str(caught.value)
    assert f"llama.{key} is {value!r}"[:70] in message and str(path) in message and "\n" not in message


def test_metadata_that_changes_nothing(write: Write, tmp_path: Path) -> None:
    """Its values are those of the same file without it, or it is about something else than logits."""
    meta = {
        "attention.causal": True, "attention.sliding_window": 4096, "attention.clamp_kqv": 0.0,
        "attention.layer_norm_epsilon": 1e-5, "attention.head_count": [4, 4],
        "attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96], "logit_scale": 1.0,
        "use_parallel_residual": False,
        "tensor_data_layout": "Meta AI original pth", "expert_count": 0, "expert_used_count": [0, 0],
        "rope.scaling.attn_factor": 1.0, "rope.scaling.original_context_length": 64,
        "rope.scaling.finetuned": False, "rope.freq_base_swa": 1e4, "pooling_type": 1, "no_such_key": 7,
    }  # fmt: skip
    plain = write(n_head=4)
    path = rewrite(plain, tmp_path / "m.gguf", meta={f"llama.{key}": value for key, value in meta.items()})
    assert Model(path).graph == Model(plain).graph
    assert unknown_keys(Model(path).file.metadata) == ["llama.no_such_key"]


def test_unknown_keys() -> None:
    metadata = {"general.architecture": "llama", "general.new": 1, "llama.new": 2, "llama.block_count": 2,
                "tokenizer.ggml.model": "llama", "tokenizer.ggml.new": 1}  # fmt: skip
    assert unknown_keys(metadata) == ["llama.new", "tokenizer.ggml.new"]
    for strange in (np.array([1, 2, 3]), ["llama", "llama"], 5, "mamba"):
        assert unknown_keys(metadata | {"general.architecture": strange}) == ["tokenizer.ggml.new"]


def test_a_file_joined_from_parts_is_whole(write: Write, tmp_path: Path) -> None:
    for n in (0, 1):
        assert Model(rewrite(write(), tmp_path / f"{n}.gguf", meta={"split.count": n})).hparams.n_layer == 2


def test_another_architecture(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="architecture 'mamba' is not supported; there are llama, qwen2"):
        Model(rewrite(write(), tmp_path / "m.gguf", arch="mamba"))
    with pytest.raises(ModelError, match="'qwen3moe' is not supported, as it has mixtures of experts; there"):
        Model(rewrite(write(), tmp_path / "m.gguf", arch="qwen3moe"))


def test_what_a_file_says_is_quoted_in_short(write: Write, tmp_path: Path) -> None:
    for changes in ({"arch": "x" * 5000}, {"meta": {"llama.rope.scaling.type": "x" * 5000}}):
        with pytest.raises(ModelError, match=r" 'x{58}… is not supported"):
            Model(rewrite(write(), tmp_path / "m.gguf", **changes))


def test_vocabulary_only(write: Write, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write())
    path = rewrite(write(), tmp_path / "m.gguf", tensors={t.name: None for t in reader.tensors})
    with pytest.raises(ModelError, match="vocabulary-only"):
        Model(path)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    "name, value, message",
    [
        *((name, None, "is missing") for name in (
            "blk.0.attn_norm.weight", "blk.1.attn_k.weight", "blk.1.ffn_down.weight", "output_norm.weight")),
        ("blk.0.attn_q.weight", f32(64, 32), r"\(64, 32\), not \(64, 64\)"),
        ("blk.0.attn_k.weight", f32(64, 64), r"\(64, 64\), not \(32, 64\)"),
        ("blk.1.ffn_down.weight", f32(96, 64), r"\(96, 64\), not \(64, 96\)"),
        ("blk.1.ffn_up.weight", f32(96 * 64), "has shape"),
        ("blk.1.ffn_up.weight", f32(1, 96, 64), "has shape"),
        ("blk.0.ffn_norm.weight", f32(63), r"\(63,\), not \(64,\)"),
        ("blk.0.ffn_norm.weight", f32(1, 64), "has shape"),
        ("blk.0.ffn_norm.weight", np.ones(64, np.float16), "has type F16, not F32"),
        ("output_norm.weight", np.ones(64, np.float16), "has type F16, not F32"),
        ("output.weight", f32(511, 64), r"\(511, 64\), not \(512, 64\)"),
        ("token_embd.weight", f32(512, 64, 1), "has shape"),
        ("blk.0.attn_q.bias", f32(63), r"\(63,\), not \(64,\)"),
        ("blk.0.attn_norm.bias", f32(64), "not one that the llama graph uses"),
        ("blk.2.attn_q.weight", f32(64, 64), "not one that the llama graph uses"),
        ("blk.0.attn_q.weight", np.ones((64, 64), np.int8), "of type I8"),
        ("rope_freqs.weight", f32(16), r"\(8,\)"),
        ("rope_freqs.weight", np.ones(8, np.float16), "must be F32"),
        *(("rope_freqs.weight", np.array([1, 1, bad, 1, 1, 1, 1, 1], np.float32), "positive finite")
          for bad in (0.0, -1.0, NAN, INF)),
    ],
)  # fmt: skip
def test_bad_tensors(write: Write, tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = rewrite(write(), tmp_path / "m.gguf", tensors={name: value})
    with pytest.raises(ModelError, match=message) as caught:
        Model(path)
    assert name in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_large_cache_takes_memory_as_it_is_written() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the system does not tell how much memory is in use")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    cache = pages((64, 1 << 20))  # 256 MB
    cache[:, :16] = 1
    assert resident() - before < 16 << 20
    assert (cache[:, :17].sum(), cache.dtype, cache.flags.writeable) == (64 * 16, np.float32, True)


def test_a_cache_too_large_for_any_machine_is_a_memory_error() -> None:
    for n in (1 << 52, 1 << 70):
        with pytest.raises(MemoryError):
            pages((n,))
