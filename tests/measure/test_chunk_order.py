"""Which chunks of a text a run takes: an order for ever, whose beginning a shorter run is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq
from hypothesis import given
from hypothesis import strategies as st

from fq import FqError, Perplexity, Sweep, cells_of
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.chunks import Chunks, Settings, chunk_order
from fq_kernels.rules import FakeQuant

N_CTX = 32
# What stores and figures of every version are made with: never to be changed.
SEED_0_OF_12 = [7, 4, 9, 10, 3, 8, 2, 6, 0, 5, 11, 1]
SEED_7_OF_12 = [4, 7, 3, 8, 2, 10, 11, 9, 1, 5, 6, 0]
SEED_0_OF_592 = [392, 404, 87, 282, 46, 366, 306, 477, 323, 15, 272, 463, 44, 192, 554, 591]


@pytest.fixture(scope="module")
def tokens(tiny):
    return np.array(tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the order


def test_the_order_is_the_same_for_ever():
    assert chunk_order(12, 0) == SEED_0_OF_12
    assert chunk_order(12, 7) == SEED_7_OF_12
    assert chunk_order(592, 0)[:16] == SEED_0_OF_592


@given(st.integers(0, 300), st.integers(0, 2**70))
def test_it_is_a_permutation_of_all(n, seed):
    assert sorted(chunk_order(n, seed)) == list(range(n))


def test_every_seed_has_an_order_of_its_own():
    assert len({tuple(chunk_order(12, seed)) for seed in range(200)}) == 200
    # and each chunk comes first about as often as any other: 200 of 2400, give or take 13.5
    first = np.bincount([chunk_order(12, seed)[0] for seed in range(2400)], minlength=12)
    assert np.abs(first - 200).max() < 5 * 13.5


@given(st.data())
def test_a_longer_run_contains_the_shorter(tiny, data):
    tokens = range(data.draw(st.integers(3, 400)))
    n_ctx = data.draw(st.integers(3, min(len(tokens), 128)))
    order = data.draw(st.one_of(st.just(("first",)), st.tuples(st.just("random"), st.integers(0, 9))))
    whole = Chunks(tiny, tokens, Settings(n_ctx, -1, *order))
    assert sorted(whole.indices) == list(range(len(tokens) // n_ctx))
    for n in range(1, whole.n + 1):
        some = Chunks(tiny, tokens, Settings(n_ctx, n, *order))
        assert some.indices == whole.indices[:n]
        for mine, its in zip(some[n - 1], whole[n - 1], strict=True):
            assert (mine == its).all()


def test_a_chunk_is_the_texts(tiny, tokens):
    text = Chunks(tiny, tokens, Settings(N_CTX))
    assert text.indices != tuple(range(text.n))
    for position, index in enumerate(text.indices):
        ids, targets = text[position]
        assert (ids[1:] == tokens[index * N_CTX + 1 : (index + 1) * N_CTX]).all()
        assert (targets == ids[N_CTX // 2 + 1 :]).all()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"chunk_order": "last"}, "order of chunks must be random or first, not 'last'"),
        ({"chunk_order": "first", "chunk_seed": 0}, "is for random order, not for first"),
        ({"chunk_seed": -1}, "seed of the chunks' order must be from 0 to 2"),
    ],
)
def test_what_is_no_order(tiny, tokens, options, said):
    with pytest.raises(FqError, match=said):
        Chunks(tiny, tokens, Settings(N_CTX, **options))


# ---------------------------------------------------------------- measurements


def test_a_run_in_another_order_has_the_same_chunks(tiny, tokens, executor):
    """Each chunk's figures are its own, wherever it comes."""
    rules = "ffn_norm=bf16"
    found = []
    for options in ({"chunk_order": "first"}, {}, {"chunk_seed": 5}):
        run = Perplexity(
            tiny, tokens, n_ctx=N_CTX, executor=executor, fake_quant=FakeQuant(tiny.values, rules), **options
        )
        assert list(run) == list(range(run.n_chunks))
        result = run.result()
        indices = [chunk["index"] for chunk in result["chunks"]]
        assert indices == result["chunk_indices"] == list(run.text.indices)
        found.append({chunk["index"]: (chunk["nll"], chunk["mean_kld"]) for chunk in result["chunks"]})
        assert (result["chunk_order"], result["chunk_seed"]) == (run.text.order, run.text.seed)
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == sorted(found[0]) != list(found[1]) != list(found[2])


