"""Runs side by side: paired where they are over the same chunks, and refused as pairs where they are not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from compared_runs import CHUNKS, HARD, RUN, TOKENS, A, B, cell, left_of, side

from fq.cli import main
from fq.measure.inference import positive_interval
from fq.results.compare import compare_cells, compare_runs, compare_text
from fq.results.runs import Results


def base():
    return side(1, [0 * HARD, 1e-6 * HARD, 1e-7 * HARD])


def changed(**settings):
    return {"settings": RUN.settings | settings}


def of(data, name):
    return next(c["of_runs"] for c in data["cells"] if c["name"] == name)


def test_a_small_difference_is_resolved_in_pairs():
    noise = 1 + 0.01 * np.random.default_rng(1).standard_normal(HARD.shape)
    data = compare_runs([base(), side(2, [0 * HARD, 1.2e-6 * HARD * noise, 1e-7 * HARD * noise])])
    assert [c["name"] for c in data["cells"]] == [A.name, B.name]
    assert [run["not_paired"] for run in data["runs"]] == [None, None]
    first, second = of(data, A.name)
    assert first == {
        "run": 1,
        "cell": A.name,
        "n_chunks": CHUNKS,
        "mean_kld": pytest.approx(1e-6 * HARD.mean()),
        "mean_kld_ci95_chunks": positive_interval((1e-6 * HARD).mean(axis=1)),
    }
    # the intervals of the two overlap nearly whole
    assert second["mean_kld_ci95_chunks"][0] < 0.9 * first["mean_kld"]
    assert second["paired"] and second["verdict"] == "larger"
    low, high = second["ratio_ci95_chunks"]
    assert 1.18 < low < second["ratio"] < high < 1.22
    assert second["ratio"] == pytest.approx(second["mean_kld"] / first["mean_kld"])
    assert of(data, B.name)[1]["verdict"] == "not resolved"
    assert compare_runs([side(2, [0 * HARD, 1.2e-6 * HARD, HARD]), base()])["cells"][0]["of_runs"][1][
        "verdict"
    ] == "smaller"  # fmt: skip


def test_chunks_are_paired_by_their_place_in_the_text():
    """Runs in other orders: what one has at a place, the other may have at another."""
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    shuffled = side(2, [0 * HARD, 1.2e-6 * HARD[order], HARD[order]], **changed(chunk_indices=order))
    entry = of(compare_runs([base(), shuffled]), A.name)[1]
    assert entry["ratio_ci95_chunks"] == pytest.approx((1.2, 1.2))


def test_p_is_adjusted_over_all_that_is_shown():
    """One difference among many that are none must be surer than one alone."""
    rng = np.random.default_rng(5)
    n = 12
    shape = (n, CHUNKS, TOKENS)
    klds = [1e-6 * HARD * (1 + 0.1 * noise) for noise in rng.standard_normal(shape)]
    klds[0] *= 1.1
    names = tuple(cell(f"ffn_norm[{i}].raw") for i in range(n))
    pair = [side(1, [1e-6 * HARD] * n, cells=names), side(2, klds, cells=names)]
    (alone,) = compare_cells([(one, names[0].name) for one in pair])["cells"]
    among = of(compare_runs(pair), names[0].name)
    assert alone["of_runs"][1]["p"] == among[1]["p"] == alone["of_runs"][1]["p_adjusted"]
    assert among[1]["p_adjusted"] > 10 * among[1]["p"]
    assert alone["of_runs"][1]["verdict"] == "larger" and among[1]["verdict"] == "not resolved"
    assert among[1]["chunks_needed"] > CHUNKS


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"text_sha256": "c" * 64}, f"their texts differ (SHA-256 {'b' * 12}…, {'c' * 12}…)"),
        ({"model_sha256": "c" * 64}, f"their models differ (SHA-256 {'a' * 12}…, {'c' * 12}…)"),
        (changed(n_ctx=16), "they have 12 and 16 tokens per chunk"),
        (changed(n_tokens=98), "they have 99 and 98 tokens of the text"),
        (changed(scored="all"), "they score other tokens of a chunk (second-half, all)"),
        (
            changed(chunk_indices=[CHUNKS + i for i in range(CHUNKS)], chunk_seed=7),
            "they have no chunk of the text in common (chunk seeds 0 and 7)",
        ),
    ],
    ids=["text", "model", "context", "tokens", "scored", "chunks"],
)
def test_other_chunks_are_not_paired(changes, said):
    others = [
        side(n, [0 * HARD, f * 1e-6 * HARD, HARD], **changes) for n, f in ((2, 1.2), (3, 30), (4, 0.01))
    ]
    data = compare_runs([base(), *others])
    assert [run["not_paired"] for run in data["runs"]] == [None, said, said, said]
    for entry, verdict in zip(of(data, A.name)[1:], ("not resolved", "larger", "smaller"), strict=True):
        assert entry["ratio"] is entry["ratio_ci95_chunks"] is None and not entry["paired"]
        assert entry["verdict"] == verdict and entry["mean_kld_ci95_chunks"]
    text = compare_text(data)
    assert (
        f"run 2 is not paired with run 1: {said}. There are their intervals and Welch's test, and no ratio"
        in text
    )


def test_pairs_are_of_the_chunks_that_all_of_them_have():
    data = compare_runs(
        [
            base(),
            side(2, [0 * HARD, 2e-6 * HARD, HARD], chunks=(0, 2, 3, 5)),
            side(3, [0 * HARD, 3e-6 * HARD, HARD], chunks=(2, 3, 5, 6)),
            side(4, [0 * HARD, HARD, HARD], chunks=(6, 7), text_sha256="c" * 64),
        ]
    )
    entries = of(data, A.name)
    assert [entry["n_chunks"] for entry in entries] == [3, 3, 3, 2]
    assert entries[0]["mean_kld"] == pytest.approx(1e-6 * HARD[[2, 3, 5]].mean())
    assert [entry["ratio"] for entry in entries[1:]] == [pytest.approx(2), pytest.approx(3), None]
    assert [entry["verdict"] for entry in entries[1:]] == ["too few chunks"] * 3
    assert "below 4 chunks there is no interval" in compare_text(data)


def test_pairs_are_of_the_texts_chunks_whatever_their_order():
    """Positions in the run say nothing: the same chunk is one place of the text."""
    order = list(range(3, CHUNKS + 3))[::-1]  # of places 3 to n + 2, the last first
    there = {place: kld for place, kld in enumerate(HARD)}
    other = np.stack([there.get(place, HARD[0]) for place in order])
    data = compare_runs([base(), side(2, [0 * other, 2e-6 * other, other], **changed(chunk_indices=order))])
    second = of(data, A.name)[1]
    assert second["n_chunks"] == CHUNKS - 3 and second["paired"]
    assert second["mean_kld"] == pytest.approx(2e-6 * HARD[3:].mean())
    assert second["ratio_ci95_chunks"] == pytest.approx((2, 2))


def test_no_chunk_in_common_and_one():
    # of the first none has ended, and all are 0 of the one that has
    none = compare_runs([side(1, [0 * HARD] * 3, chunks=()), side(2, [HARD] * 3, text_sha256="c" * 64)])
    assert of(none, A.name)[1]["verdict"] == "too few chunks"
    for chunks, n, verdict in (((), 0, "too few chunks"), ((3,), 1, "too few chunks")):
        data = compare_runs([base(), side(2, [HARD, 2e-6 * HARD, HARD], chunks=chunks)])
        entry = of(data, A.name)[1]
        assert (entry["n_chunks"], entry["verdict"], entry["ratio_ci95_chunks"]) == (n, verdict, None)
        assert entry["ratio"] == (pytest.approx(2) if n else None)
        assert verdict in compare_text(data)


def test_equal_and_zero():
    zero, one = [0 * HARD] * 3, [HARD] * 3
    for first, second, verdict in (
        (one, one, "equal"),
        (zero, zero, "equal"),
        (zero, one, "larger"),
        (one, zero, "smaller"),
    ):
        entry = of(compare_runs([side(1, first), side(2, second)]), A.name)[1]
        assert entry["verdict"] == verdict
        assert entry["ratio"] == (None if first is zero else second is one)


def test_what_differs_in_one_chunk_alone_is_not_told():
    once = np.zeros_like(HARD)
    once[2] = HARD[2]
    entry = of(compare_runs([side(1, [once] * 3), side(2, [2 * once] * 3)]), A.name)[1]
    assert (entry["verdict"], entry["p"]) == ("0 in nearly all chunks", None)


def test_cells_are_found_by_name():
    """At whatever place they stand, and where one has more of them."""
    other = side(2, [1e-7 * HARD, 0 * HARD, 3e-6 * HARD], cells=(B, RUN.cells[0], A))
    assert [of(compare_runs([base(), other]), c.name)[1]["ratio"] for c in (A, B)] == pytest.approx([3, 1])
    fewer = side(2, [0 * HARD, 3e-6 * HARD], cells=(RUN.cells[0], A))
    assert [c["name"] for c in compare_runs([base(), fewer])["cells"]] == [A.name]
    none = side(2, [HARD], cells=(cell("attn_norm[0].raw"),))
    assert compare_text(compare_runs([base(), none])).endswith("no cell of run 1 is in another of them")


def test_two_cells_of_one_run():
    one = base()
    data = compare_cells([(one, A.name), (one, B.name)])
    assert [run["run"] for run in data["runs"]] == [1]
    (entries,) = (c["of_runs"] for c in data["cells"])
    assert [entry["cell"] for entry in entries] == [A.name, B.name]
    assert entries[1]["ratio"] == pytest.approx(0.1) and entries[1]["verdict"] == "smaller"
    assert B.name in compare_text(data)


# ---------------------------------------------------------------- the command


@pytest.fixture
def results(tmp_path):
    """The command's arguments, with a store of two runs."""
    path = tmp_path / "store.sqlite"
    with Results(path) as store:
        for factor in (1, 2):
            number = store.add(RUN)
            for (i, chunk), left in side(number, [0 * HARD, factor * HARD, HARD]).finished.items():
                store.save(number, i, chunk, left)
    return ["results", "--store", str(path)]


