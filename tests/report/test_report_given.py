"""What fq plan and fq ranges wrote, on the page of a run."""

from __future__ import annotations

import copy
import csv
import io
import json
from urllib.parse import unquote

import numpy as np
import pytest
from html_page import Page, references

from fq.errors import FqError
from fq.report import ranges
from fq.report.given import read_plan, read_ranges
from fq.report.pages import Part, in_order, pngs_of, sections_of
from fq.report.plan_charts import plan_part
from fq.report.sensitivity import _scale

HOSTILE = "<script>alert(1)</script>=\"'"


def _plan(cost, kld, **more):
    return {"cost": cost, "mean_kld": kld, "mean_kld_ci95": [0.9 * kld, 1.2 * kld], "rules": []} | more


SITES = [
    {"site": "inp_embd", "format": None, "cost": 32.0, "mean_kld": 0.0},
    {"site": "ffn_norm[0].weighted", "format": "int8", "cost": 8.0, "mean_kld": 1.5e-4},
    {"site": "ffn_norm[1].weighted", "format": "mxfp4", "cost": 4.25, "mean_kld": 2e-3},
    {"site": "v[1]", "format": "int8", "cost": 8.0, "mean_kld": 3e-5},
]
MEASURED = {
    "name": "plan",
    "predicted": 2.2e-3,
    "predicted_ci95": [2e-3, 2.5e-3],
    "mean_kld": 2.3e-3,
    "mean_kld_ci95_chunks": [2.1e-3, 2.6e-3],
    "cost": 9.5,
}
PLAN = {
    "run": 1,
    "command": "fq plan 1 --budget-bits 10",
    "budget": {"kl": None, "bits": 10.0},
    "plan": _plan(9.5, 2.2e-3, sites=SITES),
    "front": [_plan(9.5, 2.2e-3), _plan(16.0, 1e-6), _plan(32.0, 0.0)],
    "uniform": [_plan(4.25, 0.1, format="mxfp4"), _plan(8.0, 1e-2, format="int8")],
    "binds": "the budget: 95 % of it is used",
    "validated": {
        "text": "/some/where/b.txt",
        "n_chunks": 8,
        "cells": [MEASURED, MEASURED | {"name": "uniform int8", "mean_kld": 1.1e-2, "cost": 10.0}],
        "uniform_over_plan": {"ratio": 4.8, "ci95": [4.0, 5.5], "p": 1e-4},
    },
}


def _values(largest):
    return {
        "rows": 4,
        "values": 64,
        "zeros": 0,
        "largest": largest,
        "percentiles": {"50": 0.5, "99.9": 0.9 * largest},
        "exponents": {"-2": 20, "0": 44},
    }


def _site(layer, largest):
    outlier = {"channel": 3, "tokens": 2, "times_median": 30.0, "largest": largest}
    squares = {"smallest": 1.0, "largest": 9.0}
    return {
        "site": f"ffn_norm[{layer}].in",
        "kind": "ffn_norm",
        "layer": layer,
        "point": "in",
        "rest": _values(largest),
        "first": _values(2 * largest),
        "channels": {"n": 16, "n_outliers": 1, "outliers": [outlier]},
        "sum_of_squares": {"rest": squares, "first": squares},
    }


RANGES = {
    "model": "/some/where/m.gguf",
    "text": "b.txt",
    "n_ctx": 32,
    "n_chunks": 2,
    "outlier_times_median": 20.0,
    "sites": [_site(0, 3.5), _site(1, 7.25)],
}


def drawn(part):
    return {each["chart"].key: each for s in sections_of([part], "x") for each in s["charts"]}


def rows_of(figure):
    return list(csv.DictReader(io.StringIO(unquote(figure["csv_url"].partition(",")[2]))))


def with_rest(changes):
    """RANGES whose first site says something else."""
    site = _site(0, 1.0)
    return json.dumps(RANGES | {"sites": [site | {"rest": site["rest"] | changes}]})


def test_a_kind_with_control_characters(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RANGES | {"sites": [_site(i, 1.0) | {"kind": "a\x01b"} for i in range(2)]}))
    figures = drawn(ranges.part_of(read_ranges(str(path), "m.gguf")))
    assert all("\x01" not in str(each["svg"]) for each in figures.values()) and len(figures) == 4


def test_a_plan_with_control_characters():
    plan = copy.deepcopy(PLAN)
    plan["plan"]["sites"][0]["site"] = "a\x01b[0]"
    figures = drawn(plan_part(plan))
    assert all("\x01" not in str(each["svg"]) for each in figures.values()) and "plan-map" in figures


def test_the_plan_as_a_map():
    """The numbers of each site, and a letter for each format, the cheapest first."""
    figure = drawn(plan_part(PLAN))["plan-map"]
    found = [(row["site"], row["format"], float(row["cost_of_a_value"]), float(row["mean_kld"]))
             for row in rows_of(figure)]  # fmt: skip
    assert found == [(s["site"], s["format"] or "no rounding", s["cost"], s["mean_kld"]) for s in SITES]
    page = Page(str(figure["svg"]))
    words = [data for tag, data in page.texts if tag == "text"]
    assert [word for word in words if word in "ABC"] == ["C", "B", "A", "B"]
    assert {"A mxfp4, 4.25", "B int8, 8", "C no rounding, 32"} <= set(words)
    assert "int8 at 2, mxfp4 at 1, no rounding at 1" in page.text("desc")
    assert "ffn_norm[1].weighted: mxfp4, mean KL 2.00e-03" in page.text("title")


