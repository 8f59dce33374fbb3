"""Stores that earlier versions wrote open, with the figures that they had.

tests/data/store-1.sqlite is of version 0.1.0, schema 1: `fq sweep` on a tiny model, two runs. Beside
it, as JSON, are the per-chunk values and counts that the version which wrote it read out of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fq.errors import FqError
from fq.measure.cells import COUNT_COLUMNS, Cell, CellChunk
from fq.results import migrations
from fq.results.runs import Results, stored_figures

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("version", [1])
def test_a_store_of_an_earlier_version_opens(version, tmp_path):
    path = tmp_path / "store.sqlite"
    shutil.copy(DATA / f"store-{version}.sqlite", path)
    expected = json.loads((DATA / f"store-{version}.json").read_text())
    with Results(path, must_exist=True) as store:
        assert [str(run["run"]) for run in store.list()] == list(expected)
        for number, then in expected.items():
            left, data = store.load(int(number)), stored_figures(store, int(number))
            assert data["ppl_base"] == pytest.approx(then["ppl_base"], rel=1e-15)  # by another exp
            # which took a text's first chunks
            assert data["chunk_order"] == "first" and data["chunk_seed"] is None
            assert data["chunk_indices"] == list(range(data["n_chunks_asked"]))
            assert [cell["name"] for cell in data["cells"]] == [cell["name"] for cell in then["cells"]]
            for i, (cell, old) in enumerate(zip(data["cells"], then["cells"], strict=True)):
                chunks = [left[i, chunk].paired for chunk in range(data["n_chunks"])]
                assert [float(c.kld.mean()) for c in chunks] == old["mean_kld"]
                assert [float((c.nll - c.nll_base).mean()) for c in chunks] == old["ln_ppl_ratio"]
                assert [int(c.same_top.sum()) for c in chunks] == old["same_top"]
                for key in ("rows_quantised", "changed", "max_abs_error"):
                    assert [site[key] for site in cell["sites"]] == old[key]


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "store.sqlite"
    shutil.copy(DATA / "store-1.sqlite", path)
    return path


def version_of(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_reading_an_older_store_leaves_it_as_it_is(old):
    before = old.read_bytes()
    with Results(old) as store:
        stored_figures(store, 1)
        store.list()
    assert version_of(old) == 1 and os.listdir(old.parent) == [old.name]
    # but for the journal's mode, which the file's head names
    assert old.read_bytes()[100:] == before[100:]


def test_writing_upgrades_it_and_leaves_a_copy(old):
    with Results(old) as store:
        then, figures = store.get(1), stored_figures(store, 1)
        number = store.add(then)
        left = store.load(1)[0, 0]
        store.save(number, 0, 0, left)
        assert np.array_equal(store.load(number)[0, 0].counts, left.counts)
        assert stored_figures(store, 1) == figures
    assert version_of(old) == migrations.VERSION
    copy = old.with_name("store.sqlite.version-1")
    assert version_of(copy) == 1
    for path in (old, copy):
        with Results(path) as store:
            assert stored_figures(store, 1) == figures
    copy.write_text("a user's own")
    shutil.copy(DATA / "store-1.sqlite", old)
    with Results(old) as store:
        store.add(then)
    assert copy.read_text() == "a user's own"


def test_a_run_of_before_is_extended_by_what_it_did_not_know(old):
    """Its settings have the norms alone."""
    with Results(old) as store:
        run = store.get(1)
        values = [
            ["inp_embd", None, 3, False, False],
            *([*norm, True, False] for norm in run.settings["norms"]),
        ]
        cell = Cell("inp_embd=bf16", "single", "inp_embd=bf16", ("inp_embd=bf16",))
        more = replace(run, cells=(cell,), settings=run.settings | {"values": values})
        now = run.extended(more)
        assert now.cells == (*run.cells, cell) and now.settings["values"] == values
        number, left = store.add(now), store.load(1)
        for chunk in range(run.settings["n_chunks_asked"]):
            for i in range(len(run.cells)):
                store.save(number, i, chunk, left[i, chunk])
            counts = np.ones((1, len(COUNT_COLUMNS)))
            store.save(number, len(run.cells), chunk, CellChunk(left[0, chunk].paired, counts))
        entry = stored_figures(store, number)["cells"][-1]
        assert entry["name"] == "inp_embd=bf16" and entry["sites"][0]["kind"] == "inp_embd"


def test_a_folder_that_takes_no_copy_leaves_the_store_as_it_was(old, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with Results(old) as store:
        figures = stored_figures(store, 1)
        monkeypatch.setattr(migrations, "upgrade", full)
        for _ in range(2):
            with pytest.raises(FqError, match="disk is full"):
                store.add(store.get(1))
            assert stored_figures(store, 1) == figures
        monkeypatch.undo()
        assert store.add(store.get(1)) == 3
    assert version_of(old) == migrations.VERSION


def test_several_processes_upgrade_once(old):
    with Results(old) as one, Results(old) as other:
        run = one.get(1)
        assert {one.add(run), other.add(run)} == {3, 4}
        assert other.load(1).keys() == one.load(1).keys()


def test_a_new_file_is_what_an_upgraded_one_is(old, tmp_path):
    def schema(path):
        with contextlib.closing(sqlite3.connect(path)) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
            return {t: db.execute(f"SELECT * FROM pragma_table_info('{t}')").fetchall() for t in tables}

    with Results(old) as store:
        store.add(store.get(1))
    with Results(tmp_path / "new.sqlite"):
        pass
    assert schema(old) == schema(tmp_path / "new.sqlite")


def test_a_new_statistic_is_one_more_column(old, monkeypatch):
    """What was counted before stays; what was not is not made up."""
    with Results(old) as store:
        run, before = store.get(1), store.load(1)
    columns = ("median", *COUNT_COLUMNS)
    monkeypatch.setattr("fq.results.stored.COUNT_COLUMNS", columns)
    monkeypatch.setattr("fq.results.runs.COUNT_COLUMNS", columns)
    with Results(old) as store:
        number = store.add(run)
        counts = np.arange(2.0 * len(columns)).reshape(2, -1)
        store.save(number, 1, 0, before[1, 0]._replace(counts=counts))
        assert np.array_equal(store.load(number)[1, 0].counts, counts)
        for at, left in store.load(1).items():
            assert np.isnan(left.counts[:, 0]).all()
            assert np.array_equal(left.counts[:, 1:], before[at].counts, equal_nan=True)
    monkeypatch.undo()
    with Results(old) as store:  # and a version that has never heard of it reads the rest
        assert np.array_equal(store.load(number)[1, 0].counts, counts[:, 1:])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("UPDATE count_columns SET names = 'x' WHERE id = 1", "count_columns is not JSON"),
        ("UPDATE count_columns SET names = '[1]' WHERE id = 1", "count_columns is not a list of names"),
        (
            "UPDATE count_columns SET names = '[\"changed\"]' WHERE id = 1",
            "count_columns lacks one of rows_quantised",
        ),
        ("UPDATE count_columns SET names = hex(zeroblob(1 << 20)) WHERE id = 1", "count_columns is not JSON"),
        ("UPDATE chunks SET count_columns = 7", "its counts have no columns"),
        ("UPDATE chunks SET counts = zeroblob(103)", f"counts is not of {len(COUNT_COLUMNS)} numbers"),
    ],
)
def test_damaged_columns_are_one_error(old, damage, said):
    with Results(old) as store:
        run = store.get(1)
        number = store.add(run)
        store.save(number, 1, 0, store.load(1)[1, 0])
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute(damage)
        db.commit()
    with Results(old) as store, pytest.raises(FqError, match=f"run {number} cannot be read: .*{said}"):
        stored_figures(store, number)
