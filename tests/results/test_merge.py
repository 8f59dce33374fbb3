"""Shards of a sweep and their merge: the figures of one process, to the last bit; and stores looked after."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import environment, fq, popen
from stored_runs import CELL, RUN, bits, ended, left_of

from fq import FqError
from fq.commands.options import command_of_all
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.cells import COUNT_COLUMNS
from fq.results.merge import difference, joined, merge
from fq.results.runs import Results

SITES = ["--sites", "ffn_norm", "--sites", "l_out", "--format", "bf16", "--format", "bf16:stochastic"]
N = 4
HERE = ("started", "machine", "command")


def shown(path, run=1):
    """All figures of a run, but for time and machine."""
    data = json.loads(fq("results", run, "--store", path, "--json", "-")[0])
    assert data["command"].count("--shard") == 0
    return {key: value for key, value in data.items() if key not in HERE}


def kept(path):
    """What is said of each run of a store."""
    return json.loads(fq("results", "--store", path, "--json", "-")[0])["runs"]


@pytest.fixture(scope="module")
def command(tiny_path):
    return ["sweep", "-m", tiny_path, "-c", 64, "--chunks", 3, *SITES, "-t", 1]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s.sqlite"
    fq(*command, "--store", path)
    return shown(path)


@pytest.fixture(scope="module")
def shards(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"{i}.sqlite" for i in range(1, N + 1)]
    for i, path in enumerate(paths, 1):
        out, _ = fq(*command, "--shard", f"{i}/{N}", "--store", path)
        assert out.startswith(f"shard {i}/{N}: ") and "fq results merge" in out
    return paths


def test_shards_in_any_order_are_the_whole(shards, whole, tmp_path):
    rng = random.Random(3)
    for k in range(2):
        out, order = tmp_path / f"{k}.sqlite", rng.sample(shards, N)
        said, _ = fq("results", "merge", out, *order)
        assert said.rstrip().endswith("chunks of cells have ended")
        assert shown(out) == whole
    # one after another, and again: the same
    out = tmp_path / "slowly.sqlite"
    for path in rng.sample(shards, N) + shards[:2]:
        fq("results", "merge", out, path)
    assert shown(out) == whole and len(kept(out)) == 1
    (found,) = json.loads(fq("results", "merge", out, f"{shards[0]}:1", "--json", "-")[0])["shards"]
    assert found["added"] == 0


def test_figures_name_the_chunks_that_ended(command, tmp_path):
    """Which need not be the first."""
    path = tmp_path / "s.sqlite"
    fq(*command, "--shard", "3/3", "--store", path)
    data = json.loads(fq("results", 1, "--store", path, "--json", "-")[0])
    assert data["n_chunks"] == 1 and data["chunks_of_text"] == data["chunk_indices"][2:]


def test_a_store_of_some_shards_is_gone_on_with(shards, command, whole, tmp_path):
    out = tmp_path / "s.sqlite"
    fq("results", "merge", out, *shards[1:4])
    assert json.loads(fq("results", 1, "--store", out, "--json", "-")[0])["partial"]
    fq(*command, "--resume", "--store", out)
    assert shown(out) == whole


def test_shards_of_one_store_at_once(command, whole, tmp_path):
    path = tmp_path / "s.sqlite"
    running = [popen(*command, "--shard", f"{i}/4", "--resume", "--store", path) for i in range(1, 5)]
    for process in running:
        process.communicate()
        assert process.returncode == 0
    assert shown(path) == whole


def test_a_shard_that_is_killed_goes_on(command, whole, tmp_path):
    rng, paths = random.Random(1), [tmp_path / f"{i}.sqlite" for i in (1, 2)]
    for i, path in enumerate(paths, 1):
        arguments = [*command, "--shard", f"{i}/2", "--resume", "--store", path]
        running, most = popen(*arguments), rng.randint(1, 8)
        while running.poll() is None and ended(path) < most:
            pass
        running.send_signal(signal.SIGKILL)
        running.communicate()
        out, _ = fq(*arguments, "--json", "-")
        data = json.loads(out)
        assert data["ended"] == data["of"] > 0 and data["shard"] == f"{i}/2"
    fq("results", "merge", tmp_path / "all.sqlite", *paths)
    assert shown(tmp_path / "all.sqlite") == whole


def test_the_command_is_that_of_all(shards, command):
    for path in shards[:2]:
        about = json.loads(fq("results", 1, "--store", path, "--json", "-")[0])
        assert about["command"] == " ".join(map(str, ["fq", *command]))


def test_the_command_however_it_is_written():
    for shard in ("--shard 1/2", "--shard=1/2", "--sh 1/2", "--sha=1/2"):
        for store in ("--store x", "--store=x", "--sto x"):
            line = f"fq sweep {shard} --sites 'a[*]' {store} --scored all -s 3 --seed 2"
            args = argparse.Namespace(shard="1/2", command_line=line)
            assert command_of_all(args) == "fq sweep --sites 'a[*]' --scored all -s 3 --seed 2"
    line = "fq sweep --store x"
    assert command_of_all(argparse.Namespace(shard=None, command_line=line)) == line


def test_the_array_of_the_docs(tiny_path, tmp_path):
    """The script as it stands in docs/scale-out.md, but for fewer and shorter chunks."""
    docs = (Path(__file__).parents[2] / "docs" / "scale-out.md").read_text(encoding="utf-8")
    script = re.search(r"<!-- script: sweep.sh -->\n```sh\n(.*?)```", docs, re.DOTALL)[1]
    for words, few in (("--chunks 128", "--chunks 4 -c 64"), ("SHARDS=64", "SHARDS=3")):
        assert words in script
        script = script.replace(words, few)
    (tmp_path / "sweep.sh").write_text(script)
    (tmp_path / "t.txt").write_text(SAMPLE_TEXT.read_text(encoding="utf-8")[:6000])
    for task in (2, 1, 3):
        of_task = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_CPUS_PER_TASK": "1"}
        variables = environment() | of_task | {"MODEL": str(tiny_path), "TEXT": "t.txt"}
        variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
        done = subprocess.run(["sh", "sweep.sh"], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"shard {task}/3: ")
    out, _ = fq("results", "merge", tmp_path / "all.sqlite", *tmp_path.glob("shard-*.sqlite"))
    ended, of = re.search(r"(\d+) of (\d+) chunks of cells have ended", out).groups()
    assert ended == of


# ---------------------------------------------------------------- what is no one experiment


@pytest.fixture
def stores(tmp_path):
    """Two with a run each, which hold some of one sweep."""
    with contextlib.ExitStack() as stack:
        found = []
        for name in ("a", "b"):
            store = stack.enter_context(Results(tmp_path / f"{name}.sqlite"))
            store.add(RUN)
            found.append(store)
        yield found


def put(store, *rows, number=1):
    for cell, chunk, left in rows:
        store.save(number, cell, chunk, left)


def test_other_bits_are_refused_and_nothing_is_lost(stores, tmp_path):
    a, b = stores
    put(a, (0, 0, left_of(1)), (1, 0, left_of(2)))
    put(b, (0, 1, left_of(5, 1)), (1, 0, left_of(3)))
    with Results(tmp_path / "out.sqlite") as out:
        with pytest.raises(FqError, match=r"b\.sqlite: run 1: cell 1, chunk 1 has other bits than run 1 of"):
            merge(out, [(a.path, 1), (b.path, 1)])
        assert out.list() == []
        merge(out, [(a.path, 1)])
        with pytest.raises(FqError, match="other bits"):
            merge(out, [(b.path, 1)])
        assert {at: bits(left) for at, left in out.load(1).items()} == {
            (0, 0): bits(left_of(1)),
            (1, 0): bits(left_of(2)),
        }


@pytest.mark.parametrize("field", ["nll_base", "nll", "kld", "dp", "same_top", "p_top_base", "counts"])
def test_any_bit_counts(stores, tmp_path, field):
    a, b = stores
    left = left_of(1)
    put(a, (0, 0, left))
    if field == "counts":
        other = left._replace(counts=left.counts + np.eye(1, len(COUNT_COLUMNS)))
    else:
        values = getattr(left.paired, field).copy()
        values[1] = not values[1] if field == "same_top" else np.nextafter(values[1], 9)
        other = left._replace(paired=replace(left.paired, **{field: values}))
    put(b, (0, 0, other))
    with Results(tmp_path / "out.sqlite") as out, pytest.raises(FqError, match="has other bits than run 1"):
        merge(out, [(a.path, 1), (b.path, 1)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_sha256": "c" * 64}, "the model's SHA-256: "),
        ({"text_sha256": "c" * 64}, "the text's SHA-256: "),
        ({"settings": {"n_ctx": 9}}, "n_ctx: 8 and 9"),
        ({"settings": {"scored": "all"}}, "scored: second-half and all"),
        ({"settings": {"chunk_indices": [2, 0], "n_chunks_asked": 2}}, "n_chunks_asked: 3 and 2"),
        ({"settings": {"chunk_seed": 4}}, "chunk_seed: 0 and 4"),
        ({"settings": {"activations": "ggml"}}, "activations: exact and ggml"),
        ({"settings": {"baseline": ["ffn_norm=bf16"]}}, "baseline: None and"),
        ({"settings": {"calibrations": [{"sha256": "1"}]}}, "the SHA-256 of calibrations: "),
        ({"numerics": {"contract": 7}}, "numerics: contract: None and 7"),
        ({"cells": RUN.cells[:1]}, "cells: the first alone has ffn_norm"),
        ({"cells": (*RUN.cells, replace(CELL, name="x"))}, "cells: the second alone has x (single"),
        ({"cells": (RUN.cells[0], replace(CELL, rules=("x",)))}, "=bf16); cells: the second alone has ffn"),
        ({"cells": RUN.cells[::-1]}, "cells: in another order"),
        ({"cells": (*RUN.cells, CELL)}, "cells: the second alone has ffn_norm"),
        ({"text_sha256": "c" * 64, "settings": {"n_ctx": 9}}, "; n_ctx: 8 and 9"),
    ],
)
def test_what_differs_is_said(changes, words):
    parts = {
        key: (getattr(RUN, key) | value if isinstance(value, dict) else value)
        for key, value in changes.items()
    }
    assert words in difference(RUN, replace(RUN, **parts))


def test_what_decides_no_bits_is_joined_in_any_order():
    runs = [
        RUN,
        replace(RUN, numerics={"isa": "avx512", "threads": 8}, versions={"fq": "2"}),
        replace(RUN, machine={"processor": "q"}, settings=RUN.settings | {"batch": 4, "model": "/x/m.gguf"}),
    ]
    assert all(difference(RUN, run) is None for run in runs)
    found = {repr(sorted(vars(joined(order)).items())) for order in itertools.permutations(runs)}
    assert len(found) == 1
    whole = joined(runs)
    assert whole.numerics == {"isa": "avx2 | avx512", "threads": "2 | 8"} and whole.versions == {
        "fq": "1 | 2"
    }
    assert joined([whole, *runs]) == whole
    assert joined([RUN, RUN]) == RUN


def test_a_run_of_another_experiment_stays_apart(stores, tmp_path):
    a, b = stores
    b.add(replace(RUN, text_sha256="c" * 64))
    put(a, (0, 0, left_of(1)))
    put(b, (0, 0, left_of(9)), number=2)
    with Results(tmp_path / "out.sqlite") as out:
        merge(out, [(b.path, 2)])
        found = merge(out, [(a.path, 1)])
        assert found == (2, [1], [1], 1) and len(out.list()) == 2
        with pytest.raises(FqError, match=r"run 1 of .*a\.sqlite and run 2 of .*b\.sqlite are not of one"):
            merge(out, [(a.path, 1), (b.path, 2)])


def test_an_older_store_is_merged(stores, tmp_path):
    """Which has not kept all that there is today."""
    a, b = stores
    left = left_of(1)
    put(a, (0, 0, left))
    put(b, (0, 0, left))
    with contextlib.closing(sqlite3.connect(tmp_path / "b.sqlite")) as db:
        db.execute("UPDATE baselines SET p_top = NULL, digest = NULL")
        db.commit()
    with Results(tmp_path / "out.sqlite") as out:
        merge(out, [(b.path, 1)])
        merge(out, [(a.path, 1)])
        ((_, there),) = out.load(1).items()
        assert bits(there) == bits(left)


def test_merged_again_each_row_is_read_alone(stores, tmp_path, monkeypatch):
    """Not all that is said of the run with each, while nobody else can write."""
    a, _ = stores
    at = [(cell, chunk) for cell in (0, 1) for chunk in (0, 1, 2)]
    put(a, *((cell, chunk, left_of(cell, chunk)) for cell, chunk in at))
    with Results(tmp_path / "out.sqlite") as out:
        merge(out, [(a.path, 1)])
        read, get = [], Results.get
        monkeypatch.setattr(Results, "get", lambda store, number: read.append(store) or get(store, number))
        assert merge(out, [(a.path, 1)]).added == [0]
        assert read.count(out) <= 3


def test_merged_at_once_or_one_after_the_other_it_is_one_run(stores, tmp_path):
    """Of two versions: what says which runs go on with it, too."""
    a, b = stores
    with b.writing():
        b.replace(1, replace(RUN, versions={"fq": "2"}))
    put(a, (0, 0, left_of(1)))
    put(b, (1, 0, left_of(2)))
    found = []
    for name, parts in (("1", [[a, b]]), ("2", [[a], [b]]), ("3", [[b], [a]])):
        with Results(tmp_path / f"{name}.sqlite") as out:
            for part in parts:
                merge(out, [(store.path, 1) for store in part])
            found.append((out.get(1), out.begin(out.get(1), out.get(1)).was is not None))
        with contextlib.closing(sqlite3.connect(out.path)) as db:
            found[-1] += db.execute("SELECT identity FROM runs").fetchone()
    assert found[0] == found[1] == found[2] and found[0][1]


# ---------------------------------------------------------------- by a user


def test_bad_requests(shards, tmp_path):
    out = tmp_path / "out.sqlite"
    for arguments, words in (
        (["merge", out], "merge needs a store"),
        (["merge", out, tmp_path / "none.sqlite"], "there is no such file"),
        (["merge", shards[0], shards[1], shards[0]], "is the store that the others are merged into"),
        (["merge", out, f"{shards[0]}:7"], "there is no run 7"),
        (["merge", out, shards[0], "--csv", "-"], "--csv needs the number of a run"),
        (["check", 9, "--store", shards[0]], "there is no run 9"),
        (["check", "x", "--store", shards[0]], "RUN must be the number of a run"),
        (["delete", "--store", shards[0]], "delete needs numbers of runs"),
        (["delete", 1, 9, "--store", shards[0]], "there is no run 9"),
    ):
        _, err = fq("results", *arguments, status=2)
        assert words in err
    assert not out.exists() or kept(out) == []
    assert kept(shards[0])[0]["run"] == 1


def test_stores_that_cannot_be_merged_leave_nothing_in_it(shards, command, tmp_path):
    other, out = tmp_path / "other.sqlite", tmp_path / "out.sqlite"
    fq(*command, "--chunks", 1, "--store", other)
    _, err = fq("results", "merge", out, shards[0], other, status=2)
    assert "are not of one experiment: n_chunks_asked: 3 and 1" in err
    for word, said in ((tmp_path / "missing", "no such file"), (f"{shards[0]}:77", "there is no run 77")):
        _, err = fq("results", "merge", out, word, status=2)
        assert said in err
    assert not out.exists()
    fq("results", "merge", out, shards[0])
    before = kept(out)
    fq("results", "merge", out, other, shards[1], status=2)
    assert kept(out) == before


def test_estimates_are_not_merged(tiny_path, tmp_path):
    store = tmp_path / "s.sqlite"
    arguments = ["-m", tiny_path, "-c", 64, "--chunks", 1, "--format", "bf16", "--sites", "l_out"]
    fq("sensitivity", *arguments, "--verify", 0, "--store", store)
    _, err = fq("results", "merge", tmp_path / "out.sqlite", store, status=2)
    assert "there is no sweep in it" in err
    _, err = fq("results", "merge", tmp_path / "out.sqlite", f"{store}:1", status=2)
    assert "run 1 is an estimate; sweeps are merged" in err


def test_checked_and_deleted(command, tmp_path):
    path = tmp_path / "s.sqlite"
    for chunks in (1, 2):
        fq(*command, "--chunks", chunks, "--store", path)
    first = json.loads(fq("results", 1, "--store", path, "--json", "-")[0])
    found = json.loads(fq("results", "check", "--store", path, "--json", "-")[0])["runs"]
    assert [one["run"] for one in found] == [1, 2] and found[1]["rows"] == 2 * found[0]["rows"] > 0
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE chunks SET kld = x'00' WHERE run = 2 AND cell = 3 AND chunk = 1")
        db.commit()
    _, err = fq("results", "check", "--store", path, status=2)
    assert "run 2 cannot be read: cell 3, chunk 2: kld is not of" in err and err.count("\n") == 1
    fq("results", "check", 1, "--store", path)
    out, _ = fq("results", "delete", 2, "--store", path)  # the damaged one
    assert out == "deleted: run 2\n"
    assert json.loads(fq("results", 1, "--store", path, "--json", "-")[0]) == first
    with contextlib.closing(sqlite3.connect(path)) as db:
        for table in ("runs", "chunks", "baselines", "estimates"):
            key = "id" if table == "runs" else "run"
            assert db.execute(f"SELECT COUNT(*) FROM {table} WHERE {key} = 2").fetchone() == (0,)
    fq(*command, "--chunks", 1, "--store", path)
    assert [one["run"] for one in kept(path)] == [1, 3]


def test_several_runs_are_no_shards(command, shards):
    _, err = fq(*command, "-c", 32, "--shard", "1/2", status=2)
    assert "a shard is of one run" in err
    _, err = fq(*command, "--shard", "3/2", status=2)
    assert "a shard is i/n" in err
