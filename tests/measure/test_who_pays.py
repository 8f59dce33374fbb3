"""Whose KL divergence a mean is: shares, places, confidence, and where it is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq
from report_store import WINNER, data_for

from fq.measure.inference import positive_interval
from fq.measure.statistics import Paired, summarise
from fq.measure.who_pays import is_carried_by_few, who_pays, who_pays_text
from fq.report.tables import cell_tables
from fq.report.verdict import verdict


def chunk(kld, p) -> Paired:
    kld, p = np.array(kld, np.float64), np.array(p, np.float64)
    nothing = np.zeros(len(kld))
    return Paired(-np.log(p), nothing, kld, nothing, nothing == 0)


def test_shares_of_the_largest_places_and_confidence():
    rng = np.random.default_rng(0)
    klds, p = rng.exponential(size=(5, 40)), rng.uniform(0.001, 1, (5, 40))
    p[0, 0], p[1, 1] = 1.0, 0.5
    found = who_pays(klds, -np.log(p))
    sizes = np.sort(klds.ravel())[::-1]
    assert found["top"] == pytest.approx(
        {
            "0.1%": sizes[0] / sizes.sum(),
            "1%": sizes[:2].sum() / sizes.sum(),
            "10%": sizes[:20].sum() / sizes.sum(),
        }
    )
    assert [(x["from"], x["to"], x["n"]) for x in found["position"]] == [
        (1, 10, 50), (11, 20, 50), (21, 30, 50), (31, 40, 50)
    ]  # fmt: skip
    third = klds[:, 20:30]
    assert found["position"][2]["mean_kld"] == pytest.approx(third.mean())
    assert found["position"][2]["mean_kld_ci95_chunks"] == pytest.approx(
        positive_interval(third.mean(axis=1))
    )
    sure = klds[(p >= 0.5) & (p < 0.9)]
    assert found["confidence"][3]["n"] == sure.size and found["confidence"][3]["share"] == pytest.approx(
        sure.sum() / klds.sum()
    )
    for parts in (found["position"], found["confidence"]):
        assert sum(x["share"] for x in parts) == pytest.approx(1) and sum(x["n"] for x in parts) == klds.size
    assert not is_carried_by_few(found)


def test_a_mean_that_one_token_carries_is_said_to_be():
    klds = np.full((4, 50), 1e-6)
    klds[2, 7] = 1.0
    found = who_pays(klds, np.full((4, 50), -np.log(0.3)))
    assert is_carried_by_few(found) and found["top"]["1%"] > 0.99
    text = "\n".join(who_pays_text(found))
    assert "the mean is carried by few tokens: 1 % of them have half of it or more" in text
    assert found["confidence"][0] == {
        "from": 0.0, "to": 0.01, "n": 0, "mean_kld": None, "mean_kld_ci95_chunks": None, "share": 0.0
    }  # fmt: skip


@pytest.mark.parametrize("kld", [0.0, np.nan])
def test_nothing_to_pay(kld):
    found = who_pays([np.array([kld, 0.0])], [np.array([0.7, 0.7])])
    assert found is None and "no token's KL divergence is above 0" in who_pays_text(found)[0]
    assert not is_carried_by_few(found)


def test_fewer_tokens_than_parts():
    found = summarise([chunk([1.0], [0.5])] * 4)["who_pays"]
    assert [(x["from"], x["to"]) for x in found["position"]] == [(1, 1)]


def test_the_report_says_it():
    data = data_for(WINNER)
    assert any(table.title.startswith("Who pays") for _, tables in cell_tables(data) for table in tables)
    assert "Few tokens" not in [statement.about for statement in verdict(data)]
    data["cells"][2]["comparison"]["who_pays"]["top"]["1%"] = 0.7
    said = {statement.about: statement.lines[0] for statement in verdict(data)}
    assert data["cells"][2]["name"] in said["Few tokens"]
    for entry in data["cells"]:
        del entry["comparison"]["who_pays"]  # as an earlier version wrote them
    assert verdict(data) and cell_tables(data)


def test_the_command(tiny_path, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("Words of a text, and more of them: one, two, three. " * 60)
    args = ("perplexity", "-m", tiny_path, "-f", text, "-c", 24, "--fake-quant-ffn-norm", "bf16")
    out, _ = fq(*args, "--who-pays", "--json", tmp_path / "a.json")
    assert "scored tokens 1 to 3 of a chunk" in out and "of the KL divergence the top 0.1 % of tokens" in out
    assert json.loads((tmp_path / "a.json").read_text())["comparison"]["who_pays"]["top"]["10%"] > 0.1
    assert "scored tokens" not in fq(*args)[0]
