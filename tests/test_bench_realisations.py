"""bench.realisations: dithers beside batches and summation orders."""

from __future__ import annotations

import numpy as np
import pytest

from bench import realisations
from fq_kernels import format_names, get_format, isa


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


def test_the_table(tiny_path, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    arguments = ["-m", str(tiny_path), "-f", str(text), "-c", "32", "--chunks", "2", "-t", "1"]
    forced = isa()
    assert realisations.main([*arguments, "--seeds", "3", "--rule", "*=int8:group=32"]) == 0
    assert isa() == forced
    head, _, dithers, moved, orders = capsys.readouterr().out.splitlines()
    assert head.count("chunk ") == 2
    cells = [cell.strip() for cell in dithers.strip("|").split("|")]
    assert cells[:2] == ["dithers", "3"] and float(cells[2]) > 0 and cells[5] == "1"
    assert moved.startswith("| one unit in the last place | 3 |")
    assert orders.startswith("| batches and instruction sets | ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--rule", "ffn_norm=bf16:stochastic"], "without dither"),
        (["-c", "2"], "a context of 2 tokens"),
    ],
)
def test_bad_input(arguments, said, tiny_path, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("word " * 400)
    assert realisations.main(["-m", str(tiny_path), "-f", str(text), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.realisations: ") and said in error and error.count("\n") == 1