def test_what_any_budget_buys():
    rows = rows_of(drawn(plan_part(PLAN))["plan-front"])
    plans = [*PLAN["front"], *PLAN["uniform"], PLAN["plan"], *PLAN["validated"]["cells"]]
    assert [float(row["mean_kld"]) for row in rows] == [one["mean_kld"] for one in plans]
    assert [row["name"] for row in rows if row["what"].startswith("a uniform")] == ["mxfp4", "int8"]
    ends = [(float(row["ci95_low"]), float(row["ci95_high"])) for row in rows if "held-out" in row["what"]]
    assert ends == [(2.1e-3, 2.6e-3)] * 2


def test_what_is_said_of_a_plan():
    said = " ".join(plan_part(PLAN).lines["plan"])
    assert "predicted mean KL divergence 2.20e-03 (1.98e-03 to 2.64e-03)" in said
    assert "Measured on b.txt, held out, 8 chunks: plan predicted" in said and "/some/where" not in said
    assert "measured 2.30e-03 (2.10e-03 to 2.60e-03)" in said and "costs 4.8 (4 to 5.5) times" in said
    assert "It was not measured" in " ".join(plan_part(PLAN | {"validated": None}).lines["plan"])
    bare = copy.deepcopy(PLAN) | {"validated": None}
    bare["plan"]["mean_kld_ci95"] = None
    assert "(no interval)" in plan_part(bare).lines["plan"][0] and drawn(plan_part(bare))


def test_names_in_a_plan_stay_text():
    plan = copy.deepcopy(PLAN)
    plan["plan"]["sites"][1]["format"] = plan["validated"]["cells"][0]["name"] = HOSTILE
    for figure in drawn(plan_part(plan)).values():
        assert "script" not in {tag for tag, _ in Page(str(figure["svg"])).elements}
        assert "%3Cscript" not in unquote(figure["svg_url"]) and HOSTILE in str(rows_of(figure)).replace(
            "\\", ""
        )
        assert all(target.startswith("#") for _, target in references(str(figure["svg"])))


def test_ranges_on_a_page(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RANGES))
    part = ranges.part_of(read_ranges(str(path), "/other/m.gguf"))
    figures = drawn(part)
    assert list(figures) == ["exponents-1", "magnitudes-1", "outliers-1", "squares-1"]
    assert next(s["title"] for s in sections_of([part], "x")) == "Ranges: exponents"
    assert [float(row["largest"]) for row in rows_of(figures["magnitudes-1"])] == [3.5, 7.25]
    shares = {(row["site"], row["exponent"]): float(row["share"]) for row in rows_of(figures["exponents-1"])}
    assert shares["ffn_norm[1].in", "-2"] == 20 / 64 and len(shares) == 4
    assert sorted(pngs_of([part])) == sorted(f"{key}.png" for key in figures)


def test_few_small_cells_do_not_take_the_colours():
    """Of an estimate's heat maps: a format that costs next to nothing shares the darkest."""
    costs = [1e-16, *np.geomspace(1e-6, 1, 99)]
    low, high = _scale(costs)
    assert 1e-6 < low < 1e-5 and high == 1


def test_a_plan_leads_and_ranges_follow():
    own = Part(lambda ink: [], {})
    plan, found = plan_part(PLAN), ranges.part_of(RANGES)
    assert in_order(own, [found, plan]) == [plan, own, found]


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is not what fq plan --json writes"),
        (json.dumps(RANGES), "is not what fq plan --json writes"),
        (json.dumps(PLAN | {"run": 7}), "it is of run 7, not of 1"),
        (json.dumps(PLAN | {"plan": {"sites": []}}), "some of its figures are not there"),
        (json.dumps(PLAN | {"front": [{"cost": "8"}]}), "some of its figures are not there"),
        (json.dumps(PLAN | {"binds": 5}), "some of its figures are not there"),
    ],
)
def test_no_plan(tmp_path, text, said):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(FqError) as error:
        read_plan(str(path), 1)
    assert str(error.value).startswith(f"--plan {path}: ") and said in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        (json.dumps(PLAN), "is not what fq ranges --json writes"),
        (json.dumps(RANGES | {"model": "other.gguf"}), "it is of other.gguf, not of m.gguf"),
        (json.dumps(RANGES | {"sites": [{"rest": {}}]}), "some of its figures are not there"),
        (json.dumps(RANGES | {"sites": []}), "some of its figures are not there"),
        (json.dumps(RANGES | {"text": 5}), "some of its figures are not there"),
        (with_rest({"values": 0}), "some of its figures are not there"),
        (with_rest({"exponents": {"3000000000": 1}}), "some of its figures are not there"),
        (with_rest({"values": "64"}), "some of its figures are not there"),
        (
            json.dumps(RANGES | {"sites": [_site(0, 1.0) | {"channels": 3}]}),
            "some of its figures are not there",
        ),
        (
            json.dumps(RANGES | {"sites": [_site(0, 1.0) | {"layer": "0"}]}),
            "some of its figures are not there",
        ),
    ],
)
def test_no_ranges(tmp_path, text, said):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(FqError) as error:
        read_ranges(str(path), "m.gguf")
    assert str(error.value).startswith(f"--ranges {path}: ") and said in str(error.value)
