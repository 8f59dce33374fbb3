"""Logits that are NaN or infinite: named by chunk, token and node, never an agreement, and an exit status."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_models import written
from command_line import fq

from fq import Context, Model, NotFiniteError, Perplexity, Sampler, Sweep, cells_of
from fq.commands.show_sweep import sweep_text
from fq.errors import NOT_FINITE
from fq.measure.chunks import n_scored_per_chunk
from fq.measure.overhead import Configuration, Overhead
from fq.measure.statistics import Reference, compare, summarise
from fq.measure.streams import Stream, Streams
from fq.results.compare import Side, compare_cells, compare_runs
from fq.results.runs import Results
from fq.run.finite import in_batches, rows_seen, rules_at
from fq.run.generation import generate
from fq.run.kv_cache import KVCache
from fq.run.weights import mul_mat
from fq_kernels import attention
from fq_kernels.rules import FakeQuant

N_CTX = 32
# one word is in the second of six chunks alone, at token 14 of it
TEXT = "Hello world " * 22 + "answer " + "Hello world " * 75
N_CHUNKS = 6
WORD, CHUNK, TOKEN = "answer", 1, 13
OVERFLOWS = "attn_norm[0].weighted=f16"  # in the model so called, at that word
STEADY = "attn_norm[1].weighted=f16"
TOGETHER = "*[*].weighted=f16"


@pytest.fixture(scope="module")
def word(tiny) -> int:
    ids = tiny.tokenizer.encode(TEXT)
    (token,) = tiny.tokenizer.encode(WORD)[1:]
    assert [i for i, t in enumerate(ids) if t == token] == [CHUNK * N_CTX + TOKEN]
    return token


@pytest.fixture(scope="module")
def nan(tmp_path_factory, word) -> Model:
    """The word's embedding is NaN."""
    return written(tmp_path_factory.mktemp("broken") / "broken.gguf", ("token_embd.weight", word, np.nan))


@pytest.fixture(scope="module")
def overflows(tmp_path_factory, word) -> Model:
    """The word's first norm is finite, and beyond the largest F16."""
    row = np.full(64, 1e-3, np.float32)
    row[3] = 1
    changes = ("token_embd.weight", word, row), ("blk.0.attn_norm.weight", 3, 1e4)
    return written(tmp_path_factory.mktemp("overflows") / "overflows.gguf", *changes)


def tokens_of(model: Model) -> list[int]:
    return model.tokenizer.encode(TEXT)


def where(node: str, op: str) -> dict[str, Any]:
    return {"chunk": CHUNK, "node": node, "op": op, "token": TOKEN}


