"""Stores that are damaged, hostile, or where nothing may be written: one error, or the figures."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from stored_runs import RUN, left_of

from fq import FqError
from fq.cli import main
from fq.commands.files import write_json
from fq.commands.show import comparison_text
from fq.commands.show_sweep import sweep_text
from fq.measure.cells import Cell
from fq.report.page import report_html
from fq.results import migrations
from fq.results.compare import Side, compare_runs, compare_text
from fq.results.export import csv_text
from fq.results.opened import open_results
from fq.results.runs import Results, stored_figures

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def path(tmp_path):
    """A store of two runs, whose columns take anything."""
    path = tmp_path / "store.sqlite"
    shutil.copy(DATA / "store-1.sqlite", path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        for table in ("runs", "baselines", "chunks"):
            db.execute(f"ALTER TABLE {table} RENAME TO old")
            db.execute(f"CREATE TABLE {table} AS SELECT * FROM old")
            db.execute("DROP TABLE old")
        db.commit()
    return path


def damage(path, statement, *values):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(statement, values)
        db.commit()


def settings(path, **changes):
    """Run 1's settings with these values; ... is none."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        (text,) = db.execute("SELECT settings FROM runs WHERE id = 1").fetchone()
    return json.dumps({key: value for key, value in (json.loads(text) | changes).items() if value is not ...})


