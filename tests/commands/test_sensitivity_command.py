"""fq sensitivity as a user has it: figures, files, resumption, and other runs beside it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import signal
import sqlite3
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import fq
from stored_runs import CELL, killed_at_statement, left_of

from fq import FqError
from fq.commands.exact import Exact
from fq.measure.chunks import Settings
from fq.results.compare_estimates import compare_estimate, compare_estimate_text
from fq.results.runs import Results, stored_figures

SITES = ["--sites", "ffn_norm[*].raw", "--sites", "k", "--sites", "attn_norm[1].in"]
FORMATS = ["--format", "bf16", "--format", "fp8_e4m3fn:truncate", "--format", "int8"]
VERIFY = 6


@pytest.fixture(scope="module")
def command(tiny_path):
    return ["sensitivity", "-m", tiny_path, "-c", 64, "--verify", VERIFY, *SITES, *FORMATS]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """(store, figures, what it printed)"""
    folder = tmp_path_factory.mktemp("sensitivity")
    store, file = folder / "store.sqlite", folder / "figures.json"
    out, _ = fq(*command, "--chunks", 4, "--store", store, "--json", file)
    sweep = ["sweep", "-m", tiny_path_of(command), "-c", 64, "--chunks", 4, "--store", store]
    fq(*sweep, *SITES[:2], *FORMATS[:4])
    return store, json.loads(file.read_text()), out


def tiny_path_of(command):
    return command[command.index("-m") + 1]


def test_a_cell_that_is_not_finite_is_said_by_the_status(command, tmp_path, monkeypatch):
    lost = Exact.lost.fget
    one = Exact(*[None] * 8, left={(0, 0): left_of(1)})
    assert not lost(one)
    one.left[0, 0].paired.kld[2] = np.nan
    assert lost(one)
    monkeypatch.setattr(Exact, "lost", True)
    fq(*command, "--chunks", 1, "--store", tmp_path / "s.sqlite", status=1)


class Measured(list):
    """A sweep whose one cell has ended."""

    finished, not_finite, steps = {(0, 0): left_of(1)}, {0: {"chunk": 3}}, 1


def test_and_with_its_chunk(monkeypatch, capsys):
    monkeypatch.setattr("fq.commands.exact.Sweep", lambda *_, **options: Measured([(0, 0)]))
    store, run = SimpleNamespace(save=lambda *_: None), SimpleNamespace(cells=[CELL])
    Exact(None, [], Settings(), None, None, store, 1, run, {}).measure([CELL], 1, "exact")
    assert f"{CELL.name}: the logits are not finite in chunk 4" in capsys.readouterr().err


def test_figures(whole):
    _, data, out = whole
    assert data["n_chunks"] == 4 and not data["partial"]
    cells = {(cell["site"], cell["format"]): cell for cell in data["cells"]}
    assert len(cells) == 5 * 3
    assert all(cell["mean_kld"] > 0 and cell["mean_kld_ci95"] for cell in data["cells"])
    assert len(data["verified"]) == VERIFY and data["model_error"]["n"] <= VERIFY
    # a norm undoes a change of what it reads
    assert cells["attn_norm[1].in", "fp8_e4m3fn:truncate"]["along"] == 0
    assert cells["k[0]", "fp8_e4m3fn:truncate"]["along"] > 0
    assert "5 sites in 3 formats" in out and "exact / estimate of " in out
    assert "dearest in int8" in out


def test_the_store_shows_the_same(whole):
    store, data, out = whole
    again, _ = fq("results", 1, "--store", store)
    assert again == out
    listed, _ = fq("results", "--store", store)
    assert "15       4    all" in listed
    shown, _ = fq("results", 1, "--store", store, "--cell", "k[0]=bf16", "--cell", "norm[1].in=int8")
    assert "k[0]=bf16" in shown and "attn_norm[1].in=int8" in shown and "k[1]" not in shown
    text, _ = fq("results", 1, "--store", store, "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 15
    for row, cell in zip(rows, data["cells"], strict=True):
        assert row["name"] == f"{cell['site']}={cell['format']}"
        assert float(row["mean_kld"]) == cell["mean_kld"]
    assert sum(bool(row["exact"]) for row in rows) == VERIFY


def test_what_was_verified_is_what_a_sweep_measures(whole):
    store, data, _ = whole
    with Results(store) as results:
        swept = {cell["name"]: cell["comparison"]["mean_kld"] for cell in stored_figures(results, 2)["cells"]}
    both = [one for one in data["verified"] if f"{one['site']}={one['format']}" in swept]
    assert both
    for one in both:
        assert one["exact"] == pytest.approx(swept[f"{one['site']}={one['format']}"], rel=1e-12)


def test_pairs_are_measured_as_two_rules_are(tiny_path, tmp_path):
    store, page = tmp_path / "s.sqlite", tmp_path / "page.html"
    arguments = ["sensitivity", "-m", tiny_path, "-c", 64, "--chunks", 4, "--verify", 2, *SITES, *FORMATS[:2]]
    fq(*arguments, "--store", store)
    out, _ = fq(*arguments, "--store", store, "--resume", "--pairs", 3, "--json", tmp_path / "f.json")
    data = json.loads((tmp_path / "f.json").read_text())
    assert len(data["pairs"]) == 3 and not data["partial"]
    assert len({site for one in data["pairs"] for site in one["sites"]}) == 3
    exact = {one["site"]: one["exact"] for one in data["verified"]}
    for one in data["pairs"]:
        assert one["alone"] == [exact[site] for site in one["sites"]]
        assert f"{one['sites'][0]} + {one['sites'][1]} in bf16" in out
    one = data["pairs"][0]
    rules = [word for site in one["sites"] for word in ("--fake-quant", f"{site}=bf16")]
    shown, _ = fq("perplexity", "-m", tiny_path, "-c", 64, "--chunks", 4, *rules, "--json", "-")
    assert one["mean_kld"] == pytest.approx(json.loads(shown)["comparison"]["mean_kld"], rel=1e-12)
    fq("report", 1, "--store", store, "-o", page)
    assert "Two sites at a time, measured exactly" in page.read_text()
    assert fq("results", 1, "--store", store)[0] == out


def test_resumed_is_whole(command, tmp_path):
    """After chunks without a cell verified, on to more chunks and cells."""
    store, file = tmp_path / "store.sqlite", tmp_path / "figures.json"
    # gains on all chunks: on as few as are needed is on more, where fewer were known before
    begin = [*command, "--store", store, "--gain-chunks", -1]
    fq(*begin, "--chunks", 4, "--store", tmp_path / "whole.sqlite", "--json", file)
    data = json.loads(file.read_text())
    first = list(begin)
    first[begin.index("--verify") + 1] = 0
    fq(*first, "--chunks", 2)
    _, err = fq(*begin, "--chunks", 4, "--resume", "--json", file)
    assert "going on with run 1: 2 of 4 chunks are there" in err
    again = json.loads(file.read_text())
    assert again["cells"] == data["cells"] and again["verified"] == data["verified"]
    _, err = fq(*begin, "--resume", "--json", file)
    assert "4 of 4 chunks are there" in err and json.loads(file.read_text())["cells"] == data["cells"]


def test_killed_and_resumed_is_whole(command, whole, tmp_path):
    _, data, _ = whole
    rng, killed, status = random.Random(1), 0, -1
    arguments = [*command, "--chunks", 4, "--store", "s.sqlite", "--resume", "--json", "f.json"]
    for _ in range(40):
        _, status = killed_at_statement(rng.randrange(5, 120), arguments, tmp_path)
        killed += status == -signal.SIGKILL
        if not status:
            break
    assert status == 0 and killed >= 2
    assert json.loads((tmp_path / "f.json").read_text())["cells"] == data["cells"]
    with Results(tmp_path / "s.sqlite") as store:
        assert len(store.list()) == 1


@pytest.mark.parametrize(("asked", "chunks"), [(1, 1), (-1, 4), (9, 4)])
def test_gains_on_as_many_chunks_as_are_asked_for(command, tmp_path, asked, chunks):
    arguments = [*command, "--chunks", 4, "--gain-chunks", asked, "--store", tmp_path / "s.sqlite"]
    arguments[arguments.index("--verify") + 1] = 0
    fq(*arguments)
    with Results(tmp_path / "s.sqlite") as store:
        of_gain = [i for i, cell in enumerate(store.get(1).cells) if cell.kind == "gain"]
        left = store.load(1)
    assert of_gain and set(left) == {(i, c) for i in of_gain for c in range(chunks)}


def test_beside_a_sweep(whole):
    store, _, _ = whole
    out, _ = fq("results", "compare", 2, 1, "--store", store)
    assert "run 1, an estimate, beside run 2: they share no kind of site and format with 3 cells" in out
    with Results(store) as results:
        sides = [(results.get(n), stored_figures(results, n)) for n in (1, 2)]
    # the same sites under other names, so that a kind has three
    for (_, data), factor in zip(sides, (1.0, 2.0), strict=True):
        data["cells"] = [
            {
                "site": f"l_out[{i}]", "format": "bf16", "kind": "l_out", "point": None, "mark": None,
                "mean_kld": (i + 1) / factor, "mean_kld_ci95": (0.0, i + 0.6), "by_token": 1.0 + i,
                "by_element": 3.0 - i,
            }
            for i in range(3)
        ]  # fmt: skip
        data["estimate"], data["verified"] = "sensitivity", []
    sides[0][1]["verified"] = [{"site": "l_out[0]", "format": "bf16"}]
    data = compare_estimate(*sides)
    (group,) = data["groups"]
    assert data["unlike"] is None and "baselines" not in compare_estimate_text(data)
    assert (group["n"], group["marked"], group["spearman"]) == (3, 0, 1.0)
    assert (group["ratio_median"], group["ratio_least"], group["ratio_largest"]) == (2.0, 2.0, 2.0)
    # (0 to 1.6) holds 1, (0 to 2.6) holds 1.5; that of the first was measured for the estimate
    assert group["held"] == 1.0 and group["by_element"]["spearman"] == -1.0
    sides[0][1]["cells"][2]["mean_kld_ci95"] = (0.0, 1.4)
    assert compare_estimate(*sides)["groups"][0]["held"] == 0.5
    sides[0][1]["cells"][1]["mark"] = "large"
    (group,) = compare_estimate(*sides)["groups"]
    assert group["marked"] == 1 and group["spearman"] is None
    deployed = replace(sides[1][0], settings=sides[1][0].settings | {"activations": "ggml"})
    for cells in (sides[1][1]["cells"], []):
        data = compare_estimate(sides[0], (deployed, sides[1][1] | {"cells": cells}))
        assert data["unlike"] == "activations (exact, ggml)" and bool(data["groups"]) == bool(cells)
        said = compare_estimate_text(data).splitlines()
        assert said[1] == "their baselines differ, too, in activations (exact, ggml)"


def test_over_other_chunks_nothing_is_compared(whole):
    store, _, _ = whole
    with Results(store) as results:
        one, other = ((results.get(n), stored_figures(results, n)) for n in (1, 2))
    other[1]["chunks_of_text"] = other[1]["chunks_of_text"][::-1]
    with pytest.raises(FqError, match="an estimate is compared over the same chunks: they are of other"):
        compare_estimate(one, other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", 0], "samples must be from 1 to 64, not 0"),
        (["--gain-chunks", 0], "--gain-chunks must be positive, or -1 for all, not 0"),
        (["--verify", -1], "--verify must be >= 0, not -1"),
        (["--pairs", -1], "--pairs must be >= 0, not -1"),
        (["--pairs", 1], "--pairs needs at least 2 sites"),
        (["--activations", "ggml"], "gradients are those of exact activations"),
        (["--memory-limit", "1K"], "a memory limit of 0 MB is too little for one cell"),
        (["--format", "bf99"], "unknown format 'bf99'"),
    ],
)
def test_bad_arguments(command, tmp_path, arguments, words):
    _, err = fq(*command, "--chunks", 1, "--store", tmp_path / "s.sqlite", *arguments, status=2)
    assert words in err


@pytest.mark.parametrize("arguments", [["rank", 1, 2], ["compare", "1:k[0]=bf16", "2:k"], ["compare", 1, 1]])
def test_what_an_estimate_is_not_asked(whole, arguments):
    _, err = fq("results", *arguments, "--store", whole[0], status=2)
    assert "an estimate" in err


def settings_with(path, **changes):
    with contextlib.closing(sqlite3.connect(path)) as db:
        (text,) = db.execute("SELECT settings FROM runs WHERE id = 1").fetchone()
        settings = json.loads(text)
        settings["sensitivity"] |= changes
        db.execute("UPDATE runs SET settings = ?, digest = NULL WHERE id = 1", (json.dumps(settings),))
        db.commit()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sites": []}, "sensitivity's sites are none, or one is there twice"),
        ({"sites": ["k[0]"] * 5}, "sensitivity's sites are none, or one is there twice"),
        ({"sites": ["k[0];"] + [f"k[{i}]" for i in range(4)]}, "k[0]; is no site"),
        ({"sites": [f"k[{i}]" for i in range(5)], "classes": [0] * 4}, "classes are not those of its sites"),
        ({"formats": ["bf16", "bf17", "int8"]}, "unknown format 'bf17'"),
        ({"formats": ["bf16", "b f", "int8"]}, "sensitivity's formats are none"),
        ({"formats": ["bf16", "f16"]}, "estimates are not of 5 sites and 2 formats"),
        ({"columns": ["blocks"]}, "sensitivity's columns lack one of"),
        ({"samples": 0}, "sensitivity's samples or seed are none"),
        ({"classes": ["0"] * 5}, "classes are not those of its sites"),
        ({"more": 1}, "sensitivity does not say what was asked for"),
        ({"sites": "k[0]"}, "sensitivity is not of lists"),
    ],
)
def test_a_damaged_store(whole, tmp_path, changes, words):
    path = tmp_path / "s.sqlite"
    path.write_bytes(whole[0].read_bytes())
    settings_with(path, **changes)
    _, err = fq("results", 1, "--store", path, status=2)
    assert "run 1 cannot be read" in err and words in err


def test_a_format_that_is_no_more_hides_no_other_run(whole, tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(whole[0].read_bytes())
    settings_with(path, formats=["bf16", "gone", "int8"])
    out, _ = fq("results", "--store", path)
    assert out.count("tiny.gguf") == 2
    fq("results", 2, "--store", path)


def test_other_static_scales_are_another_run(command, tmp_path):
    cal, store = tmp_path / "cal.json", tmp_path / "s.sqlite"
    model, sites = tiny_path_of(command), ["--sites", "k"]
    fq("calibrate", "-m", model, "-c", 64, "--chunks", 2, *sites, "-o", cal)
    arguments = ["sensitivity", "-m", model, "-c", 64, "--verify", 0, *sites, "--store", store]
    arguments += ["--format", f"int8:scale=@{cal}"]
    fq(*arguments, "--chunks", 1)
    _, err = fq(*arguments, "--chunks", 2, "--resume")
    assert "going on with run 1" in err
    found = json.loads(cal.read_text())
    found["sites"] = {site: 8 * scale for site, scale in found["sites"].items()}
    cal.write_text(json.dumps(found))
    _, err = fq(*arguments, "--chunks", 2, "--resume")
    assert "no such run to go on with" in err


@pytest.mark.parametrize(
    "figures", [b"", b"x" * 7, np.full(5 * 3 * 11, -1.0).tobytes(), np.full(5 * 3 * 11, np.inf).tobytes()]
)
def test_damaged_estimates(whole, tmp_path, figures):
    path = tmp_path / "s.sqlite"
    path.write_bytes(whole[0].read_bytes())
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE estimates SET figures = ? WHERE chunk = 1", (figures,))
        db.commit()
    _, err = fq("results", 1, "--store", path, status=2)
    assert "run 1 cannot be read: estimates" in err


def test_the_page(whole, tmp_path):
    store, data, _ = whole
    page = tmp_path / "page.html"
    fq("report", 1, "--store", store, "-o", page, "--png", tmp_path / "png")
    html = page.read_text()
    assert html.count("<svg") == 3 and "Sites × formats" in html and 'src="http' not in html
    # of a kind with one site there is nothing to map
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert names == {"kinds.png", "sites-1.png", "verified.png"}
    for one in data["verified"]:
        assert f'<th scope="row">{one["site"]}={one["format"]}</th>' in html
    most = max((c for c in data["cells"] if c["format"] == "int8"), key=lambda c: c["mean_kld"])
    assert f"<td>{most['site']}</td>" in html
    again = tmp_path / "again.html"
    fq("report", 1, "--store", store, "-o", again)
    assert again.read_bytes() == page.read_bytes()


def test_a_page_without_intervals(command, tmp_path):
    """Of chunks that are too few, without a cell that was measured, and of a format that is never finite."""
    store, page = tmp_path / "s.sqlite", tmp_path / "page.html"
    arguments = [*command, "--format", "e2m1:no-saturate", "--chunks", 1, "--store", store]
    arguments[arguments.index("--verify") + 1] = 0
    out, _ = fq(*arguments)
    assert "there are intervals from 4 chunks and 4 verified cells on" in out
    fq("report", "--store", store, "-o", page)
    html = page.read_text()
    assert "There are no intervals" in html and "of 20 cells “not finite”" in html


def test_a_page_takes_no_other_run_beside(whole, tmp_path):
    for numbers in ((1, 2), (2, 1)):
        arguments = ["report", numbers[0], "--beside", numbers[1], "-o", tmp_path / "p.html"]
        _, err = fq(*arguments, "--store", whole[0], status=2)
        assert "--beside takes sweeps" in err