def test_the_command(results, capsys):
    assert main([*results, "compare", "1", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    a, b = (next(i for i, row in enumerate(rows) if row[:1] == [c.name]) for c in (A, B))
    assert rows[a + 1][0] == rows[b + 1][0] == "2"
    assert rows[a + 1][-6:] == ["2", "2", "to", "2", "0", "larger"] and rows[b + 1][-1] == "equal"
    assert main([*results, "compare", "2:[0]", "2:[1]", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [e["cell"] for e in data["cells"][0]["of_runs"]] == [A.name, B.name]
    assert data["cells"][0]["of_runs"][1]["ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "args, said",
    [
        (["compare"], "compare needs two runs or more"),
        (["compare", "1"], "compare needs two runs or more"),
        (["compare", "1", "x"], "RUN must be the number of a run, not 'x'"),
        (["compare", "1", "7"], "there is no run 7"),
        (["compare", "1", "1"], "compare needs different runs"),
        (["compare", "1:[0]", "2"], "a CELL of each run, or of none"),
        (["compare", "1:ffn", "2:ffn"], "'ffn' is in the names of several cells of run 1"),
        (["compare", "1", "2", "--csv", "-"], "--csv needs the number of a run"),
        (["one"], "RUN must be the number of a run, not 'one'"),
        (["1", "2"], "one run at a time, or fq results compare 1 2"),
        (["compare", "1", "2", "--cell", "[0]"], "--cell needs the number of a run"),
        (["--cell", "[0]"], "--cell needs the number of a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(results, capsys, args, said):
    assert main([*results, *args]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and err.count("\n") == 1


def test_baselines_that_differ_are_said_to():
    other = side(2, [0 * HARD, 1e-6 * HARD, 1e-7 * HARD], **changed(activations="ggml"))
    assert "baselines differ, too, in activations (exact, ggml)" in compare_text(
        compare_runs([base(), other])
    )
    same = side(2, [0 * HARD, 1e-6 * HARD, 1e-7 * HARD])
    assert "baselines" not in compare_text(compare_runs([base(), same]))


def test_what_a_store_says_does_not_reach_the_terminal_raw(tmp_path, capsys):
    cells = (RUN.cells[0], replace(A, name="\x1b]0;title\x07"))
    path = str(tmp_path / "s.sqlite")
    with Results(path) as store:
        number = store.add(replace(RUN, cells=cells, settings=RUN.settings | {"model": "m\x1b[2J.gguf"}))
        for c in range(CHUNKS):
            for i in range(2):
                store.save(number, i, c, left_of(HARD[c] * i))
    for arguments in ([], [str(number)]):
        assert main(["results", *arguments, "--store", path]) == 0
        assert "\x1b" not in capsys.readouterr().out