SCALES = {"file": "c.json", "sha256": "0", "method": "largest", "per": "tensor", "same_text": False}
SCALES |= {"model": {"file": "m.gguf"}, "text": {"name": "t.txt", "sha256": "0"}}
RANDOM = {"chunk_order": "random", "chunk_indices": [4, 0, 3, 1, 2]}
SETTINGS = [
    ({"n_chunks_asked": 10**15}, "n_chunks_asked is 1000000000000000, of 9755 tokens"),
    ({"n_chunks_asked": 10**12, "n_tokens": 10**14}, "n_chunks_asked is 1000000000000, of"),
    ({"n_chunks_asked": "5"}, "n_chunks_asked is 5"),
    ({"n_chunks_asked": ...}, "n_chunks_asked is None"),
    ({"n_chunks_asked": 3}, r"a row is of cell \d+, chunk [34]"),
    ({"n_ctx": 0}, "n_ctx is 0"),
    ({"n_ctx": 64}, "cell 0, chunk 1: baseline's nll is not of 31 tokens"),
    ({"n_tokens": True}, "n_tokens is True"),
    ({"model": None}, "model is not text"),
    ({"text": 3}, "text is not text"),
    ({"norms": {}}, "norms is not a list of kind, layer and rows"),
    ({"norms": [["ffn_norm", "0", 7]]}, "norms is not a list"),
    ({"norms": [["attn_norm", 0, 7]]}, r"matches no site|no norm"),
    ({"base_model": "b.gguf"}, "base_model_sha256 is not text"),
    ({"base_model": "b.gguf", "base_model_sha256": "12"}, "base_model_sha256 is none"),
    ({"base_model_sha256": "0" * 64}, "base_model is not text"),
    ({"machine": [[[[[[[[[]]]]]]]]]}, "settings is nested too deeply"),
    ({"text": ...}, "text is not there"),
    ({"calibrations": 5}, "calibrations is not a list of objects"),
    ({"calibrations": [{}]}, "calibrations does not say which files of which model and text"),
    ({"calibrations": [SCALES | {"model": "m.gguf"}]}, "calibrations does not say which files of"),
    ({"calibrations": [SCALES | {"text": {"name": "t"}}]}, "calibrations does not say which files of which"),
    (RANDOM, "chunk_seed is None"),
    (RANDOM | {"chunk_seed": 1 << 64}, "chunk_seed is 18446744073709551616"),
]
ROWS = [
    ("UPDATE runs SET settings = '[' WHERE id = 1", "settings is not JSON"),
    ("UPDATE runs SET settings = '3' WHERE id = 1", "settings is not a JSON object"),
    ("UPDATE runs SET settings = NULL WHERE id = 1", "settings is not text"),
    ("UPDATE runs SET settings = zeroblob(9) WHERE id = 1", "settings is not text"),
    ("UPDATE runs SET cells = '{}' WHERE id = 1", "cells is not a JSON array"),
    ("UPDATE runs SET cells = '[]' WHERE id = 1", "there are no cells"),
    ("UPDATE runs SET cells = '[3]' WHERE id = 1", "a cell is not one of name, kind, group and rules"),
    ("UPDATE runs SET cells = replace(cells, '\"kind\"', '\"kin\"') WHERE id = 1", "a cell is not one of"),
    ("UPDATE runs SET cells = replace(cells, '=bf16', '=bf17') WHERE id = 1", "bf17"),
    ("UPDATE runs SET cells = replace(cells, 'single', 'singel') WHERE id = 1", "of kind 'singel'"),
    ("UPDATE runs SET cells = replace(cells, '[0].raw', '[7].raw') WHERE id = 1", r"ffn_norm\[7\]"),
    ("UPDATE runs SET cells = replace(cells, 'ffn', '\\ud800') WHERE id = 1", "surrogates not allowed"),
    ("UPDATE runs SET machine = '[]' WHERE id = 1", "machine is not a JSON object"),
    ("UPDATE runs SET versions = NULL WHERE id = 1", "versions is not text"),
    ("UPDATE runs SET numerics = x'07' WHERE id = 1", "numerics is not text"),
    ("UPDATE runs SET started = NULL WHERE id = 1", "started is not text"),
    ("UPDATE runs SET model_sha256 = x'07' WHERE id = 1", "model_sha256 is not text"),
    ("UPDATE chunks SET nll = substr(nll, 2) WHERE run = 1", "cell 0, chunk 1: nll is not of 7 tokens"),
    ("UPDATE chunks SET kld = zeroblob(56000) WHERE run = 1", "kld is not of 7 tokens"),
    ("UPDATE chunks SET dp = 'a text of 56 characters, as many bytes as the blob has...' ", "dp is not of"),
    (f"UPDATE chunks SET kld = x'{'000000000000f0bf' * 7}' WHERE cell = 1", "kld has tokens that are below"),
    ("UPDATE chunks SET same_top = NULL WHERE run = 1", "same_top is not of 7 tokens"),
    ("UPDATE chunks SET same_top = x'00010203040506' WHERE run = 1", "same_top is neither 0 nor 1"),
    ("UPDATE chunks SET counts = zeroblob(103) WHERE run = 1 AND cell = 2", "counts is not of 13 numbers"),
    ("UPDATE chunks SET counts = x'' WHERE run = 1 AND cell = 2", "counts of fewer sites than its rules"),
    (
        "UPDATE chunks SET counts = unhex_ff(104) WHERE run = 1 AND cell = 2",
        "cell 2, chunk 1: counts has numbers that count nothing",
    ),
    ("UPDATE chunks SET cell = 99 WHERE run = 1 AND cell = 2", "a row is of cell 99, chunk 0"),
    ("UPDATE chunks SET cell = 'x' WHERE run = 1 AND cell = 2", "a row is of cell 'x', chunk 0"),
    ("UPDATE chunks SET cell = -1 WHERE run = 1 AND cell = 2", "a row is of cell -1, chunk 0"),
    ("UPDATE baselines SET nll = 5 WHERE run = 1", "baseline's nll is not of 7 tokens"),
]  # fmt: skip


def commands(path, tmp_path):
    store, other = ["--store", str(path)], ["-o", str(tmp_path / "x.html")]
    yield ["results", "1", *store]
    yield ["results", "1", *store, "--csv", "-"]
    yield ["results", "compare", "1", "2", *store]
    yield ["report", "1", *store, *other]


@pytest.mark.parametrize("changes, said", SETTINGS)
def test_damaged_settings(path, tmp_path, capsys, changes, said):
    damage(path, "UPDATE runs SET settings = ? WHERE id = 1", settings(path, **changes))
    check(path, tmp_path, capsys, said)


@pytest.mark.parametrize("statement, said", ROWS)
def test_a_damaged_row(path, tmp_path, capsys, statement, said):
    if "unhex_ff" in statement:
        damage(path, statement.replace("unhex_ff(104)", "?"), b"\xff" * 104)
    else:
        damage(path, statement)
    check(path, tmp_path, capsys, said)


