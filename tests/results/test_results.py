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

import pytest
from command_line import fq, popen
from stored_runs import RUN, bits, ended, killed_at_statement, left_of

from fq import FqError
from fq.commands.show import comparison_text
from fq.measure.who_pays import who_pays_text
from fq.results.runs import Results

CHUNKS, CELLS = 100, 4


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


def test_who_reads_stops_nobody_from_writing(path, monkeypatch):
    """Which any journal but a write-ahead log would: a commit waits there for all readers to end."""
    monkeypatch.setattr("fq.results.store_file.BUSY_SECONDS", 0.05)
    with Results(path) as store, contextlib.closing(sqlite3.connect(path)) as reader:
        number = store.add(RUN)
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM chunks").fetchone() == (0,)
        store.save(number, 0, 0, left_of(1))
        with Results(path) as writer:
            writer.save(number, 1, 0, left_of(2))
        assert sorted(store.load(number)) == [(0, 0), (1, 0)]
        # it still sees what was there as it began
        assert reader.execute("SELECT COUNT(*) FROM chunks").fetchone() == (0,)


def test_a_store_that_gets_no_write_ahead_log_is_refused():
    """As in memory, or on a file system without shared memory."""
    with pytest.raises(FqError, match="no write-ahead log \\(the journal is 'memory'\\)"):
        Results(":memory:")


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
        for change in (
            {"numerics": {"isa": "avx2", "threads": 7}},
            {"numerics": {"isa": "avx512", "threads": 2}},
            {"settings": RUN.settings | {"batch": 5}},
            {"machine": {}},
        ):
            assert store.begin(RUN, replace(RUN, **change)) == (number, RUN, RUN)
        assert store.begin(RUN) == (number + 1, RUN, None)
        for change in (
            {"model_sha256": "c" * 64},
            {"text_sha256": "c" * 64},
            {"versions": {"fq": "2"}},
            {"numerics": {"isa": "avx2", "threads": 2, "contract": "fq-3"}},
            *({"settings": RUN.settings | {key: 5}} for key in ("n_ctx", "chunk_seed")),
            {"settings": RUN.settings | {"n_tokens": 98}},
            {"settings": RUN.settings | {"chunk_order": "first"}},
        ):
            other = replace(RUN, **change)
            number, run, was = store.begin(other, other)
            assert (run, was) == (other, None) and store.get(number) == other, change


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


def stopped(arguments, path, how, at_least):
    """Start it, and stop it by a signal soon after it has committed so many; (stderr, exit status)."""
    with popen(*arguments) as process:
        while ended(path) < at_least and process.poll() is None:
            time.sleep(0.002)
        time.sleep(random.random() * 0.01)
        process.send_signal(how)
        return process.communicate()[1], process.returncode


def killed_after(seconds, arguments, folder):
    with popen(*arguments, cwd=folder) as process:
        time.sleep(seconds)
        process.kill()
        return process.communicate()[1], process.returncode


def test_killed_ten_times_and_resumed(sweep, tmp_path):
    """In the end what an uninterrupted run gives, byte for byte, even with two processes to finish it."""
    # whose bits go by all rows before
    arguments = [*sweep, "--format", "bf16:stochastic,seed=3", "--store", "store.sqlite", "--resume"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    path, all_of_it, start = folder / "store.sqlite", CHUNKS * CELLS, time.perf_counter()
    fq(*arguments, cwd=whole)
    seconds = time.perf_counter() - start
    rng, before, killed = random.Random(6), 0, 0
    for i in range(10):
        if i % 2:
            err, status = killed_after(rng.uniform(0, 0.35) * seconds, arguments, folder)
        else:
            err, status = killed_at_statement(rng.randint(1, 100), arguments, folder)
            assert status == -signal.SIGKILL or ended(path) == all_of_it
        killed += status == -signal.SIGKILL
        if before:  # else the run may not have been made
            # it may have been killed before it could say so
            assert f"going on with run 1: {before} of {all_of_it}" in err or not err
        assert ended(path) >= before
        before = ended(path)
    # one that was to be killed by the clock may have ended first, on a machine that looked away
    assert killed >= 6 and before > 0
    both = [popen(*arguments, cwd=folder) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert all(process.returncode == 0 for process in both), said
    assert all("going on with run 1" in err for err in said)
    with Results(path) as store, Results(whole / "store.sqlite") as other:
        assert [run["ended"] for run in store.list()] == [all_of_it]
        expected = other.load(1)
        for at, left in store.load(1).items():
            assert bits(left) == bits(expected[at])
    outputs = []
    for where in (whole, folder):
        table, _ = fq("results", 1, "--store", "store.sqlite", "--json", "figures.json", cwd=where)
        data = json.loads((where / "figures.json").read_text())
        del data["machine"]  # it has the load
        outputs.append((table, json.dumps(data, indent=2)))
    assert outputs[0] == outputs[1]


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
    sweep = ["sweep", "-m", tiny_path, "-c", 16, "--chunks", 4, "--store", path]
    table, _ = fq(*sweep, "--json", tmp_path / "sweep.json")
    _, err = fq(*sweep, "--chunk-seed", 1, "--resume")
    assert "no such run" in err
    listed, _ = fq("results", "--store", path)
    assert [line.split()[0] for line in listed.splitlines()] == ["run", "1", "2"]
    assert all(line.endswith(" all") for line in listed.splitlines()[1:])
    assert fq("results", 1, "--store", path)[0] == table
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert json.loads(fq("results", 1, "--store", path, "--json", "-")[0]) == data
    assert len(data["model_sha256"]) == len(data["text_sha256"]) == 64
    rows = list(csv.DictReader(io.StringIO(fq("results", 1, "--store", path, "--csv", "-")[0])))
    for row, cell in zip(rows, data["cells"], strict=True):
        assert row["name"] == cell["name"]
        assert float(row["mean_kld"]) == cell["comparison"]["mean_kld"]
        interval = cell["comparison"]["mean_kld_ci95_chunks"]
        assert (interval is None) == (cell["kind"] == "control")
        ends = [row[f"mean_kld_ci95_chunks_{end}"] for end in ("low", "high")]
        assert ends == ["", ""] if interval is None else list(map(float, ends)) == interval
    cell = data["cells"][1]
    full, _ = fq("results", 1, "--cell", "[0]", "--cell", "control", "--store", path)
    who = "\n".join(who_pays_text(cell["comparison"]["who_pays"]))
    whole = f"{comparison_text(cell['comparison'])}\n\n====== Who pays ======\n{who}"
    assert full.startswith(f"{cell['name']}\n\n{whole}\n\ncontrol\n\n") and "of a chunk" in who
    only = json.loads(fq("results", 1, "--cell", "[0]", "--store", path, "--json", "-")[0])
    assert only["cells"] == [cell] and only["groups"] == data["groups"]
    for name, said in (
        ("ffn", "is in the names of several cells of run 1: ffn_norm[0].raw=bf16, ffn_norm[1].raw=bf16, "),
        ("attn", "'attn' is no cell of run 1: control, ffn_norm[0].raw=bf16"),
    ):
        assert said in fq("results", 1, "--cell", name, "--store", path, status=2)[1]
    assert "there is no run 3" in fq("results", 3, "--store", path, status=2)[1]
    assert "no such file" in fq("results", "--store", tmp_path / "none", status=2)[1]
