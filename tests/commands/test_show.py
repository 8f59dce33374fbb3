"""Figures as text."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from fq import Model, Perplexity
from fq.cli import main
from fq.commands.progress import Log, steps
from fq.commands.show import comparison_text
from fq.measure.statistics import Paired, summarise
from fq_kernels import Executor
from fq_kernels.rules import FakeQuant

# What llama-perplexity --kl-divergence prints before each colon, in its order.
LLAMA_PERPLEXITY = """\
====== Perplexity statistics ======
Mean PPL(Q)
Mean PPL(base)
Cor(ln(PPL(Q)), ln(PPL(base)))
Mean ln(PPL(Q)/PPL(base))
Mean PPL(Q)/PPL(base)
Mean PPL(Q)-PPL(base)

====== KL divergence statistics ======
Mean    KLD
Maximum KLD
99.9%   KLD
99.0%   KLD
95.0%   KLD
90.0%   KLD
Median  KLD
10.0%   KLD
 5.0%   KLD
 1.0%   KLD
 0.1%   KLD
Minimum KLD

====== Token probability statistics ======
Mean    Δp
Maximum Δp
99.9%   Δp
99.0%   Δp
95.0%   Δp
90.0%   Δp
75.0%   Δp
Median  Δp
25.0%   Δp
10.0%   Δp
 5.0%   Δp
 1.0%   Δp
 0.1%   Δp
Minimum Δp
RMS Δp
Same top p"""


def figures(text):
    """name -> (value, ± or None); probabilities are in per cent."""
    found = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(": ")
        if colon:
            value, _, se = re.sub("   95 %.*[(]", "", rest).replace("%", "").rstrip(")").partition("±")
            found[name.rstrip()] = (float(value), float(se) if se else None)
    return found


def test_the_full_table_is_llama_perplexitys():
    rng = np.random.default_rng(4)
    ramp = rng.permutation(1001) / 1000
    base = 2 + ramp
    chunks = [
        Paired(
            base,
            base + 1e-4 * (1 + i) * ramp,
            1e-7 * (3 + i) * ramp,
            1e-5 * (ramp - 0.5),
            ramp < 0.75,
            np.exp(-ramp),
        )
        for i in (0, 0, 1, 1)
    ]
    c = summarise(chunks)
    text = comparison_text(c)
    assert [line.partition(": ")[0].rstrip() for line in text.splitlines()] == LLAMA_PERPLEXITY.splitlines()
    got = figures(text)
    for name, value, se in (
        ("Mean PPL(Q)", c["ppl_quant"], c["ppl_quant_se"]),
        ("Mean PPL(base)", c["ppl_base"], c["ppl_base_se"]),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", 100 * c["ln_ppl_correlation"], None),
        ("Mean ln(PPL(Q)/PPL(base))", 0.75e-4, c["ln_ppl_ratio_se"]),
        ("Mean PPL(Q)/PPL(base)", math.exp(0.75e-4), c["ppl_ratio_se"]),
        ("Mean PPL(Q)-PPL(base)", c["ppl_quant"] - c["ppl_base"], c["ppl_diff_se"]),
        ("Mean    KLD", 1.75e-7, c["kld_se"]),
        ("Maximum KLD", 4e-7, None),
        ("Minimum KLD", 0, None),
        (" 0.1%   KLD", c["kld"]["0.1%"], None),
        ("Median  KLD", c["kld"]["median"], None),
        ("Mean    Δp", 0, 100 * c["dp_se"]),
        ("Maximum Δp", 0.5e-3, None),
        ("75.0%   Δp", 0.25e-3, None),
        (" 1.0%   Δp", -0.49e-3, None),
        ("Minimum Δp", -0.5e-3, None),
        ("RMS Δp", 100 * c["rms_dp"], 100 * c["rms_dp_se"]),
        ("Same top p", 100 * 750 / 1001, 100 * c["same_top_se"]),
    ):
        assert math.isclose(got[name][0], value, rel_tol=1e-5, abs_tol=1e-15), name
        assert (got[name][1] is None) == (se is None), name
        assert se is None or math.isclose(got[name][1], se, rel_tol=5e-3), name
    low, high = c["mean_kld_ci95_chunks"]
    assert f"1.75e-07   95 % over chunks: {low:+.3g} to {high:+.3g}   (±" in text


# ---------------------------------------------------------------- progress


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_a_log_soon_says_how_long_it_will_take(clock, capsys):
    log, said = Log(800), []
    for i in range(1, 801):
        clock[0] += 0.125
        log.step()
        if i == 560:
            log.line("[1/2] PPL 7")
        if line := capsys.readouterr().err:
            said.append((i, line))
    assert said == [
        (40, "5 %  5.0 s, 95 s left\n"),
        (280, "35 %  35.0 s, 65 s left\n"),
        (520, "65 %  65.0 s, 35 s left\n"),
        (560, "[1/2] PPL 7  70.0 s, 30 s left\n"),
        (800, "100 %  100.0 s, 0 s left\n"),
    ]


@pytest.mark.parametrize("command", ["perplexity", "sweep"])
def test_a_run_without_a_terminal_says_so_before_its_first_chunk_ends(
    command, tiny_path, tmp_path, monkeypatch, capsys
):
    """As long as a chunk may take: here each look at the clock takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    words = [command, "-m", str(tiny_path), "-c", "16", "-b", "4", "--chunks", "3"]
    words += ["--store", str(tmp_path / "s")] if command == "sweep" else ["--fake-quant", "*=bf16"]
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" left")]
    assert re.fullmatch(r"[1-9]\d* %  \d+\.0 s, [1-9]\d* s left", lines[0])
    chunks = [line for line in lines if line.startswith("[")]
    assert len(chunks) == 3 and chunks[-1].endswith(", 0 s left")


def test_steps_are_passed_on_and_all_of_them_counted(clock, capsys):
    def work():
        for i in range(4):
            clock[0] += 4
            yield i

    assert list(steps("rounds", work(), 4)) == [0, 1, 2, 3]
    assert capsys.readouterr().err == "rounds 50 %  8.0 s, 8 s left\n"


def test_what_is_left_of_a_measurement(tiny_path):
    model, calls = Model(tiny_path), []
    with Executor(1) as executor:
        run = Perplexity(
            model,
            range(64),
            n_ctx=16,
            fake_quant=FakeQuant(model.values, "*=bf16"),
            executor=executor,
            batch=4,
        )
        run.on_step = lambda: calls.append(0)
        left = [run.steps]
        for _ in run:
            left.append(run.steps)
            assert len(calls) + run.steps == left[0]
    assert left[-1] == 0 and len(left) == 5
