"""The sweep: each cell says what a measurement of its own says, however the work is cut."""

from __future__ import annotations

import json
import math
import os
import tracemalloc

import numpy as np
import pytest
from command_line import fq
from compared_runs import HARD, RUN, side

from fq import FqError, Model, Perplexity, Sweep, cells_of
from fq.commands.show_sweep import sweep_text
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq.measure.cells import Cell
from fq.measure.figures import figures
from fq.measure.statistics import is_exactly_zero
from fq.run.trace import Trace
from fq.run.weights import PANEL_ELEMENTS
from fq_kernels.rules import FakeQuant

N_CTX, CHUNKS, BATCH = 32, 3, 12
SITES = ["ffn_norm[*].raw", "*[*].weighted"]
FORMATS = ["bf16", "int4", "bf16:stochastic,seed=3", "bf16:first-call", "int8:tensor"]


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))


def started(model, tokens, executor, cells, **options):
    return Sweep(
        model,
        tokens,
        cells,
        executor=executor,
        **({"n_ctx": N_CTX, "chunks": CHUNKS, "batch": BATCH} | options),
    )


def finished(*args, **options):
    run = started(*args, **options)
    steps = []
    total, run.on_step = run.steps, lambda: steps.append(1)
    assert sorted(run) == [(i, c) for i in range(len(run.cells)) for c in range(CHUNKS)]
    assert len(steps) == total and run.steps == 0
    return run.result()


# ---------------------------------------------------------------- cells


def test_cells_of_a_layers_norms(tiny):
    cells = cells_of(tiny, ["ffn_norm", "*[*].weighted"], ["bf16", "int4"], cumulative=True)
    assert [(c.name, c.kind, c.rules) for c in cells[:4]] == [
        ("control", "control", ()),
        ("ffn_norm[0].raw=bf16", "single", ("ffn_norm[0].raw=bf16",)),
        ("ffn_norm[1].raw=bf16", "single", ("ffn_norm[1].raw=bf16",)),
        ("ffn_norm[*].raw=bf16", "together", ("ffn_norm[*].raw=bf16",)),
    ]
    last = [c for c in cells if c.group == "*[*].weighted=int4"]
    sites = ["attn_norm[0]", "ffn_norm[0]", "attn_norm[1]", "ffn_norm[1]", "output_norm"]
    assert [c.name for c in last if c.kind == "single"] == [f"{s}.weighted=int4" for s in sites]
    # one site is a single cell, all are the ones together
    up_to = [c for c in last if c.kind == "cumulative"]
    assert [c.name for c in up_to] == [f"up to {s}.weighted=int4" for s in sites[1:-1]]
    assert [len(c.rules) for c in up_to] == [2, 3, 4]


def test_one_site_has_no_together(tiny):
    assert [c.kind for c in cells_of(tiny, ["output_norm"])] == ["control", "single"]


@pytest.mark.parametrize(
    "sites, formats, said",
    [
        (["ffn_norm[7]"], ["bf16"], "matches no site"),
        (["fnn_norm"], ["bf16"], "matches no site; there are inp_embd, attn_norm"),
        (["ffn_norm"], ["bf61"], "unknown format 'bf61'"),
        (["ffn_norm", "ffn_norm[*].raw"], ["bf16"], "is asked for twice"),
    ],
)
def test_cells_that_cannot_be(tiny, sites, formats, said):
    with pytest.raises(FqError, match=said):
        cells_of(tiny, sites, formats)


# ---------------------------------------------------------------- figures


