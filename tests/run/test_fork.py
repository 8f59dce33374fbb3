"""Variants that share the baseline's layers: the same bits and counts as separate evaluations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fq.run.context as context_module
from fq import Context, Model
from fq.arch.ops import OPS
from fq.gguf.synthetic import tiny_shape, write_llama_gguf
from fq.run.fork import Fork
from fq_kernels.rules import FakeQuant

N_TOKENS, FIRST_OUTPUT = 23, 12
N_LAYER = 3
ONE_NORM = [
    f"{kind}[{layer}].{point}=bf16"
    for layer in range(N_LAYER)
    for kind in ("attn_norm", "ffn_norm")
    for point in ("raw", "weighted")
]
VALUES = ["q_proj", "k_proj", "v_proj", "q", "k", "v", "kqv_out", "attn_out", "ffn_inp", "ffn_gate"]
VALUES += ["ffn_up", "ffn_act", "ffn_out", "l_out"]
RULES = {
    "one": [*ONE_NORM, "output_norm.raw=bf16", "output_norm.weighted=fp8_e4m3"],
    "several": [
        "*=bf16",
        "ffn_norm[1-2]=int4",
        ["ffn_norm[2].weighted=bf16", "attn_norm[1]=bf16:stochastic,seed=3"],
        "norm[1-2]=bf16:first-call",
        "ffn_norm[1]=bf16:first-call",
        "attn_norm[2]=int8:tensor",
    ],
    "values": [
        *(f"{kind}[1]=bf16" for kind in VALUES),
        "inp_embd=bf16",
        "k=fp8_e4m3",
        ["l_out=bf16:stochastic,seed=3", "ffn_inp[2]=bf16"],
        "v[1-2]=int8:tensor",
        "ffn_act[0]=bf16:first-call",
        ["ffn_norm[1].in=bf16", "*=f16"],
        "activation[2]=bf16",
    ],
}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory):
    path = tmp_path_factory.mktemp("fork") / "three.gguf"
    shape = tiny_shape(n_layer=N_LAYER, n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128)
    write_llama_gguf(path, shape, mix="Q8_0")
    return Model(path)


def variants_of(model, rules):
    return [None if rule is None else FakeQuant(model.values, rule) for rule in rules]


def separate(model, executor, ids, rules, *, batch, activations="exact", first=FIRST_OUTPUT):
    """One variant alone, through Context."""
    context = Context(model, len(ids), executor, rules, activations=activations)
    parts = [
        context.eval(ids[b : b + batch], slice(max(first - b, 0), None)) for b in range(0, len(ids), batch)
    ]
    return np.concatenate(parts)


def assert_as_separate(model, executor, ids, rules, **options):
    batch, activations = options["batch"], options.get("activations", "exact")
    forked, alone = variants_of(model, rules), variants_of(model, rules)
    fork = Fork(model, len(ids) + 1, executor, batch, activations)
    steps = []
    for _ in range(2):  # the counters go on, as first-call and stochastic rounding must see
        blocks = [x.copy() for x in fork.logits(ids, FIRST_OUTPUT, forked, lambda: steps.append(1))]
        n = 1 + len(forked)
        found = [np.concatenate(blocks[i::n]) for i in range(n)]
        expected = [separate(model, executor, ids, rule, **options) for rule in [None, *alone]]
        for got, want, rule in zip(found, expected, [None, *rules], strict=True):
            assert got.shape == want.shape
            assert got.tobytes() == want.tobytes(), rule
    for got, want in zip(forked, alone, strict=True):
        assert got is want is None or got.as_dict() == want.as_dict()
    sizes = len(ids), FIRST_OUTPUT
    assert len(steps) == 2 * sum(fork.steps(rules, *sizes) for rules in [None, *forked])
    return len(blocks) / n


@pytest.mark.parametrize("batch", [4, 10, 64])
@pytest.mark.parametrize("rules", RULES)
def test_the_bits_and_counts_of_separate_runs(three_layers, executor, rules, batch):
    ids = np.random.default_rng(0).integers(3, 512, N_TOKENS)
    assert_as_separate(three_layers, executor, ids, [*RULES[rules], None], batch=batch)


def test_on_every_instruction_set(three_layers, executor, isa):
    """Whichever kernels."""
    ids = np.random.default_rng(2).integers(3, 512, N_TOKENS)
    assert_as_separate(three_layers, executor, ids, RULES["several"], batch=N_TOKENS)


@pytest.mark.parametrize("activations", ["exact", "ggml"])
@pytest.mark.parametrize("batch, n_blocks", [(128, 5), (60, 3 + 2)])
def test_logits_of_a_large_vocabulary(three_layers, executor, isa, monkeypatch, batch, n_blocks, activations):
    """By blocks of rows, of each batch apart, where all of them would take much memory."""
    monkeypatch.setattr("fq.run.fork.MAX_LOGITS", 20 * 4 * 512)
    ids = np.random.default_rng(3).integers(3, 512, 100)
    rules = [*RULES["several"], "output_norm=bf16:stochastic,seed=3", None]
    options = {"batch": batch, "activations": activations}
    assert assert_as_separate(three_layers, executor, ids, rules, **options) == n_blocks


def test_blocks_of_logits_take_the_memory_of_two(three_layers, executor, monkeypatch):
    """Though the last one has fewer rows."""
    monkeypatch.setattr("fq.run.fork.MAX_LOGITS", 40 * 4 * 512)
    fork = Fork(three_layers, 128, executor, 128)
    blocks = [len(x) for x in fork.logits(np.arange(3, 103), 5, [None])]
    assert blocks == [32, 32, 32, 32, 31, 31]
    assert sorted(shape for shape in fork.context.buffers._free if shape[1] == 512) == [(32, 512)]
    assert len(fork.context.buffers._free[32, 512]) == 2


def test_ggml_activations(three_layers, executor):
    ids = np.random.default_rng(1).integers(3, 512, N_TOKENS)
    assert_as_separate(three_layers, executor, ids, RULES["one"], batch=12, activations="ggml")


def test_of_a_real_model(smollm2, executor):
    ids = np.array(smollm2.tokenizer.encode("It was a dark and stormy night; the rain fell. " * 5))[:40]
    rules = ["ffn_norm[3]=bf16", "attn_norm[29].weighted=bf16", "output_norm=bf16", "ffn_norm=bf16", None]
    assert_as_separate(smollm2, executor, ids, rules, batch=30)


def test_a_variant_starts_where_its_rules_first_act(three_layers, executor):
    fork = Fork(three_layers, 16, executor, 16)
    names = [node.name for node in three_layers.graph.nodes]
    for rule, name in (
        ("ffn_norm[1].weighted=bf16", "ffn_norm-1"),
        ("attn_norm[2]=bf16", "attn_norm-2"),
        ("output_norm=bf16", "result_norm"),
        ("ffn_inp[1]=bf16", "ffn_inp-1"),
        ("*=bf16", "attn_norm-0"),
    ):
        assert fork.first_node(FakeQuant(three_layers.values, rule)) == names.index(name)
    assert fork.first_node(None) == 0
    # embedding, three layers, the last norm, logits; then without the embedding and layer 0
    assert fork.steps(None, 16, 5) == 6
    assert fork.steps(FakeQuant(three_layers.values, "ffn_norm[1]=bf16"), 16, 5) == 4


def test_no_node_of_the_shared_layers_is_computed_again(three_layers, executor, monkeypatch):
    computed = []

    def counted(compute):
        def counting(run, node, inputs):
            computed.append(node.name)
            return compute(run, node, inputs)

        return counting

    ops = {op: replace(row, compute=counted(row.compute)) for op, row in OPS.items()}
    monkeypatch.setattr(context_module, "OPS", ops)
    fork = Fork(three_layers, 32, executor, 32)
    ids = np.arange(3, 20)
    variants = variants_of(three_layers, ["ffn_norm[1]=bf16", "attn_norm[2]=bf16"])
    for _ in fork.logits(ids, 5, variants):
        pass
    times = {name: computed.count(name) for name in set(computed)}
    assert times["ffn_norm-0"] == times["kqv_out-1"] == times["ffn_inp-1"] == 1
    assert times["ffn_norm-1"] == times["l_out-1"] == 2
    assert times["attn_norm-2"] == times["result_output"] == 3


@pytest.mark.parametrize("batch", [5, 32])
def test_a_sequence_takes_the_memory_of_the_one_before(three_layers, executor, batch):
    """Fresh pages cost more than the arithmetic, and what is not given back would add up."""
    fork = Fork(three_layers, 32, executor, batch)
    variants = variants_of(three_layers, ["ffn_norm[1]=bf16", "*=bf16", None])

    def free_after(n_tokens):
        for _ in fork.logits(np.arange(3, 3 + n_tokens), 5, variants):
            pass
        return [array for arrays in fork.context.buffers._free.values() for array in arrays]

    first, again, shorter = free_after(20), free_after(20), free_after(16)
    assert {id(array) for array in first} == {id(array) for array in again}
    # logits: the baseline's and one array for all variants, whatever the batch that they are of
    assert sum(array.shape[1] == 512 for array in first) == 2
    assert not any(len(array) in (20, 15) for array in shorter)