def check(path, tmp_path, capsys, said):
    """Every command that reads run 1 says so, or does without what is damaged."""
    refused = 0
    for command in commands(path, tmp_path):
        status = main(command)
        out, err = capsys.readouterr()
        if status:
            refused += 1
            assert status == 2 and out == "" and err.count("\n") == 1, err
            assert re.match(rf"fq: error: {re.escape(str(path))}: run [12] cannot be read: .*{said}", err), (
                err
            )
    assert refused, said


def test_a_damaged_run_is_not_gone_on_with(tiny_path, path, capsys):
    sweep = ["sweep", "-m", str(tiny_path), "-c", "16", "--chunks", "2", "--store", str(path)]
    path.unlink()
    assert main(sweep) == 0
    damage(path, "UPDATE chunks SET kld = x'00' WHERE cell = 1")
    assert main([*sweep, "--resume"]) == 2
    assert "run 1 cannot be read: cell 1, chunk 1: kld is not of 7 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "statements",
    [
        # each would take all memory, or for ever
        (
            "DROP TABLE runs",
            "CREATE VIEW runs AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) "
            "SELECT id, '' started, '' settings, '' cells FROM n",
        ),
        ("ALTER TABLE runs ADD COLUMN more TEXT AS (zeroblob(900000000))",),
        ("CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM chunks; END",),
        # as results check would find out, and as would a row that is written
        ("CREATE TABLE more (x check(length(hex(randomblob(200000000))) > 0))",),
        ("CREATE INDEX i ON chunks (length(hex(zeroblob(200000000))))",),
    ],
)
def test_what_computes_is_no_store(path, statements):
    for statement in statements:
        damage(path, statement)
    with pytest.raises(FqError, match=f"{path}: not a store of this version of fq"):
        Results(path, must_exist=True)


# ---------------------------------------------------------------- digests


@pytest.fixture(scope="module")
def made(tiny_path, tmp_path_factory):
    """A store of today, of a sweep and an estimate."""
    path = tmp_path_factory.mktemp("made") / "store.sqlite"
    common = ["-m", str(tiny_path), "-c", "64", "--chunks", "2", "--sites", "l_out", "--store", str(path)]
    assert (
        main(["sweep", *common]) == main(["sensitivity", *common, "--format", "bf16", "--verify", "0"]) == 0
    )
    return path


