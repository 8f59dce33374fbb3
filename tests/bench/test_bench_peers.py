"""The comparison with llama.cpp, on workers that stand in for it; times are not looked at."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last: an installed package goes before the sources

from bench.peers import __main__ as peers
from bench.peers import llama, measure, processes, table
from bench.peers.f32 import write_f32
from bench.peers.measure import MIN_ROUNDS, Rounds, Row, in_pairs
from bench.peers.processes import Idle, Worker, run_whole
from fq import Context, Executor, FqError, Model
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf

ROOT = Path(__file__).parents[2]
ONCE = Rounds(1, 60)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


ECHO = """
import sys
print("ok 7", flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "fail":
        sys.exit("no such word")
    print("ok", *(float(n) / 2 for n in numbers), flush=True)
"""
BUSY = """
import threading, time
print("ok", flush=True)
input()
def burn():
    time.sleep(0.3)
    while True: pass
threading.Thread(target=burn, daemon=True).start()
print("ok", flush=True)
input()
"""


def row(ours, theirs, model="any", key="prompt", **about):
    return Row(model, key, "prompt of 512", "tok/s", 2, ours, theirs, about)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("most", "seconds", "rounds"), [(2, 60, 2), (5, 60, 5), (5, 0, MIN_ROUNDS), (2, 0, 2)]
)
def test_ours_and_theirs_alternate_until_the_time_is_over(most, seconds, rounds):
    log = []

    def turn(name):
        log.append(name)
        return len(log)

    figures = in_pairs(lambda: turn("a"), lambda: turn("b"), Rounds(most, seconds))
    assert log == ["a", "b"] * rounds
    assert figures == (list(range(1, 2 * rounds, 2)), list(range(2, 2 * rounds + 1, 2)))


def test_a_ratio_is_taken_within_pairs():
    # the machine became four times slower for a while: the ratio of the medians would be 4
    assert row([200, 200, 50, 50, 200], [100, 100, 25, 25, 50]).ratio == (2, 2, 2)
    assert row([1, 2, 3, 4, 5], [1] * 5).ratio == (2, 3, 4)


@pytest.mark.parametrize(
    ("isa", "model", "key", "ratio", "bar", "holds"),
    [
        ("avx512", "SmolLM2-135M-Instruct.Q4_1", "prompt", 2.0, ">= 2.0", True),
        ("avx512", "SmolLM2-135M-Instruct.Q4_1", "prompt", 1.99, ">= 2.0", False),
        ("avx2", "SmolLM2-135M-Instruct.Q4_1", "prompt", 2.99, ">= 3.0", False),
        ("avx2", "SmolLM2-135M-Instruct.Q4_1.F32", "perplexity F32", 1.7, ">= 1.6", True),
        ("avx2", "tinyllama-shape.Q4_K_M", "peak memory", 1.2, "<= 1.2", True),
        ("neon", "tinyllama-shape.Q4_K_M", "peak memory", 1.3, "<= 1.2", False),
        ("neon", "tinyllama-shape.Q4_K_M", "prompt", 0.1, None, None),
        ("avx2", "tinyllama-shape.Q4_K_M", "perplexity", 0.1, None, None),
        ("avx2", "another", "prompt", 0.1, None, None),
    ],
)
def test_bars(monkeypatch, isa, model, key, ratio, bar, holds):
    monkeypatch.setattr(measure, "isa", lambda: isa)
    found = row([ratio] * 3, [1] * 3, model, key)
    assert (found.bar, found.holds) == (bar, holds)
    assert json.loads(json.dumps(found.as_json()))["holds"] is holds


def test_table_and_notes(monkeypatch):
    monkeypatch.setattr(measure, "isa", lambda: "avx512")
    phases = {"load_s": 0.5, "eval_s": 12.0}
    rows = [
        row([1234, 1244, 1254], [622, 622, 622], "SmolLM2-135M-Instruct.Q4_1"),
        row([1, 1, 1], [4, 5, 6], "tinyllama-shape"),
        row([1, 1, 1], [4, 5, 6], ppl_ours=21.5, ppl_theirs=21.25, seconds_theirs=phases),
    ]
    lines = table.markdown({"date": "today"}, rows).splitlines()
    assert lines[0] == "- date: today"
    assert lines[4] == (
        "| SmolLM2-135M-Instruct.Q4_1 | prompt of 512, tok/s | 2 | 1244 (1239–1249) | 622 (622–622) "
        "| 2.00 (1.99–2.01) | ≥ 2.0: holds |"
    )
    assert lines[5].endswith("| 1 (1–1) | 5 (4.5–5.5) | 0.20 (0.18–0.23) | ≥ 1.0: DOES NOT HOLD |")
    assert lines[6].endswith("|  |")
    assert {line.count("|") for line in lines[2:7]} == {len(table.COLUMNS) + 1}
    assert lines[-1] == (
        "- prompt of 512, 2 threads: PPL 21.5000, llama.cpp 21.2500; its seconds: load 0.50, eval 12.00"
    )


# ---------------------------------------------------------------- processes


def test_a_worker_answers_and_its_last_words_are_told():
    with Worker("peer", python(ECHO)) as worker:
        assert worker.greeting == [7]
        assert worker.ask("prompt", [1, 2]) == [0.5, 1]
        assert worker.ask("prompt", []) == []
        for _ in range(2):  # also when it is long gone
            with pytest.raises(FqError, match=r"^peer: no such word$"):
                worker.ask("fail", [])


@pytest.mark.parametrize("code", ["pass", "print('hello')"])
def test_a_worker_that_does_not_greet(code):
    with pytest.raises(FqError, match=r"^peer: (ended without a word|hello)$"):
        Worker("peer", python(code))


def test_a_worker_that_works_in_the_others_turn_is_found_out(monkeypatch):
    with Worker("peer", python(BUSY)) as worker:
        worker.settle()
        used = worker.cpu_seconds()
        with Idle(worker):
            pass
        worker.ask("go", [])
        with pytest.raises(FqError, match=r"peer used the processor .* the other's turn"):
            with Idle(worker):
                while worker.cpu_seconds() < used + 0.1:
                    pass
        monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.05)
        # long enough for a thread to be given a processor on a busy machine
        monkeypatch.setattr(processes, "LOOK_SECONDS", 1.0)
        with pytest.raises(FqError, match="peer goes on using the processor"):
            worker.settle()


def test_a_whole_process():
    ballast = np.ones(200 << 20, np.uint8)  # this process's memory is not the other's
    small = run_whole("small", python("print('some words')"))
    assert small.output == "some words\n"
    assert 0 < small.seconds and 2 << 20 < small.peak_bytes < ballast.nbytes
    large = run_whole("large", python("x = b'1' * (100 << 20); print(end='no line')"))
    assert large.peak_bytes > small.peak_bytes + (90 << 20)
    assert large.output == "no line"
    with pytest.raises(FqError, match=r"^peer: out of luck$"):
        run_whole("peer", python("import sys; sys.exit('a\\nout of luck')"))
    with pytest.raises(FqError, match=r"^peer: .*nothing.here"):
        run_whole("peer", ["/nothing/here"])


# ---------------------------------------------------------------- what is measured


@dataclass
class FakePeer:
    """fq in llama.cpp's place, or a process that prints ``says``."""

    says: object = None
    n_vocab: int | None = None

    def serve(self, model, threads, n_ctx, *, repack):
        if self.n_vocab is not None:
            return python(f"print('ok {self.n_vocab}'); input()")
        return [sys.executable, "-m", "bench.peers.ours", model, str(threads), str(n_ctx)]

    def run(self, *_, repack):
        return python(f"print('�', {json.dumps(self.says)!r}, sep='\\n')")

    def perplexity(self, *_):
        return python(f"print({json.dumps(self.says)!r})")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.chdir(ROOT)  # python -m model
    for name, value in {"N_PROMPT": 40, "N_FIRST": 3, "N_DECODE": 5, "N_CTX": 48, "PPL_CTX": 64}.items():
        monkeypatch.setattr(measure, name, value)


def test_speed(small, tiny_path):
    rows = list(measure.speed(tiny_path, FakePeer(), threads=2, rounds=Rounds(3, 60)))
    assert [(r.model, r.key, r.threads) for r in rows] == 2 * [
        ("tiny", "decode", 2),
        ("tiny", "prompt", 2),
    ]
    assert ["--no-repack" in r.what for r in rows] == [False, False, True, True]
    for r in rows:
        assert len(r.ours) == len(r.theirs) == 3 and min(*r.ours, *r.theirs) > 0
    with Worker("fq", FakePeer().serve(str(tiny_path), 1, 48, repack=True)) as worker:
        assert worker.greeting == [512]
        assert len(worker.ask("prompt", range(9))) == 1
        assert len(worker.ask("decode", [4, *range(9)])) == 5  # ids 4 to 8, one by one


def test_another_vocabulary_is_not_the_same_model(small, tiny_path):
    with pytest.raises(FqError, match=r"512.* in fq's vocabulary, .*100"):
        next(measure.speed(tiny_path, FakePeer(n_vocab=100), 1, ONCE))


def test_cold_start(small, tiny_path):
    ids = Model(tiny_path).tokenizer.encode("Hello world")
    says = {"prompt_tokens": list(ids), "generated_tokens": [1, 2, 3, 4, 5]}
    rows = list(measure.cold_start(tiny_path, FakePeer(says), threads=1, rounds=ONCE))
    assert [r.key for r in rows] == ["cold start", "peak memory"] * 2
    assert all(r.ours[0] > 0 and r.theirs[0] > 0 for r in rows)
    assert rows[1].ours[0] > 20  # MiB: numpy alone is more
    for wrong in ({"prompt_tokens": [1]}, {"generated_tokens": [1]}):
        with pytest.raises(FqError, match="not the same work"):
            next(measure.cold_start(tiny_path, FakePeer(says | wrong), 1, ONCE))


def test_perplexity(small, tiny_path):
    context = {"model": tiny_path, "f32": tiny_path, "text": SAMPLE_TEXT}
    options = ["-f", str(SAMPLE_TEXT), "-c", "64", "--chunks", "2", "--json", "-"]
    options += ["--chunk-order", "first"]
    run = run_whole("fq", [sys.executable, "-m", "fq", "perplexity", "-m", str(tiny_path), *options])
    ppl = json.loads(run.output)["ppl"]
    says = {"ppl": ppl * 1.01, "load_s": 0.5}
    both = list(measure.perplexity(**context, llama=FakePeer(says), threads=1, chunks=2, rounds=ONCE))
    assert [r.key for r in both] == ["perplexity", "perplexity F32"]
    assert both[0].about == {
        "ppl_ours": ppl,
        "ppl_theirs": pytest.approx(ppl * 1.01),
        "seconds_theirs": {"load_s": 0.5},
    }
    says["ppl"] = ppl * 1.05
    with pytest.raises(FqError, match="not the same work"):
        list(measure.perplexity(**context, llama=FakePeer(says), threads=1, chunks=2, rounds=ONCE))


def test_the_f32_version_is_the_same_model(tmp_path):
    packed, unpacked = tmp_path / "packed.gguf", tmp_path / "unpacked.gguf"
    write_llama_gguf(packed, tiny_shape(), mix="Q4_K_M")
    write_f32(packed, unpacked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed.gguf", "unpacked.gguf"]
    before, after = Model(packed), Model(unpacked)
    assert {w.type.name for w in after.weights.values()} == {"F32"}
    assert {w.type.name for w in before.weights.values()} >= {"Q4_K", "Q6_K"}
    for name, weight in before.weights.items():
        np.testing.assert_array_equal(after.weights[name].unpack(slice(None)), weight.unpack(slice(None)))
    ids = before.tokenizer.encode("Hello world, once more")
    assert after.tokenizer.encode("Hello world, once more") == ids
    with Executor(1) as executor:
        logits = [Context(model, 32, executor).eval(ids) for model in (before, after)]
    np.testing.assert_allclose(*logits, atol=1e-4)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "2", "0"], "--threads must be at least 1"),
        (["--perplexity-threads", "0"], "--perplexity-threads must be at least 1"),
        (["--chunks", "-1"], "--chunks must be at least 1"),
        (["--only", "perplexity"], "needs a text"),
        (["--only", "all"], "--only"),
    ],
)
def test_wrong_options_are_refused(wrong, message, capsys):
    with pytest.raises(SystemExit):
        peers.parse(["--llama-python", "python", *wrong])
    assert message in capsys.readouterr().err


def test_llama_cpp_must_be_given(capsys):
    with pytest.raises(SystemExit):
        peers.parse([])
    assert "--llama-python" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo '[null, null]'", "has no llama-cpp-python: see bench/peers/README.md"),
        ("""echo '["/nothing/here", "1.0"]'""", "/nothing/here/lib/libllama.so is missing: see"),
        ("echo no module >&2; exit 3", "no module"),
        (None, "No such file"),
    ],
)
def test_without_llama_cpp(tmp_path, capsys, answer, message):
    fake = tmp_path / "python"
    if answer:
        fake.write_text(f"#!/bin/sh\n{answer}\n")
        fake.chmod(0o755)
    assert peers.main(["--llama-python", str(fake)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.peers: ") and message in error and error.count("\n") == 1
    assert llama.HOW_TO in error


def test_the_command_shows_no_folders(tmp_path):
    assert peers.command(
        ["--llama-python", "/opt/x/bin/python", "-m", "a.gguf", "-f", "/data/wiki text"]
    ) == ("python -m bench.peers --llama-python python -m a.gguf -f 'wiki text'")
