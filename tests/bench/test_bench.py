"""The benchmarks run, compare equal things, and say what they should; times are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last: an installed package goes before the sources

import fq_kernels
from bench import report
from bench.cases import OPS, Bench, Place
from bench.harness import Contestant, alternate
from bench.kept import keep, kept, marks

ROOT = Path(__file__).parents[2]


def test_contestants_alternate_and_warm_up_is_dropped():
    log = []

    def contestant(name):
        return Contestant(
            lambda: log.append(name), lambda: log.append(f"<{name}"), lambda: log.append(f"{name}>")
        )

    # a turn of no length: one call each
    times = alternate({name: contestant(name) for name in "ab"}, rounds=3, turn=0, warm_up=2)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert log[-6 * 5 :] == ["<a", "a", "a>", "<b", "b", "b>"] * 5


def test_short_calls_are_repeated():
    calls = []
    alternate({"a": Contestant(lambda: calls.append(0))}, rounds=1, turn=1e-4, warm_up=0)
    assert len(calls) > 10


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_what_is_compared_is_equal(op, threads):
    with Bench(op, Place(96, 700, threads)) as bench:
        x = bench.x.copy()

        def result(contestant):
            bench.x[:] = x
            contestant.before()
            contestant.call()
            contestant.after()
            return bench.out.copy()

        ours = result(bench.ours(fq_kernels.isa()))
        if op.round_trip or not op.quant:
            if ggml := bench.ggml():
                np.testing.assert_array_equal(ours, result(ggml))
            np.testing.assert_allclose(ours, result(bench.numpy()), rtol=1e-5)
        else:
            ours_unfused = result(bench.ours(fq_kernels.isa(), unfused=True))
            np.testing.assert_array_equal(ours_unfused, result(bench.ggml()))
            np.testing.assert_allclose(ours, ours_unfused, rtol=2**-7)
        bench.x[:] = x
        bench.memcpy().call()
        np.testing.assert_array_equal(bench.copy, x)


def test_report(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench.report", "--quick", "--rounds", "3", "--json", str(out)]
    command += ["--length", "64", "--length", str(report.MAIN_LENGTH)]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    data = json.loads(out.read_text())
    assert data["machine"]["instruction sets"].split(", ") == fq_kernels.supported_isas()

    found = {(r["op"], r["by"], r["n"], r["level"], r["threads"]): r for r in data["results"]}
    assert len(found) == len(data["results"])
    best = fq_kernels.supported_isas()[-1]
    for op in OPS.values():
        for threads in (1, 2):
            r = found[op.name, best, report.MAIN_LENGTH, "L2", threads]
            wanted = {"memcpy"} | ({"ggml"} if threads == 1 or not op.round_trip else set())
            wanted |= ({"unfused"} if op.quant else set()) | ({"one thread"} if threads == 2 else set())
            assert set(r["ratios"]) == wanted
            low, middle, high = r["seconds"]
            assert 0 < low <= middle <= high
            assert r["gb_s"] == pytest.approx(8 * r["gelem_s"])
            assert r["gelem_s"] == pytest.approx(r["n"] * r["rows"] / middle / 1e9)
    assert found["rms_norm", "numpy", report.MAIN_LENGTH, "L2", 1]
    assert found["copy", "memcpy", report.MAIN_LENGTH, "memory", 1]
    assert found["empty task, back to back", "executor", None, "", 2]

    lines = run.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| operation |"))
    rows = [line for line in lines[start:] if line]
    assert len(rows) == 2 + len(found)
    assert {line.count("|") for line in rows} == {len(report.COLUMNS) + 1}


BEGIN, END = marks("ours")


def test_a_block_is_put_between_its_marks(tmp_path):
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for text in ("first", "second\nline"):
        keep(document, text, "ours")
        assert document.read_text() == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
        assert kept(document, "ours") == text


def test_blocks_of_one_document_are_kept_apart(tmp_path):
    document = tmp_path / "README.md"
    theirs = marks("theirs")
    document.write_text("\n".join([BEGIN, END, *theirs]))
    keep(document, "1", "theirs")
    keep(document, "2", "ours")
    assert document.read_text() == f"{BEGIN}\n\n2\n\n{END}\n{theirs[0]}\n\n1\n\n{theirs[1]}"


@pytest.mark.parametrize("old", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}"])
def test_a_document_without_the_marks_is_left_alone(tmp_path, old):
    document = tmp_path / "README.md"
    document.write_text(old)
    for access in (lambda: keep(document, "text", "ours"), lambda: kept(document, "ours")):
        with pytest.raises(ValueError, match=r"README.md: the line <!-- begin"):
            access()
    assert document.read_text() == old


@pytest.mark.parametrize(
    "wrong", [["--length", "0"], ["--rounds", "0"], ["--isa", "mmx"], ["--threads", "3"]]
)
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        report.parse(wrong)
    assert wrong[0] in capsys.readouterr().err
