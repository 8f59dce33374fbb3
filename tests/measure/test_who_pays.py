"""Whose KL divergence a mean is: shares, places, confidence, and where it is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq
from report_store import WINNER, data_for

from fq.measure.inference import ratio_test
from fq.measure.statistics import Paired, summarise
from fq.measure.who_pays import is_carried_by_few, who_pays, who_pays_text
from fq.report.tables import cell_tables
from fq.report.verdict import verdict


def chunk(kld, p) -> Paired:
    kld, p = np.array(kld, np.float64), np.array(p, np.float64)
    nothing = np.zeros(len(kld))
    return Paired(-np.log(p), nothing, kld, nothing, nothing == 0, p)


def test_shares_of_the_largest_places_and_confidence():
    rng = np.random.default_rng(0)
    klds, p, p_top = rng.exponential(size=(5, 40)), *rng.uniform(0.001, 1, (2, 5, 40))
    p[0, 0], p[1, 1] = 1.0, 0.5
    found = who_pays(klds, -np.log(p), p_top, 41)
    sizes = np.sort(klds.ravel())[::-1]
    assert found["top"] == pytest.approx(
        {
            "0.1%": sizes[0] / sizes.sum(),
            "1%": sizes[:2].sum() / sizes.sum(),
            "10%": sizes[:20].sum() / sizes.sum(),
        }
    )
    assert [(x["from"], x["to"], x["n"]) for x in found["position"]] == [
        (42, 51, 50), (52, 61, 50), (62, 71, 50), (72, 81, 50)
    ]  # fmt: skip
    third = klds[:, 20:30]
    assert found["position"][2]["mean_kld"] == pytest.approx(third.mean())
    low, high = found["position"][2]["mean_kld_ci95_chunks"]
    assert (low, high) == pytest.approx(ratio_test(third.sum(axis=1), np.full(5, 10.0)).interval)
    assert low < third.mean() < high
    for name, of in (("confidence", p_top), ("text", p)):
        sure = klds[(of >= 0.5) & (of < 0.9)]
        assert found[name][3]["n"] == sure.size
        assert found[name][3]["share"] == pytest.approx(sure.sum() / klds.sum())
    for parts in (found["position"], found["confidence"], found["text"]):
        assert sum(x["share"] for x in parts) == pytest.approx(1) and sum(x["n"] for x in parts) == klds.size
    assert not is_carried_by_few(found)
    assert [token["kld"] for token in found["largest"]] == sizes[:10].tolist()
    third_largest = found["largest"][2]
    assert klds[third_largest["chunk"], third_largest["token"] - 42] == third_largest["kld"]
    assert third_largest["share"] == pytest.approx(sizes[2] / sizes.sum())


def test_the_first_tokens_stand_apart_where_they_are_scored():
    klds = np.arange(1.0, 41).reshape(2, 20)
    found = who_pays(klds, klds / 10, np.exp(-klds), 0)
    assert [(x["from"], x["to"]) for x in found["position"]] == [
        (1, 1),
        (2, 4),
        (5, 5),
        (6, 10),
        (11, 15),
        (16, 20),
    ]
    assert found["position"][0]["mean_kld"] == 11 and found["position"][1]["n"] == 6
    assert found["largest"][0] == {"chunk": 1, "token": 20, "kld": 40.0, "share": 40 / 820}
    said = "\n".join(who_pays_text(found))
    assert "token 1 of a chunk" in said and "tokens 2 to 4 of a chunk" in said


def test_a_version_that_did_not_keep_the_top_probability():
    klds = np.ones((4, 8))
    found = who_pays(klds, klds, np.full((4, 8), np.nan))
    assert found["confidence"] is None and "its top token" not in "\n".join(who_pays_text(found))
    assert "the text's token" in "\n".join(who_pays_text(found))


def test_a_mean_that_one_token_carries_is_said_to_be():
    klds = np.full((4, 50), 1e-6)
    klds[2, 7] = 1.0
    found = who_pays(klds, np.full((4, 50), -np.log(0.3)), np.full((4, 50), 0.3))
    assert is_carried_by_few(found) and found["top"]["1%"] > 0.99
    text = "\n".join(who_pays_text(found))
    assert "the mean is carried by few tokens: 1 % of them have half of it or more" in text
    assert found["confidence"][0] == {
        "from": 0.0, "to": 0.01, "n": 0, "mean_kld": None, "mean_kld_ci95_chunks": None, "share": 0.0
    }  # fmt: skip


@pytest.mark.parametrize("kld", [0.0, np.nan, np.inf, -1.0])
def test_nothing_to_pay(kld):
    found = who_pays([np.array([kld, 0.0])], [np.array([0.7, 0.7])], [np.array([0.7, 0.7])])
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
    assert "tokens 13 to 15 of a chunk" in out and "of the KL divergence the top 0.1 % of tokens" in out
    found = json.loads((tmp_path / "a.json").read_text())
    paid = found["comparison"]["who_pays"]
    assert paid["top"]["10%"] > 0.1 and found["scored"] == "second-half"
    largest = paid["largest"][0]
    before, came = found["largest_tokens"][0]
    assert f"{before!r} comes {came!r}" in out and largest["token"] > 12
    assert "who pays" not in fq(*args)[0].lower() and "of a chunk" not in fq(*args)[0]


def test_all_tokens_of_a_chunk_may_be_scored(tiny_path, tmp_path):
    """Those of the second half have the figures that they have by themselves."""
    text = tmp_path / "t.txt"
    text.write_text("Words of a text, and more of them: one, two, three. " * 60)
    args = (
        "perplexity",
        "-m",
        tiny_path,
        "-f",
        text,
        "-c",
        24,
        "--fake-quant-ffn-norm",
        "bf16",
        "--json",
        "-",
    )
    half, all_ = (json.loads(fq(*args, "--scored", scored)[0]) for scored in ("second-half", "all"))
    assert (half["n_scored"], all_["n_scored"]) == (half["n_chunks"] * 11, half["n_chunks"] * 23)
    paid = all_["comparison"]["who_pays"]["position"]
    assert [(part["from"], part["to"]) for part in paid][:2] == [(1, 1), (2, 4)] and paid[-1]["to"] == 23
    late = next(part for part in half["comparison"]["who_pays"]["position"] if part["to"] == 23)
    assert sum(part["n"] for part in paid) == all_["n_scored"] and late["n"] > 0


def test_a_sweep_of_all_tokens_is_a_run_of_its_own(tiny_path, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("Words of a text, and more of them: one, two, three. " * 60)
    store = tmp_path / "s.sqlite"
    args = ("sweep", "-m", tiny_path, "-f", text, "-c", 24, "--chunks", 2, "--store", store, "--json", "-")
    half = json.loads(fq(*args)[0])
    all_ = json.loads(fq(*args, "--resume", "--scored", "all")[0])
    assert (half["run"], all_["run"]) == (1, 2) and (half["n_scored"], all_["n_scored"]) == (22, 46)
    assert json.loads(fq(*args, "--resume", "--scored", "all")[0])["run"] == 2
    kept = json.loads(fq("results", "2", "--store", store, "--json", "-")[0])
    assert kept["cells"] == all_["cells"] and kept["scored"] == "all"
