"""The store: nothing that ended is lost or counted twice, whoever writes and however it dies."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import signal
import sqlite3
import time
from dataclasses import replace

import numpy as np
import pytest
from test_cli import fq, popen

from model import FqError
from model.results import Results, Run
from model.show import comparison_text
from model.statistics import Paired
from model.sweep import Cell, CellChunk

CHUNKS, CELLS = 100, 4
CELL = Cell("ffn_norm[0].raw=bf16", "single", "ffn_norm[0].raw=bf16", ("ffn_norm[0].raw=bf16",))
RUN = Run(
    "a" * 64,
    "b" * 64,
    (Cell("control", "control"), CELL),
    {"model": "m.gguf", "text": "t", "n_tokens": 99, "n_ctx": 8, "n_chunks_asked": 3, "batch": 8,
     "activations": "exact", "norms": [["ffn_norm", 0, 7]]},
    {"isa": "avx2", "threads": 2},
    {"fq": "1"},
    {"processor": "p"},
)  # fmt: skip


def left_of(seed, base=0):
    rng = np.random.default_rng(seed)
    nll_base = np.random.default_rng(base).random(3)
    return CellChunk(Paired(nll_base, *rng.random((3, 3)), rng.random(3) > 0.5), rng.random((1, 13)))


def bits(left):
    return [np.asarray(x).tobytes() for x in (*vars(left.paired).values(), left.counts)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


# ---------------------------------------------------------------- the file


def test_what_is_saved_is_loaded_to_the_last_bit(path):
    with Results(path) as store:
        number = store.add(RUN)
        for cell, chunk in ((0, 0), (1, 0), (0, 2)):
            store.save(number, cell, chunk, left_of((cell, chunk), base=chunk))
        other = store.add(RUN)
        store.save(other, 0, 0, left_of(9))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with Results(path, must_exist=True) as store:
        loaded = store.load(number)
        assert sorted(loaded) == [(0, 0), (0, 2), (1, 0)]
        for (cell, chunk), left in loaded.items():
            assert bits(left) == bits(left_of((cell, chunk), base=chunk))
        assert store.get(number) == RUN
        first, second = store.list()
        assert (first["run"], first["ended"], first["of"]) == (number, 3, 6)
        assert (second["run"], second["ended"], second["text"]) == (other, 1, "t")


def test_what_is_there_stays(path):
    with Results(path) as store:
        number = store.add(RUN)
        store.save(number, 0, 0, left_of(1))
        store.save(number, 0, 0, left_of(2))
        assert bits(store.load(number)[0, 0]) == bits(left_of(1))


def test_another_baseline_is_refused_with_its_cell(path):
    with Results(path) as store:
        number = store.add(RUN)
        store.save(number, 0, 0, left_of(1))
        with pytest.raises(FqError, match="baseline of chunk 1 is not the same as before in run 1"):
            store.save(number, 1, 0, left_of(2, base=1))
        assert list(store.load(number)) == [(0, 0)]


def test_which_run_is_gone_on_with(path):
    with Results(path) as store:
        store.add(RUN)
        number = store.add(RUN)
        assert store.last_like(replace(RUN, numerics={"isa": "avx2", "threads": 7})) == number
        assert store.last_like(replace(RUN, machine={})) == number
        for change in (
            {"model_sha256": "c" * 64},
            {"text_sha256": "c" * 64},
            {"cells": (CELL,)},
            {"versions": {"fq": "2"}},
            {"numerics": {"isa": "avx512", "threads": 2}},
            *({"settings": RUN.settings | {key: 5}} for key in ("n_ctx", "n_chunks_asked", "batch")),
        ):
            assert store.last_like(replace(RUN, **change)) is None, change


def other_database(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE other (x)")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: path.write_bytes(b"GGUF" * 1000), "not a database"),
        (other_database, "not a store"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
)
def test_files_that_are_no_store(path, make, said):
    make(path)
    with pytest.raises(FqError, match=said):
        Results(path)
    with pytest.raises(FqError, match="no such file"):
        Results(path.with_name("none"), must_exist=True)


# ---------------------------------------------------------------- processes


@pytest.fixture
def sweep(tiny_path):
    return ["sweep", "-m", tiny_path, "-c", 16, "--chunks", CHUNKS, "--threads", 1]


def shown(path, number=1):
    """A run's figures; what may differ is left out."""
    data = json.loads(fq("results", number, "--store", path, "--json", "-")[0])
    return {key: value for key, value in data.items() if key not in ("command", "run", "machine")}


def ended(path, run=1):
    """Chunks of cells in the store so far."""
    if not path.exists():
        return 0
    with Results(path) as store:
        return next((r["ended"] for r in store.list() if r["run"] == run), 0)