def test_each_cell_is_what_it_is_alone(tiny, tokens, executor):
    cells = cells_of(tiny, SITES, FORMATS, cumulative=True)
    result = finished(tiny, tokens, executor, cells)
    # with a trace each stream is evaluated by itself
    assert is_exactly_zero(result["cells"][0]["comparison"]) and result["cells"][0]["exactly_zero"]
    for cell, found in zip(cells[1:], result["cells"][1:], strict=True):
        with Trace(os.devnull, {}) as trace:
            alone = Perplexity(
                tiny, tokens, n_ctx=N_CTX, chunks=CHUNKS, batch=BATCH, executor=executor,
                fake_quant=FakeQuant(tiny.values, cell.rules), trace=trace,
            )  # fmt: skip
            assert list(alone) == list(range(CHUNKS))
        expected = alone.result()
        assert found["comparison"] == expected["comparison"], cell
        for got, want in zip(found["sites"], expected["fake_quant"]["sites"], strict=True):
            assert got.keys() == want.keys()
            for key, value in want.items():
                # sums over chunks are added in another order
                close = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
                assert got[key] == close, (cell, key)
        assert result["ppl_base"] == expected["comparison"]["ppl_base"]


def test_memory_is_bounded_and_nothing_else_changes(tiny, tokens, executor):
    cells = cells_of(tiny, ["*"], ["bf16"])
    whole = finished(tiny, tokens, executor, cells)
    with pytest.raises(FqError, match=r"1 MB is too little for one cell, which takes \d MB") as e:
        started(tiny, tokens, executor, cells, memory_limit=1_000_000)
    least = int(str(e.value).split()[-2]) * 1_000_000
    run = started(tiny, tokens, executor, cells, memory_limit=least + 500_000)
    assert 1 <= run.cells_at_a_time
    run.cells_at_a_time = 2
    # the baseline runs once more for each further group of a chunk
    assert run.steps == started(tiny, tokens, executor, cells).steps + CHUNKS * 3 * run._fork.steps(
        None, N_CTX - 1, N_CTX // 2
    )
    assert len(list(run)) == len(cells) * CHUNKS
    assert run.result() == whole


@pytest.mark.parametrize("batch", [40, 128])
def test_the_memory_is_what_the_limit_is_held_against(tmp_path, executor, batch):
    shape = tiny_shape(n_layer=6, n_embd=256, n_ff=512, n_vocab=3000, n_ctx_train=128)
    write_llama_gguf(tmp_path / "model.gguf", shape)
    model = Model(tmp_path / "model.gguf")
    cells = cells_of(model, ["*"], ["bf16", "int4"])
    for _ in started(model, range(3, 131), executor, cells[-1:], n_ctx=128):
        pass  # what the threads keep as their own is made at the first use
    tracemalloc.start()
    try:
        run = started(model, range(3, 131), executor, cells, n_ctx=128, batch=batch)
        for _ in run:
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    fixed, cell = run.memory
    scratch = executor.threads * 4 * PANEL_ELEMENTS
    assert fixed + len(cells) * cell - scratch < 1.3 * peak and peak < fixed + len(cells) * cell
    assert len(cells) * cell > 0.2 * peak  # the cells' share is worth the test


def test_an_interrupted_sweep_goes_on(tiny, tokens, executor):
    cells = cells_of(tiny)
    whole = finished(tiny, tokens, executor, cells)
    run = started(tiny, tokens, executor, cells)
    n = len(cells)
    steps = iter(run)
    for _ in range(n + 2):
        next(steps)
    steps.close()
    partial = run.result()
    assert partial["partial"] and partial["n_chunks"] == 1
    again = [at for at in run]
    assert again == [(i, c) for c in (1, 2) for i in range(n) if (i, c) not in [(0, 1), (1, 1)]]
    assert run.result() == whole


def test_additivity_and_ranks(tiny, tokens, executor):
    result = finished(tiny, tokens, executor, cells_of(tiny, SITES))
    for group in result["groups"]:
        mine = [c for c in result["cells"] if c["group"] == group["name"]]
        single = [c for c in mine if c["kind"] == "single"]
        (together,) = (c["comparison"]["mean_kld"] for c in mine if c["kind"] == "together")
        assert together > 0
        assert group["additivity"] == pytest.approx(
            together / sum(c["comparison"]["mean_kld"] for c in single)
        )
        assert group["additivity_ci95_chunks"] is None  # of so few chunks
        assert not any("rank" in c for c in single)
    json.dumps(result, allow_nan=False)