EMBEDDING, NORM = where("inp_embd", "GET_ROWS"), where("attn_norm-0", "RMS_NORM_MUL")
SAID = (
    rf"not finite in chunk {CHUNK + 1}; the first node that is not is %s, at token {TOKEN + 1} of the chunk"
)
EMBEDDING_SAID = SAID % r"inp_embd \(GET_ROWS\)"
NORM_SAID = SAID % r"attn_norm-0 \(RMS_NORM_MUL\)"

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_agrees_with_nothing(executor, value):
    """argmax finds the first NaN, or the infinity, in both."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((40, 50), dtype=np.float32)
    base[3], base[35, 7] = np.nan, value
    other = base.copy()
    other[10, 49] = value
    targets = np.zeros(40, np.intp)
    reference = Reference(executor)
    reference.set(base, targets)
    for found in (compare(base, other, targets, executor), reference.compare(other)):
        lost = [3, 10, 35]
        assert np.flatnonzero(~found.same_top).tolist() == lost
        assert np.flatnonzero(np.isnan(found.kld)).tolist() == lost
        assert np.flatnonzero(np.isnan(found.dp)).tolist() == lost
        assert np.flatnonzero(np.isnan(found.nll)).tolist() == lost
        assert np.flatnonzero(np.isnan(found.nll_base)).tolist() == [3, 35]
        assert summarise([found])["same_top"] == pytest.approx(37 / 40)


# ---------------------------------------------------------------- the measurement


@pytest.mark.parametrize("batch", [512, 7, 1])
def test_a_baseline_ends_the_run(nan, executor, batch):
    rules = FakeQuant(nan.values, [OVERFLOWS])
    run = Perplexity(
        nan,
        tokens_of(nan),
        n_ctx=N_CTX,
        chunk_order="first",
        fake_quant=rules,
        executor=executor,
        batch=batch,
    )
    with pytest.raises(NotFiniteError, match=f"^baseline: the logits are {EMBEDDING_SAID}$"):
        list(run)
    assert run.done == 1 and math.isfinite(run.result()["comparison"]["mean_kld"])
    assert run.result()["fake_quant"]["sites"][0]["rows_seen"] == N_CTX - 1


@pytest.mark.parametrize("batch", [512, 7])
def test_a_stream_goes_on(overflows, executor, batch):
    run = Perplexity(
        overflows,
        tokens_of(overflows),
        n_ctx=N_CTX,
        fake_quant=FakeQuant(overflows.values, [OVERFLOWS]),
        control=True,
        executor=executor,
        batch=batch,
    )
    assert list(run) == list(range(N_CHUNKS))
    assert run.not_finite == {0: NORM}
    result = run.result()
    assert result["not_finite"] == NORM and result["control"]["exactly_zero"]
    assert [chunk["index"] for chunk in result["chunks"] if math.isnan(chunk["mean_kld"])] == [CHUNK]
    assert result["chunk_indices"].index(CHUNK) != CHUNK  # in random order
    # the word spoils all that comes after it in its chunk, and nothing else
    assert result["not_finite_tokens"] == n_scored_per_chunk(N_CTX)
    assert math.isnan(result["comparison"]["mean_kld"])
    assert result["comparison"]["same_top"] <= 5 / 6


def test_a_stream_without_a_baseline_goes_on(nan, executor):
    run = Perplexity(
        nan,
        tokens_of(nan),
        n_ctx=N_CTX,
        fake_quant=FakeQuant(nan.values, [STEADY]),
        baseline=False,
        executor=executor,
    )
    assert list(run) == list(range(N_CHUNKS)) and run.result()["not_finite"] == EMBEDDING
    assert math.isnan(run.result()["ppl"])


def test_each_stream_is_named(overflows, executor):
    streams = [Stream(spec, FakeQuant(overflows.values, [spec])) for spec in (STEADY, OVERFLOWS)]
    run = Streams(overflows, tokens_of(overflows), streams, n_ctx=N_CTX, executor=executor)
    assert list(run) == list(range(N_CHUNKS))
    assert [stream["not_finite"] for stream in run.result()["streams"]] == [None, NORM]


@pytest.mark.parametrize("spec", ["attn_norm=bf16:stochastic,seed=4", "attn_norm=int4:first-call"])
def test_rules_go_on_where_they_stood(tiny, executor, spec):
    """So what is evaluated again is what was not finite."""
    rules = FakeQuant(tiny.values, [spec])
    ids = np.array(tokens_of(tiny)[:N_CTX])
    context = Context(tiny, N_CTX, executor, rules)
    context.eval(ids)
    context.clear()
    again = rules_at(rules, rows_seen(rules))
    want = context.eval(ids)
    rows = rules.matched[0].rows_seen
    assert Context(tiny, N_CTX, executor, again).eval(ids).tobytes() == want.tobytes()
    assert rules.matched[0].rows_seen == rows  # its own counters
    anew = FakeQuant(tiny.values, [spec])
    assert Context(tiny, N_CTX, executor, anew).eval(ids).tobytes() != want.tobytes()


def test_batches_are_those_of_the_measurement(tiny, executor):
    ids = np.array(tokens_of(tiny)[:N_CTX])
    seen = []
    run = Perplexity(
        tiny, tokens_of(tiny), n_ctx=N_CTX, chunk_order="first", executor=executor, batch=7, chunks=1
    )
    evaluate = run.context.evaluate
    run.context.evaluate = lambda *args: (
        seen.append((tuple(args[2]), args[3].indices(len(args[2])))) or evaluate(*args)
    )
    assert list(run) == [0]
    batches = in_batches(ids[:-1], N_CTX // 2, 7)
    assert [(tuple(part), out.indices(len(part))) for part, out in batches] == list(dict.fromkeys(seen))


def test_of_several_texts_the_others_are_measured(nan, tmp_path):
    broken, sound, out = tmp_path / "broken.txt", tmp_path / "sound.txt", tmp_path / "j.json"
    broken.write_text(TEXT)
    sound.write_text("Hello world " * 100)
    sweep = "sweep", "-m", nan.path, "-c", N_CTX, "--chunks", 4, "--chunk-order", "first", "--sites", "l_out"
    _, err = fq(
        *sweep, "-f", broken, "-f", sound, "--store", tmp_path / "s", "--json", out, status=NOT_FINITE
    )
    assert f"{broken}, {N_CTX}: baseline: the logits are not finite in chunk {CHUNK + 1}" in err
    runs = json.loads(out.read_text())["runs"]
    assert [run["partial"] for run in runs] == [True, False] and runs[1]["n_chunks"] == 4


def test_every_instruction_set_finds_the_same(isa, nan, overflows, executor):
    run = Perplexity(nan, tokens_of(nan), n_ctx=N_CTX, executor=executor, activations="ggml")
    with pytest.raises(NotFiniteError, match=EMBEDDING_SAID):
        list(run)
    rules = FakeQuant(overflows.values, [OVERFLOWS])
    run = Perplexity(overflows, tokens_of(overflows), n_ctx=N_CTX, fake_quant=rules, executor=executor)
    assert list(run) == list(range(N_CHUNKS)) and run.not_finite == {0: NORM}


def test_infinities_in_a_product_are_no_warning(isa, tiny, executor):
    """On no thread: each has numpy's settings of its own."""
    x = np.full((16, 64), np.inf, np.float32)
    out = np.empty((16, 64), np.float32)
    assert np.isnan(mul_mat(x, tiny.weights["blk.0.attn_q.weight"], executor, out)).all()
    q, k = np.full((16, 4, 16), -np.inf, np.float32), x[:, :32].copy().reshape(16, 2, 16)
    cache = KVCache(1, 2, N_CTX, 16)
    found = attention(q, k, k, cache.keys[0], cache.values[0], 0, scale=0.25, out=out, executor=executor)
    assert np.isnan(found).all()


