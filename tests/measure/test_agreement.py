"""Whether runs rank their cells alike: the correlation, its interval, and the commands that say it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq

from fq.measure.agreement import agreement, agreement_text, rank_correlation


def test_spearmans_correlation():
    assert rank_correlation(np.array([1.0, 2, 3, 9]), np.array([0.1, 0.2, 4, 5])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 9])) == pytest.approx(0.9486833)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


def run(klds: np.ndarray, names=None, group="g", lost=()) -> dict:
    cells = [
        {
            "name": name, "group": group, "kind": "single", "not_finite_tokens": int(i in lost),
            "comparison": {"chunks": {"mean_kld": row.tolist()}},
        }
        for i, (name, row) in enumerate(zip(names or map(str, range(len(klds))), klds, strict=True))
    ]  # fmt: skip
    return {"groups": [{"name": group}], "cells": cells}


def test_pairs_of_runs():
    rng = np.random.default_rng(0)
    means = np.geomspace(1, 50, 12)[:, np.newaxis]
    alike = [run(means * rng.lognormal(sigma=0.4, size=(12, n))) for n in (8, 6)]
    other = run(means[rng.permutation(12)] * rng.lognormal(sigma=0.4, size=(12, 8)))
    first, second, third = agreement([*alike, other])
    assert [(f["one"], f["other"], f["n"]) for f in (first, second, third)] == [
        (0, 1, 12),
        (0, 2, 12),
        (1, 2, 12),
    ]
    low, high = first["ci95_chunks"]
    assert 0.8 < low <= first["spearman"] <= high <= 1
    assert abs(second["spearman"]) < 0.6 and second["ci95_chunks"][0] < second["spearman"]
    assert agreement([*alike, other]) == [first, second, third], "drawn the same again"
    assert "run b" in agreement_text([first], ["run a", "run b"])


def test_only_cells_that_both_have_and_that_say_something():
    klds = np.arange(1.0, 31).reshape(6, 5)
    klds[0] = 0
    one, other = run(klds, lost=[5]), run(klds[:, :3], names=["0", "1", "2", "3", "x", "5"])
    (found,) = agreement([one, other])
    assert found["n"] == 3 and found["ci95_chunks"] is None, "three chunks are too few"
    assert agreement([one, run(klds, group="h")]) == [] and agreement([run(klds[:2]), run(klds[:2])]) == []
    assert "no order to compare" in agreement_text([], [])


def test_the_commands(tiny_path, tmp_path):
    store, out = tmp_path / "s.sqlite", tmp_path / "a.json"
    texts = tmp_path / "prose.txt", tmp_path / "code.txt"
    (short := tmp_path / "short.txt").write_text("A few words.")
    texts[0].write_text("Words of a text, and more of them: one, two, three. " * 80)
    texts[1].write_text("for i in range(3):\n    print(i, [j ** 2 for j in (1, 2)])\n" * 80)
    sweep = ("sweep", "-m", tiny_path, "--store", store, "--chunks", 4, "--sites", "*[*].raw")
    files = ("-f", texts[0], "-f", texts[1])
    said, _ = fq(*sweep, *files, "-c", 16, "-c", 24, "--json", out)
    data = json.loads(out.read_text())
    assert [(r["text"][-9:-4], r["n_ctx"]) for r in data["runs"]] == [
        ("prose", 16), ("prose", 24), ("/code", 16), ("/code", 24)
    ]  # fmt: skip
    assert len(data["agreement"]) == 6 and "prose.txt, 16" in said and "do cells rank alike?" in said
    ranked, _ = fq("results", "--store", store, "rank", 1, 4, "--json", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["agreement"][0]["spearman"] == pytest.approx(
        data["agreement"][2]["spearman"]
    )
    assert "run 4" in ranked
    fq(*sweep, *files, "-c", 16, "-c", 24, "--resume")
    assert len(fq("results", "--store", store)[0].splitlines()) == 5, "each goes on with its own"
    for args, message in (
        ((*sweep, "-f", texts[0], "-f", texts[0]), "-f: one is given twice"),
        ((*sweep, "-c", 16, "-c", 16), "-c: one is given twice"),
        ((*sweep, *files, "--json", texts[1]), "is the text"),
        ((*sweep, "-f", texts[0], "-f", tmp_path / "none.txt"), "none.txt"),
        ((*sweep, "-f", short, "-f", texts[0], "-c", 64), "short.txt: the text has"),
        ((*sweep, "-f", texts[0], "-f", short, "-c", 64), "short.txt: the text has"),
        (("results", "--store", store, "rank", 1), "rank needs two different runs"),
        (("results", "--store", store, "rank", 1, 1), "rank needs two different runs"),
        (("results", "--store", store, "rank", 1, "x"), "RUN must be the number of a run"),
    ):
        assert message in fq(*args, status=2)[1]