def test_additivity_draws_the_same_chunks_for_all_its_cells():
    """Chunks differ tenfold, and the ratio is the same in each: its interval is a point."""
    group = RUN.cells[1].group
    cells = (*RUN.cells, Cell(group, "together", group, (group,)))
    run = side(1, [0 * HARD, HARD, 2 * HARD, 3.3 * HARD])
    result = figures(RUN.about, cells, run.finished)
    (found,) = result["groups"]
    assert found["additivity"] == pytest.approx(1.1)
    assert found["additivity_ci95_chunks"] == pytest.approx((1.1, 1.1))
    assert "additivity ratio 1.100   95 % over chunks: 1.100 to 1.100\n" in sweep_text(result)
    assert [cell.get("rank") for cell in result["cells"]] == [None, [2, 2], [1, 1], None]
    assert found["pairs"] == {"n": 1, "ordered": 1, "chunks_for_the_next": None}
    few = figures(RUN.about | {"n_chunks_asked": 3}, cells, run.finished)
    assert few["groups"][0]["additivity_ci95_chunks"] is None
    assert not any("rank" in cell for cell in few["cells"])
    text = sweep_text(few)
    assert "additivity ratio 1.100\n" in text and "below 4 chunks there are no intervals" in text
    assert "few" not in sweep_text(result)
    several = sweep_text(figures(RUN.about | {"n_chunks_asked": 5}, cells, run.finished))
    assert "5 chunks are few" in several


def test_without_all_of_its_cells_a_group_has_no_ranks_and_no_additivity():
    """As of shards of which some are missing: what is left would pass for all of it."""
    group = RUN.cells[1].group
    cells = (*RUN.cells, Cell(group, "together", group, (group,)))
    finished = side(1, [0 * HARD, HARD, 2 * HARD, 3.3 * HARD]).finished
    whole = figures(RUN.about, cells, finished)
    some = {at: left for at, left in finished.items() if at not in ((1, 2), (1, 5))}
    result = figures(RUN.about, cells, some)
    (found,) = result["groups"]
    assert result["behind"] == found["behind"] == [cells[1].name] and result["n_chunks"] == len(HARD)
    assert math.isnan(found["sum_of_single_klds"]) and found["additivity"] is None
    assert found["additivity_ci95_chunks"] is None and found["pairs"]["n"] == 0
    kept = [{k: v for k, v in cell.items() if k != "rank"} for cell in whole["cells"] if cell["cell"] != 1]
    assert result["cells"] == kept and found["kld_together"] == whole["groups"][0]["kld_together"]
    text = sweep_text(result)
    assert "no ranks and no additivity ratio: 1 of 2 cells to be ranked are left out\n" in text
    # one chunk apart, as a run's own cells are for a while, all are there
    some = {at: left for at, left in finished.items() if at != (1, 7)}
    assert figures(RUN.about, cells, some)["groups"][0]["additivity"] == pytest.approx(1.1)
    # of a cell together alone nothing is missing but the additivity
    some = {at: left for at, left in finished.items() if at[0] < 3}
    (found,) = figures(RUN.about, cells, some)["groups"]
    assert found["behind"] == [] and found["sum_of_single_klds"] == whole["groups"][0]["sum_of_single_klds"]
    assert "additivity" not in found


def test_a_cell_without_a_chunk_takes_no_figures_from_one_that_has_one():
    finished = side(1, [0 * HARD, HARD, 2 * HARD], chunks=[0]).finished
    cells = (*RUN.cells, Cell("ffn_norm[0].raw=int8", "single", "g", ("ffn_norm[0].raw=int8",)))
    result, had = figures(RUN.about, cells, finished), figures(RUN.about, RUN.cells, finished)
    assert result["behind"] == [cells[-1].name] and result["n_chunks"] == 1
    assert result["cells"] == had["cells"] and result["groups"] == had["groups"]
    assert figures(RUN.about, cells, {})["behind"] == []