# ---------------------------------------------------------------- the sweep


def swept(model, executor, **options) -> Sweep:
    cells = cells_of(model, ["*[*].weighted"], ["f16"])
    return Sweep(model, tokens_of(model), cells, n_ctx=N_CTX, executor=executor, **options)


def test_a_cell_leaves_the_others_their_figures(overflows, executor):
    run = swept(overflows, executor, batch=7)
    assert len(list(run)) == N_CHUNKS * len(run.cells)
    lost = {i for i, cell in enumerate(run.cells) if cell.name in (OVERFLOWS, TOGETHER)}
    assert run.not_finite == dict.fromkeys(lost, NORM)
    result = run.result()
    alone = Perplexity(
        overflows,
        tokens_of(overflows),
        n_ctx=N_CTX,
        batch=7,
        fake_quant=FakeQuant(overflows.values, [STEADY]),
        executor=executor,
    )
    list(alone)
    for i, cell in enumerate(result["cells"]):
        assert cell["not_finite"] == (NORM if i in lost else None)
        assert cell["not_finite_tokens"] == (n_scored_per_chunk(N_CTX) if i in lost else 0)
        assert math.isfinite(cell["comparison"]["mean_kld"]) == (i not in lost)
        assert ("rank" in cell) == (cell["kind"] == "single" and i not in lost)
        if cell["name"] == STEADY:
            assert cell["comparison"] == alone.result()["comparison"]
    group = result["groups"][0]
    assert group["additivity"] is None and group["pairs"]["n"] == 6  # of the four that are left
    assert max(cell["rank"][1] for cell in result["cells"] if "rank" in cell) == 4
    text = sweep_text(result | {"text": "text"})
    row = next(line for line in text.splitlines() if "attn_norm[0].weighted  " in line)
    assert row.split()[:3] == ["attn_norm[0].weighted", "not", "finite"]
    assert f"{OVERFLOWS}: the logits are not finite in chunk 2" in text and "nan" not in text


