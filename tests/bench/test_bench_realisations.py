"""bench.realisations: dithers beside summation orders."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from bench import realisations
from fq_kernels import format_names, get_format, isa, rms_norm_f32
from fq_kernels.rules import FakeQuant


def test_variances_and_their_ratio():
    rng = np.random.default_rng(0)
    one, other = rng.normal(0, 2, (200, 5)), rng.normal(3, 1, (400, 5))
    variance, df = realisations.pooled(one)
    assert variance == pytest.approx(4, rel=0.1) and df == pytest.approx(5 * 199, rel=0.05)
    # one chunk that makes all of the variance has all of the freedom
    assert realisations.pooled(one * [1, 1e-6, 0, 0, 0])[1] == pytest.approx(199)
    ratio, low, high = realisations.against(one, other)
    assert low < 2 < high and low < ratio < high and high / low < 1.2
    few = realisations.against(one[:3], other)
    assert few[2] / few[1] > high / low


def test_what_is_moved_by_a_unit_falls_otherwise_at_ties_alone():
    x = np.random.default_rng(0).standard_normal((50, 500)).astype(np.float32)
    x[0] = 1 + 2.0**-8  # between two numbers of bf16
    own = get_format("bf16").quantise(x).values
    before, forced = format_names(), isa()
    with realisations.moved("bf16", 2) as names:
        one, other = (get_format(name).quantise(x).values for name in names)
    assert format_names() == before and isa() == forced
    for y in (one, other):
        assert 0.3 < (y[0] != own[0]).mean() < 0.7 and (y[1:] != own[1:]).mean() < 0.01
    assert 0.3 < (one[0] != other[0]).mean() < 0.7


def test_errors_are_those_that_the_rule_makes(tiny):
    """At the rule's point, while it records, and none of the model's figures is touched."""
    norm, n = tiny.norms[1], tiny.hparams.n_embd
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 6, n)).astype(np.float32)
    weight = weight[0]
    for point in ("raw", "weighted"):
        rule = f"{norm}.{point}=bf16"
        recorder = realisations.Recorder(tiny.values, rule, recording=True)
        plain = FakeQuant(tiny.values, rule)
        for begin, end in ((0, 4), (4, 6), (0, 6)):
            recorder.recording = end - begin < 6
            out, own = np.empty((2, end - begin, n), np.float32)
            for rules, y in ((recorder, out), (plain, own)):
                rules.rms_norm(norm, x[begin:end], eps=1e-5, weight=weight, out=y)
            assert out.tobytes() == own.tobytes()
        y = rms_norm_f32(x, eps=1e-5, weight=weight if point == "weighted" else None)
        assert list(recorder.errors) == [norm]
        assert np.array_equal(recorder.errors[norm], get_format("bf16").quantise(y).values - y)


@pytest.mark.parametrize("batch", [7, 32])
def test_errors_are_of_the_first_chunk(batch, tiny):
    """However many of its rows reach the last norms, where only those that are scored are computed."""
    args = argparse.Namespace(ctx_size=32, chunks=4, threads=1)
    tokens = np.arange(200) % 50 + 3
    found = realisations.ratios(tiny, tokens, ["*=bf16", "*=int8"], args, batch, [1])
    (errors,) = found.errors
    assert found.ratios.shape == (2, 4)
    assert [len(e) for e in errors.values()] == [31] * (len(tiny.norms) - 2) + [15] * 2


def test_correlations_are_of_all_pairs():
    one = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32)
    one[1] -= one[0] * (one[0] @ one[1]) / (one[0] @ one[0])  # nothing in common
    one[1] *= np.linalg.norm(one[0]) / np.linalg.norm(one[1])
    site = realisations.Place("ffn_norm", 0)
    found = realisations.correlations([{site: y} for y in (one[:1], one[1:], 3 * (one[:1] + one[1:]))])
    assert found[site] == pytest.approx(2 * 0.5**0.5 / 3, abs=1e-6)


def test_the_tables(tiny_path, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    arguments = ["-m", str(tiny_path), "-f", str(text), "-c", "32", "--chunks", "2", "-t", "1"]
    assert realisations.main([*arguments, "--seeds", "3", "--rule", "*=int8:group=32"]) == 0
    said, deviations, said_too, in_common = capsys.readouterr().out.strip().split("\n\n")
    assert "int8:group=32" in said and "32 tokens" in said and "chunk 1" in said_too
    head, _, dithers, moved = deviations.splitlines()
    assert head.count("chunk ") == 2
    cells = [cell.strip() for cell in dithers.strip("|").split("|")]
    assert cells[:2] == ["dithers", "3"] and float(cells[2]) > 0 and cells[5] == "1"
    assert moved.startswith("| one unit in the last place | 3 |")

    head, _, dithers, moved = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in in_common.splitlines()
    )
    assert head[2] == "attn_norm[0]" and head[-4] == "output_norm" and head[-3].startswith("mean of all ")
    assert dithers[1] == moved[1] == "3"
    # dithers have nothing in common anywhere, what is moved by a unit has nearly all in the first layer
    assert all(abs(float(cell)) < 0.2 for cell in dithers[2:-2])
    assert float(moved[2]) > 0.99
    assert float(dithers[-2]) == pytest.approx((1 - float(dithers[-3])) ** 0.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--rule", "ffn_norm=bf16:stochastic"], "without dither"),
        (["--rule", "ffn_norm=bf16:first-call"], "--rule must round every row"),
        (["-c", "2"], "a context of 2 tokens"),
    ],
)
def test_bad_input(arguments, said, tiny_path, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("word " * 400)
    assert realisations.main(["-m", str(tiny_path), "-f", str(text), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.realisations: ") and said in error and error.count("\n") == 1