@pytest.mark.parametrize("options", [{}, {"chunk_seed": 3}, {"chunk_order": "first"}])
def test_a_sweep_is_its_perplexities(tiny, tokens, executor, options):
    """Also what goes by the rows before: these are the run's, not the text's."""
    options = {"n_ctx": N_CTX, "chunks": 3, "executor": executor} | options
    cells = cells_of(tiny, formats=["bf16", "bf16:first-call", "bf16:stochastic,seed=3"])
    sweep = Sweep(tiny, tokens, cells, **options)
    for _ in sweep:
        pass
    for i, cell in enumerate(cells[1:], 1):
        alone = Perplexity(tiny, tokens, fake_quant=FakeQuant(tiny.values, cell.rules), **options)
        for position in alone:
            got, want = sweep.finished[i, position].paired, alone.paired[position]
            for name, values in vars(want).items():
                assert getattr(got, name).tobytes() == values.tobytes(), (cell, position, name)
        assert sweep.result()["chunk_indices"] == alone.result()["chunk_indices"]


# ---------------------------------------------------------------- commands


def json_of(*arguments):
    out, err = fq(*arguments, "--json", "-")
    return json.loads(out), err


def test_perplexity(tiny_path):
    command = ["perplexity", "-m", tiny_path, "-c", N_CTX, "--chunks", 3]
    data, text = json_of(*command)
    assert data["chunk_order"] == "random" and data["chunk_seed"] == 0
    n = data["n_tokens"] // N_CTX
    assert data["chunk_indices"] == chunk_order(n, 0)[:3]
    assert (
        f"{data['n_tokens']} tokens read; 3 chunks of 32 in random order (seed 0), 45 tokens scored" in text
    )
    assert "neighbouring" not in text
    data, text = json_of(*command, "--chunk-seed", 4)
    assert data["chunk_indices"] == chunk_order(n, 4)[:3] and "(seed 4)" in text
    data, text = json_of(*command, "--chunk-order", "first")
    # of the text no more is read
    assert data["n_tokens"] < 5 * N_CTX and data["chunk_indices"] == [0, 1, 2] and data["chunk_seed"] is None
    assert "3 chunks of 32, 45 tokens scored; figures are of these neighbouring chunks" in text


def test_sweep_and_results(tiny_path, tmp_path):
    command = ["sweep", "-m", tiny_path, "-c", N_CTX, "--chunks", 2, "--store", tmp_path / "s.sqlite"]
    for number, options in enumerate(([], ["--chunk-seed", 2], ["--chunk-order", "first"]), 1):
        data, text = json_of(*command, *options)
        n = data["n_tokens"] // N_CTX
        seed = data["chunk_seed"]
        assert seed == [0, 2, None][number - 1]
        assert data["chunk_indices"] == ([0, 1] if seed is None else chunk_order(n, seed)[:2])
        assert (f"in random order (seed {seed})" in text) == (seed is not None)
        assert ("of these neighbouring chunks" in text) == (seed is None)
        assert json_of("results", number, "--store", tmp_path / "s.sqlite")[0] == data


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ["--chunk-order", "first", "--chunk-seed", 3],
            "a seed of the chunks' order is for random order, not for first",
        ),
        (["--chunk-seed", -1], "seed of the chunks' order must be from 0 to 2"),
    ],
)
@pytest.mark.parametrize("command", ["perplexity", "sweep"])
def test_what_the_commands_refuse(tiny_path, tmp_path, command, options, said):
    _, err = fq(command, "-m", tiny_path, "-c", N_CTX, *options, cwd=tmp_path, status=2)
    assert said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