def columns():
    """Each column of each table of runs."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        migrations.upgrade(db, 0)
        for table in ("runs", "chunks", "baselines", "estimates"):
            for row in db.execute(f"PRAGMA table_info({table})"):
                yield table, row[1]


@pytest.mark.parametrize("table, column", list(columns()))
def test_one_bit_of_any_column_is_seen(made, tmp_path, capsys, table, column):
    """And the row is named; of the last bit of a figure, which is as good a figure as the one before."""
    path = tmp_path / "store.sqlite"
    shutil.copy(made, path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        rowid, value = db.execute(
            f"SELECT rowid, {column} FROM {table} ORDER BY length({column}) DESC LIMIT 1"
        ).fetchone()
        if isinstance(value, int):
            value ^= 1 << 20
        elif isinstance(value, bytes):
            value = bytes([value[0] ^ 1]) + value[1:]
        else:
            k = max(value.rfind(digit) for digit in "0123456789")
            value = value[:k] + chr(ord(value[k]) ^ 1) + value[k + 1 :]
        db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rowid))
        db.commit()
    capsys.readouterr()
    status = main(["results", "check", "--store", str(path)])
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1), f"{table}.{column} = {value!r:.80}"
    assert re.search(r"run \d+ cannot be read: |rows of run |there is no run ", err)


def test_rows_astray_are_not_left_out(made, tmp_path, capsys):
    """They would make a run of one chunk less."""
    path = tmp_path / "store.sqlite"
    shutil.copy(made, path)
    damage(path, "UPDATE chunks SET run = 77 WHERE run = 1 AND chunk = 1")
    assert main(["results", "1", "--store", str(path)]) == 2
    assert f"{path}: chunks has rows of run 77, which is not there" in capsys.readouterr().err


def test_a_run_that_was_deleted_is_not_written_to(made, tmp_path):
    path = tmp_path / "store.sqlite"
    shutil.copy(made, path)
    with Results(path) as store, Results(path) as other:
        (_, _, left), *_ = store.rows(1)
        (figures,) = list(store.load_estimates(2).values())[:1]
        other.delete(1)
        other.delete(2)
        with pytest.raises(FqError, match="there is no run 1 any more"):
            store.save(1, 0, 0, left)
        with pytest.raises(FqError, match="there is no run 2 any more"):
            store.save_estimates(2, 0, figures)
        assert store.list() == []


def test_a_damaged_run_leaves_the_others(made, tmp_path, capsys):
    """The newest that is not asked for by its number is one that can be read."""
    path = tmp_path / "store.sqlite"
    for name in (path, tmp_path / "other.sqlite"):
        shutil.copy(made, name)
    with Results(path) as store:
        assert store.add(store.get(1)) == 3
        for _, chunk, left in store.rows(1):
            store.save(3, _, chunk, left)
    damage(path, "UPDATE runs SET settings = replace(settings, '.gguf', '.gguh') WHERE id = 3")

    def said(status, *command):
        assert main([*map(str, command)]) == status
        return capsys.readouterr()

    lines = said(0, "results", "--store", path).out.splitlines()
    assert len(lines) == 4 and re.fullmatch(r" *3 +damaged", lines[3]) and lines[2].endswith("all")
    listed = json.loads(said(0, "results", "--json", "-", "--store", path).out)["runs"]
    why = "it is not what was written: its digest is another"
    assert [about["damaged"] for about in listed] == [None, None, why]
    assert open_results(path).run().number == 2
    err = said(0, "report", "--store", path, "-o", tmp_path / "r.html").err
    assert f"run 2 of {path}" in err
    wrong = f"fq: error: {path}: run 3 cannot be read: {why}\n"
    for command in (["results", 3], ["report", 3, "-o", tmp_path / "r.html"], ["results", "check"]):
        assert said(2, *command, "--store", path).err == wrong
    # what is merged is the newest sweep, and goes to none of the damaged ones
    assert "run 1 of" in said(0, "results", "merge", tmp_path / "new.sqlite", path).out
    assert "run 1 of" in said(0, "results", "merge", path, tmp_path / "other.sqlite").out
    for number in (2, 1):
        said(0, "results", "delete", number, "--store", path)
    assert said(2, "report", "--store", path).err == wrong
    with pytest.raises(FqError, match="run 3 cannot be read"):
        open_results(path).run()


@pytest.mark.parametrize("there", [True, False])
def test_no_file_that_a_rule_names_is_opened(tmp_path, there):
    """Static scales are in the figures already, wherever their file is now; to open a pipe would wait."""
    name = tmp_path / "scales.json"
    if there:
        os.mkfifo(name)
    rule = f"ffn_norm[0].raw=int8:scale=@{name}"
    with Results(tmp_path / "store.sqlite") as store:
        number = store.add(replace(RUN, cells=(RUN.cells[0], Cell(rule, "single", rule, (rule,)))))
        for cell in (0, 1):
            store.save(number, cell, 0, left_of(cell))
        ((site,),) = [cell["sites"] for cell in stored_figures(store, number)["cells"] if cell["rules"]]
    assert site["format"] == f"int8:scale=@{name}" and site["rows_seen"] == 7


# ---------------------------------------------------------------- at random


VALUES = (
    None,
    True,
    -1,
    0,
    3,
    1 << 40,
    10**30,
    1e308,
    1e-320,
    "",
    "x" * 2000,
    "bf16",
    "é\x1b[2J",
    [],
    {},
    [[]],
)


def any_json(value, rng):
    """The same with one thing in it changed, left out or twice there."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, value = rng.choice(keys), value.copy()
        what = rng.random()
        if what < 0.1:
            del value[key]
        elif what < 0.15 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = any_json(value[key], rng)
        return value
    return rng.choice(VALUES)


def any_column(value, rng):
    if rng.random() < 0.1:
        return rng.choice(
            [None, 0, -1, 1 << 62, 1.5, float("inf"), "", "text", b"", b"\xff" * 56, "[" * 9999]
        )
    if isinstance(value, str):
        try:
            return json.dumps(any_json(json.loads(value), rng))
        except json.JSONDecodeError:
            return value[: rng.randrange(len(value) + 1)]
    if isinstance(value, bytes):
        blob = bytearray(value)
        for _ in range(rng.randrange(1, 9) if blob else 0):
            blob[rng.randrange(len(blob))] = rng.choice([0, 1, 0x7F, 0xF0, 0xFF, rng.randrange(256)])
        return bytes(blob) + b"x" * (rng.random() < 0.2)
    return rng.choice([value + 1, -value, 1 << 40])