def test_a_sweeps_baseline_ends_it(nan, executor):
    run = swept(nan, executor, chunk_order="first")
    with pytest.raises(NotFiniteError, match=f"^baseline: the logits are {EMBEDDING_SAID}$"):
        list(run)
    assert {run.text.indices[chunk] for _, chunk in run.finished} == {0}


def test_a_run_that_is_gone_on_with_finds_the_node_again(overflows, executor):
    before, after = swept(overflows, executor), swept(overflows, executor)
    list(before)
    after.finished.update(before.finished)
    after.find_lost()
    assert after.not_finite == before.not_finite != {}


# ---------------------------------------------------------------- sampling and timing


@pytest.mark.parametrize("temp", [0, 0.8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_is_sampled_from_what_is_not_finite(temp, value):
    logits = np.array([0, 1, value, 2], np.float32)
    with pytest.raises(NotFiniteError, match="not finite"):
        Sampler(temp=temp).sample(logits)


@pytest.mark.parametrize("batch", [1, 512])
def test_generation_ends_where_it_is_not_finite(tmp_path, tiny, executor, batch):
    prompt = tiny.tokenizer.encode("Hello world Hello")
    sound = list(generate(Context(tiny, 64, executor), prompt, 6, Sampler()))
    at = next(i for i in range(1, 6) if sound[i] not in prompt + sound[:i])
    model = written(tmp_path / "m.gguf", ("token_embd.weight", sound[at], np.nan))
    made = []
    n = len(prompt) + at + 1
    with pytest.raises(NotFiniteError, match=rf"^after {n} tokens: .* inp_embd \(GET_ROWS\), at token {n}$"):
        for token in generate(Context(model, 64, executor), prompt, 6, Sampler(), batch=batch):
            made.append(token)
    assert made == sound[: at + 1]


def test_a_timed_configuration_is_named(overflows, executor):
    """Not one that would have met its keys and values in the cache that all of them share."""
    configurations = [
        Configuration(name, FakeQuant(overflows.values, rules).rules)
        for name, rules in {
            "baseline": [],
            "steady": [STEADY],
            "guilty": [OVERFLOWS],
            "late": [STEADY],
        }.items()
    ]
    for seed in range(4):  # of the order
        run = Overhead(
            overflows,
            overflows.tokenizer.encode(f"Hello {WORD} world"),
            configurations,
            n_predict=2,
            batch=3,
            rounds=2,
            seed=seed,
            executor=executor,
        )
        said = r"^guilty: the logits are not finite; the first node that is not is attn_norm-0 .* at token 3$"
        with pytest.raises(NotFiniteError, match=said):
            list(run)


# ---------------------------------------------------------------- commands


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def measured(model: Model, text: Path, *options: str, status: int) -> tuple[str, str]:
    where = "-m", model.path, "-f", text, "-c", N_CTX, "--chunk-order", "first"
    return fq(*options[:1], *where, *options[1:], status=status)


def test_perplexity_of_a_stream(overflows, text, tmp_path):
    path = tmp_path / "p.json"
    out, err = measured(
        overflows, text, "perplexity", "--fake-quant", OVERFLOWS, "--json", str(path), status=1
    )
    assert err.count("fq: quantised: the logits are not finite in chunk 2; ") == 1
    assert "attn_norm-0 (RMS_NORM_MUL), at token 14 of the chunk" in err
    assert "NOT FINITE: the logits of 15 of 90 tokens scored" in out and "100.000 ±" not in out
    data = json.loads(path.read_text())
    assert data["not_finite"] == NORM and not data["partial"]


def test_perplexity_of_the_baseline_prints_what_it_has(nan, text, tmp_path):
    path = tmp_path / "p.json"
    out, err = measured(nan, text, "perplexity", "--json", str(path), status=1)
    assert "fq: error: baseline: the logits are not finite in chunk 2" in err.splitlines()[-1]
    assert "inp_embd (GET_ROWS), at token 14 of the chunk" in err
    assert "PARTIAL" in out and "nan" not in out and json.loads(path.read_text())["n_chunks"] == 1


def test_sweep_store_and_results(overflows, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, path = tmp_path / "s.sqlite", tmp_path / "s.json"
    options = [
        "--sites",
        "attn_norm[*].weighted",
        "--format",
        "f16",
        "--store",
        str(store),
        "--json",
        str(path),
    ]
    said = (
        f"fq: {OVERFLOWS}: the logits are not finite in chunk 2; the first node that is not is attn_norm-0 "
    )
    out, err = measured(overflows, text, "sweep", *options, status=1)
    assert err.count(said) == 1 and "not finite" in out
    cells = {cell["name"]: cell for cell in json.loads(path.read_text())["cells"]}
    assert cells[OVERFLOWS]["not_finite"] == NORM and cells[STEADY]["not_finite"] is None
    # all chunks are there, and the status stays
    _, err = measured(overflows, text, "sweep", *options, "--resume", status=1)
    assert err.count(said) == 1

    out, _ = fq("results", "1", "--store", store)
    assert (
        "not finite" in out and f"{OVERFLOWS}: the logits are not finite in chunk 2; 15 of 90 tokens" in out
    )
    out, _ = fq("results", "1", "--store", store, "--cell", OVERFLOWS)
    assert out.startswith(f"{OVERFLOWS}: the logits are not finite in chunk 2\n")
    out, _ = fq("results", "compare", f"1:{STEADY}", f"1:{OVERFLOWS}", "--store", store)
    assert out.splitlines()[4].rstrip().endswith("not finite")

    with Results(store) as results:
        side = Side(1, results.get(1), results.load(1))
    entry = compare_cells([(side, STEADY), (side, OVERFLOWS)])["cells"][0]["of_runs"][1]
    assert (entry["verdict"], entry["ratio"], entry["ratio_ci95_chunks"]) == ("not finite", None, None)
    assert [c["of_runs"][1]["verdict"] for c in compare_runs([side, side])["cells"]] == [
        "not finite",
        "equal",
        "not finite",
    ]


def test_a_store_that_took_nan_for_agreement(overflows, text, tmp_path):
    """As version 0.1.0 did."""
    store = tmp_path / "s.sqlite"
    options = ["--sites", "attn_norm[0].weighted", "--format", "f16", "--store", str(store)]
    measured(overflows, text, "sweep", *options, status=1)
    with Results(store) as results:
        same = (b"\1" * n_scored_per_chunk(N_CTX),)
        results._db.execute("UPDATE chunks SET same_top = ?, digest = NULL", same)
        found = results.load(1)
    assert found[0, CHUNK].paired.same_top.all() and not found[1, CHUNK].paired.same_top.any()


def test_a_sweeps_baseline_leaves_what_ended(nan, text, tmp_path):
    store = tmp_path / "s.sqlite"
    out, err = measured(nan, text, "sweep", "--store", str(store), status=1)
    assert "fq: error: baseline: the logits are not finite in chunk 2" in err.splitlines()[-1]
    assert "PARTIAL: 6 were asked for" in out
    assert "1 chunks of 32" in fq("results", "1", "--store", store)[0]


@pytest.mark.parametrize("temp", ["0", "1"])
def test_run(nan, tmp_path, temp):
    path = tmp_path / "r.json"
    prompt = f"Hello {WORD}"
    out, err = fq("run", "-m", nan.path, "-p", prompt, "-n", 3, "--temp", temp, "--json", path, status=1)
    assert err.splitlines()[-1] == (
        "fq: error: after 3 tokens: the logits are not finite; "
        "the first node that is not is inp_embd (GET_ROWS), at token 3"
    )
    assert out == prompt + "\n" and json.loads(path.read_text())["partial"]


def test_bench(nan):
    out, err = fq("bench", "-m", nan.path, "-p", f"Hello {WORD}", "--rounds", 2, "-n", 1, status=1)
    assert "baseline: the logits are not finite; the first node that is not is inp_embd" in err and out == ""


def test_replicate(nan, text):
    out, err = fq("replicate", "-m", nan.path, "-f", text, "-c", N_CTX, "--rounds", 2, status=1)
    assert "not finite" in err.splitlines()[-1] and "inp_embd" in err
    assert "1.23437500" in out  # what needs no model