def test_what_figures_take_goes_by_what_has_ended():
    """Not by the chunks that a store of another's says were asked for."""
    finished = side(1, [0 * HARD, HARD, 2 * HARD], chunks=[0, 2]).finished
    result = figures(RUN.about | {"n_chunks_asked": 1 << 45}, RUN.cells, finished)
    assert result["n_chunks"] == 2 and result["chunks_of_text"] == [0, 2] and result["partial"]


def test_ranks_are_of_paired_tests():
    """Layers that share their chunks' hardness are told apart though their intervals overlap."""
    noise = 1 + 0.01 * np.random.default_rng(1).standard_normal((2, *HARD.shape))
    klds = [0 * HARD, HARD, 1.2 * HARD * noise[0]]
    cells = (
        *RUN.cells,
        Cell("ffn_norm[2].raw=bf16", "single", RUN.cells[1].group, ("ffn_norm[0].raw=bf16",)),
    )
    result = figures(RUN.about, cells, side(1, [*klds, HARD * noise[1]]).finished)
    assert [cell.get("rank") for cell in result["cells"]] == [None, [2, 3], [1, 1], [2, 3]]
    assert result["groups"][0]["pairs"]["ordered"] == 2
    assert "of 3 pairs the order of 2 is resolved; one more would take some" in sweep_text(result)


# ---------------------------------------------------------------- command


@pytest.fixture
def sweep(tiny_path, tmp_path):
    """The command's arguments, with a store of the test's own."""
    return ["sweep", "-m", tiny_path, "-c", 32, "--store", tmp_path / "store.sqlite"]


def test_the_command(sweep):
    out, err = fq(*sweep, "--chunks", 2, "--format", "int4", "--json", "-")
    data = json.loads(out)
    assert [c["name"] for c in data["cells"]] == [
        "control",
        "ffn_norm[0].raw=int4",
        "ffn_norm[1].raw=int4",
        "ffn_norm[*].raw=int4",
    ]
    assert data["n_chunks"] == 2 and not data["partial"]
    assert all(math.isfinite(c["comparison"]["mean_kld"]) for c in data["cells"])
    assert "[2/2] 4 cells" in err and "additivity ratio" in err and "exactly 0" in err


def test_the_seed_is_of_the_formats_that_name_none(sweep, tiny_path):
    specs = ["bf16:stochastic", "bf16:stochastic,SEED=3", "bf16:stochastic,first-call", "bf16"]
    options = [word for spec in specs for word in ("--format", spec)]
    out, _ = fq(*sweep, "--chunks", 2, "--sites", "ffn_norm[1]", *options, "--seed", 7, "--json", "-")
    found = {cell["name"]: cell["comparison"] for cell in json.loads(out)["cells"]}
    names = [f"ffn_norm[1].raw=bf16{end}" for end in (":stochastic,seed=7", ":stochastic,seed=3")]
    assert list(found) == [
        "control", *names, "ffn_norm[1].raw=bf16:stochastic,seed=7,first-call", "ffn_norm[1].raw=bf16"
    ]  # fmt: skip
    for spec, name in zip(specs, names, strict=False):
        options = ["--fake-quant", f"ffn_norm[1]={spec}", "--seed", 7, "--chunks", 2, "-c", 32]
        alone = json.loads(fq("perplexity", "-m", tiny_path, *options, "--json", "-")[0])
        assert alone["comparison"] == found[name]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--memory-limit", "much"], "--memory-limit must be a size such as 500M or 2G, not 'much'"),
        (["--memory-limit", "1K"], "is too little for one cell"),
        (["--sites", "ffn_norm[9]"], "matches no site"),
        (["--format", "bf61"], "unknown format 'bf61'"),
        (["--seed", "-1"], "--seed must be >= 0, not -1"),
        (["--format", "bf16:stochastic", "--seed", str(2**64)], "seed must be between 0 and 2**64 - 1"),
        (["-c", "1000"], "the model allows at most 128"),
    ],
)
def test_what_the_command_refuses(sweep, options, said):
    _, err = fq(*sweep, "--chunks", 1, *options, status=2)
    assert said in err and err.count("\n") == 1
