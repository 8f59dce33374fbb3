"""What a Python prompt shows of an object: one line that says what it is, the same each time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fq import Context, Executor, FakeQuant, Model, Perplexity, Results, Sweep, cells_of

STORE = Path(__file__).parent / "data" / "store-1.sqlite"


@pytest.fixture
def shown(tiny_path, tmp_path):
    """repr(object) by the name of its class."""
    tiny = Model(tiny_path)
    rules = FakeQuant(tiny.values, ["ffn_norm=bf16", "attn_norm=f16", "ffn_norm[1]=int8", "*=bf16"])
    shutil.copy(STORE, tmp_path / "store.sqlite")
    with Executor(2) as executor, Results(tmp_path / "store.sqlite") as store:
        context = Context(tiny, 32, executor, "*=bf16")
        context.eval([1, 2, 3])
        run = Perplexity(tiny, range(64), n_ctx=16, fake_quant=rules, executor=executor)
        next(iter(run))
        sweep = Sweep(tiny, range(64), cells_of(tiny), n_ctx=16, chunks=2, executor=executor)
        next(iter(sweep))
        objects = [tiny, tiny.file, tiny.graph, tiny.tokenizer, executor, rules, context, run, sweep]
        objects += [store, store.get(1)]
        return {type(x).__name__: repr(x) for x in objects}


def test_one_line_that_says_what_it_is(shown, tiny_path, tmp_path):
    assert shown == {
        "Model": "<Model tiny.gguf: llama, 2 layers, n_embd 64, 512 tokens>",
        "GGUFFile": f"<GGUFFile tiny.gguf: version 3, 21 tensors, {tiny_path.stat().st_size} bytes>",
        "Graph": "<Graph: 35 nodes, 2 layers, 5 norms>",
        "Tokenizer": "<Tokenizer llama: 512 tokens, BOS 1, EOS 2>",
        "Executor": "Executor(2)",
        "FakeQuant": "<FakeQuant ffn_norm[*].raw=bf16, attn_norm[*].raw=f16, ffn_norm[1].raw=int8, …: "
        "5 sites, 59 rows rounded>",
        "Context": "<Context of tiny.gguf: 3 of 32 tokens, Executor(2), exact activations, "
        "rules *[*].raw=bf16>",
        "Perplexity": "<Perplexity of tiny.gguf: 1 of 4 chunks of 16; baseline, quantised>",
        "Sweep": "<Sweep of tiny.gguf: 4 cells, 2 chunks of 16; 1 of 8 ended>",
        "Results": f"<Results {tmp_path}/store.sqlite>",
        "Run": "<Run of tiny.gguf: 13 cells, 5 chunks of 16>",
    }