def mutate(path, rng):
    with contextlib.closing(sqlite3.connect(path)) as db:
        table = rng.choice(["runs", "runs", "chunks", "baselines"])
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        run = "id" if table == "runs" else "run"
        rowid, *values = rng.choice(db.execute(f"SELECT rowid, * FROM {table} WHERE {run} = 1").fetchall())
        column = rng.randrange(len(columns))
        value = any_column(values[column], rng)
        db.execute(f"UPDATE {table} SET {columns[column]} = ? WHERE rowid = ?", (value, rowid))
        db.commit()
    return f"{table}.{columns[column]} = {value!r:.200}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers of any size overflow
@pytest.mark.parametrize("seed", range(2))
def test_any_damage(path, tmp_path, seed):
    """What is read can be computed with and shown; what cannot is one error that names the file."""
    rng, pristine, refused = random.Random(seed), path.read_bytes(), 0
    for i in range(40):
        path.write_bytes(pristine)
        for end in ("-wal", "-shm"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        what = mutate(path, rng)
        try:
            with Results(path, must_exist=True) as store:
                store.list()
                data = stored_figures(store, 1) | {"started": "now"}
                for text in (sweep_text(data), csv_text(data)):
                    text.encode()
                for cell in data["cells"]:
                    comparison_text(cell["comparison"])
                write_json("sweep", data, os.devnull)
                if i % 25 == 0:
                    report_html(data)
                sides = [Side(n, store.get(n), store.load(n)) for n in (1, 2)]
                compare_text(compare_runs(sides)).encode()
        except FqError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e) and len(str(e)) < 5000, what
        except Exception as e:
            pytest.fail(f"{what}: {e!r}")
    assert refused > 5


# ---------------------------------------------------------------- where nothing may be written


@contextlib.contextmanager
def unprivileged():
    """Root may write anywhere: for the length of the block somebody who may not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def locked():
    """lock(file or folder): nobody writes it any more. In a folder that all may enter, as tmp_path is not."""
    with tempfile.TemporaryDirectory() as name:
        folder, paths = Path(name), []
        folder.chmod(0o755)

        def lock(path=folder):
            paths.append(path)
            path.chmod(0o555 if path.is_dir() else 0o444)

        shutil.copy(DATA / "store-1.sqlite", folder / "a store?#.sqlite")
        (folder / "a store?#.sqlite").chmod(0o644)
        yield folder / "a store?#.sqlite", lock
        for path in paths:
            path.chmod(0o755)


def shown(path, capsys):
    outputs = []
    for command in (["results"], ["results", "1"], ["results", "compare", "1", "2"]):
        assert main([*command, "--store", str(path)]) == 0, capsys.readouterr().err
        outputs.append(capsys.readouterr().out)
    return outputs


@pytest.mark.parametrize("what", ["folder", "file", "both"])
def test_a_store_that_may_not_be_written(locked, capsys, what):
    path, lock = locked
    expected = shown(path, capsys)
    for locking in ([path] if what != "folder" else []) + ([path.parent] if what != "file" else []):
        lock(locking)
    before = sorted(os.listdir(path.parent))
    with unprivileged():
        assert shown(path, capsys) == expected
        with Results(path, must_exist=True) as store, pytest.raises(FqError, match=r"readonly|read-only"):
            store.add(store.get(1))
    if what != "file":
        assert sorted(os.listdir(path.parent)) == before


def test_its_newest_rows_are_not_left_out(locked, capsys):
    """Those that a killed writer left in the log, where no index of it can be made."""
    path, lock = locked
    with Results(path) as writer:
        assert writer.add(writer.get(1)) == 3
        wal = Path(f"{path}-wal").read_bytes()
    Path(f"{path}-wal").write_bytes(wal)
    Path(f"{path}-shm").unlink(missing_ok=True)
    lock()
    with unprivileged(), pytest.raises(FqError, match=r"the newest rows are in .*-wal"):
        Results(path, must_exist=True)


def test_while_another_writes_it(locked):
    path, lock = locked
    with Results(path) as writer:
        assert writer.add(writer.get(1)) == 3
        lock()
        with unprivileged(), Results(path, must_exist=True) as store:
            assert [run["run"] for run in store.list()] == [1, 2, 3]