def stopped(arguments, path, how, at_least):
    """Start it, and stop it by a signal soon after it has committed so many; (stderr, exit status)."""
    with popen(*arguments) as process:
        while ended(path) < at_least and process.poll() is None:
            time.sleep(0.002)
        time.sleep(random.random() * 0.01)
        process.send_signal(how)
        return process.communicate()[1], process.returncode


def test_killed_ten_times_and_resumed(sweep, path, tmp_path):
    whole = tmp_path / "whole.sqlite"
    sweep = [*sweep, "--format", "bf16:stochastic,seed=3"]  # whose bits go by all rows before
    fq(*sweep, "--store", whole)
    assert ended(whole) == CHUNKS * CELLS
    arguments, before, went_on = [*sweep, "--store", path, "--resume"], 0, []
    for _ in range(10):
        err, status = stopped(arguments, path, signal.SIGKILL, before + random.randint(1, 20))
        if before:
            went_on.append(f"going on with run 1: {before} of {CHUNKS * CELLS}" in err)
        before = ended(path)
        if status != -signal.SIGKILL:
            break
    # the last one may have ended first, on a machine that looked away
    assert len(went_on) > 1 and all(went_on)
    fq(*arguments)
    with Results(path) as store, Results(whole) as other:
        assert [run["ended"] for run in store.list()] == [CHUNKS * CELLS]
        expected = other.load(1)
        for at, left in store.load(1).items():
            assert bits(left) == bits(expected[at])
    assert shown(path) == shown(whole)


def test_ctrl_c_keeps_what_is_done(sweep, path, ctrl_c):
    _, status = stopped([*sweep, "--store", path], path, signal.SIGINT, 3 * CELLS)
    assert status == 130
    partial = shown(path)
    assert partial["partial"] and 3 <= partial["n_chunks"] < CHUNKS
    out, _ = fq(*sweep, "--store", path, "--resume")
    assert "PARTIAL" not in out and not shown(path)["partial"]


def test_two_processes_write_one_store(sweep, path, tmp_path):
    formats = ("bf16", "int4")
    together = [popen(*sweep, "--store", path, "--format", fmt) for fmt in formats]
    for process in together:
        _, err = process.communicate()
        assert process.returncode == 0, err
    found = {shown(path, number)["groups"][0]["name"]: shown(path, number) for number in (1, 2)}
    for fmt in formats:
        alone = tmp_path / f"{fmt}.sqlite"
        fq(*sweep, "--store", alone, "--format", fmt)
        assert found[f"ffn_norm[*].raw={fmt}"] == shown(alone)


def test_results(tiny_path, path, tmp_path):
    sweep = ["sweep", "-m", tiny_path, "-c", 32, "--chunks", 2, "--store", path]
    table, _ = fq(*sweep, "--json", tmp_path / "sweep.json")
    _, err = fq(*sweep, "--chunks", 1, "--resume")
    assert "no such run" in err
    listed, _ = fq("results", "--store", path)
    assert [line.split()[0] for line in listed.splitlines()] == ["run", "1", "2"]
    assert all(line.endswith(" all") for line in listed.splitlines()[1:])
    assert fq("results", 1, "--store", path)[0] == table
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert json.loads(fq("results", 1, "--store", path, "--json", "-")[0]) == data
    assert len(data["model_sha256"]) == len(data["text_sha256"]) == 64 and data["numerics"]["blas"]
    rows = list(csv.DictReader(io.StringIO(fq("results", 1, "--store", path, "--csv", "-")[0])))
    for row, cell in zip(rows, data["cells"], strict=True):
        assert row["name"] == cell["name"]
        assert float(row["mean_kld"]) == cell["comparison"]["mean_kld"]
        low, high = cell["comparison"]["mean_kld_ci95_chunks"]
        assert [float(row["mean_kld_ci95_chunks_low"]), float(row["mean_kld_ci95_chunks_high"])] == [
            low,
            high,
        ]
    cell = data["cells"][1]
    full, _ = fq("results", 1, "--cell", "[0]", "--cell", "control", "--store", path)
    assert full.startswith(f"{cell['name']}\n\n{comparison_text(cell['comparison'])}\n\ncontrol\n\n")
    only = json.loads(fq("results", 1, "--cell", "[0]", "--store", path, "--json", "-")[0])
    assert only["cells"] == [cell] and only["groups"] == data["groups"]
    for name, said in (
        ("ffn", "is in the names of several cells of run 1: ffn_norm[0].raw=bf16, ffn_norm[1].raw=bf16, "),
        ("attn", "'attn' is no cell of run 1: control, ffn_norm[0].raw=bf16"),
    ):
        assert said in fq("results", 1, "--cell", name, "--store", path, status=2)[1]
    assert "there is no run 3" in fq("results", 3, "--store", path, status=2)[1]
    assert "no such file" in fq("results", "--store", tmp_path / "none", status=2)[1]
