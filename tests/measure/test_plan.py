"""Plans: the solver's choices against all that there are, the rules that they make, what they cost."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re

import numpy as np
import pytest

from fq import FqError
from fq.measure.estimates import Asked, Gains, Judged, ModelError, estimated
from fq.measure.inference import t_quantile
from fq.measure.plan import (
    Choice,
    Option,
    check_costs,
    choices_of,
    elements_of,
    front,
    least_sure,
    plan_of,
    planned_sites,
    read_costs,
    solve,
    uniform_plans,
)
from fq.measure.sensitivity import COLUMNS
from fq_kernels.rules import Place, Site, Value

FORMATS = ("bf16", "fp8_e4m3fn", "mxfp4")
SITES = tuple(f"l_out[{i}]" for i in range(5))
ELEMENTS = dict(zip(SITES, (64, 64, 64, 128, 32), strict=True))


def judged_of(klds, n_chunks=8, error=None, marks=None, scatter=0.0, sites=SITES, largest=0.0):
    """klds (sites, formats), the same in all chunks but for a scatter; largest: the share of one block, which
    spreads over them."""
    klds = np.asarray(klds, np.float64)
    asked = Asked(sites[: len(klds)], FORMATS, (None,) * len(klds), 4, 0, COLUMNS)
    left = np.zeros((n_chunks, *klds.shape, len(COLUMNS)))
    way = np.where(np.arange(n_chunks) % 2, 1 + scatter, 1 - scatter)
    left[..., COLUMNS.index("blocks")] = klds * way[:, None, None]
    left[..., COLUMNS.index("largest")] = largest
    found = estimated(asked, list(left), Gains(asked.classes, {}))
    marks = np.full(klds.shape, "", object) if marks is None else np.array(marks, object)
    return asked, Judged(found, marks, [], error)


@pytest.fixture
def klds():
    rng = np.random.default_rng(5)
    return 10.0 ** rng.uniform([-7, -5, -3.5], [-6, -3.5, -2], (5, 3))


def every(choices):
    elements = sum(choice.elements for choice in choices)
    for picked in itertools.product(*(choice.options for choice in choices)):
        yield sum(o.cost for o in picked) / elements, math.fsum(o.kld for o in picked)


@pytest.mark.parametrize("budget", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0])
def test_the_cheapest_within_a_kl(klds, budget):
    asked, said = judged_of(klds)
    choices = choices_of(asked, said, SITES, ELEMENTS)
    plan = solve(choices, said, kld=budget)
    assert plan.kld <= budget * (1 + 1e-6)
    assert plan.cost == pytest.approx(min(cost for cost, kld in every(choices) if kld <= budget), rel=2e-4)


@pytest.mark.parametrize("bits", [4.25, 5.0, 8.0, 12.5, 32.0])
def test_the_least_kl_within_a_cost(klds, bits):
    asked, said = judged_of(klds)
    choices = choices_of(asked, said, SITES, ELEMENTS)
    plan = solve(choices, said, cost=bits)
    assert plan.cost <= bits * (1 + 1e-6)
    best = min(kld for cost, kld in every(choices) if cost <= bits * (1 + 1e-9))
    assert plan.kld == pytest.approx(best, rel=2e-3, abs=1e-12)


def test_a_budget_that_is_just_enough(klds):
    """Of costs whose sum is rounded; and one of no KL at all, which a solver's tolerance would not keep."""
    asked, said = judged_of(klds)
    for cost in (0.1, 0.2, 0.4, 1.6, 2.7, 3.7, 5.4):
        choices = choices_of(asked, said, SITES, ELEMENTS, {"none": cost})
        assert solve(choices, said, cost=cost).cost == pytest.approx(cost)
    asked, said = judged_of(klds * 1e-6)
    assert solve(choices_of(asked, said, SITES, ELEMENTS), said, kld=0.0).kld == 0


def test_what_is_left_where_all_is_marked(klds):
    asked, said = judged_of(klds, marks=[["large"] * 3] + [[""] * 3] * 4)
    choices = choices_of(asked, said, SITES, ELEMENTS)
    with pytest.raises(FqError, match=r"the least is .*; 1 sites have one choice, such as l_out\[0\]"):
        solve(choices, said, cost=5.0)


def test_costs_of_what_there_is_not(klds):
    asked, _ = judged_of(klds)
    check_costs({"bf16": 1.0, "l_out[1]=mxfp4": 2.0, "none": 3.0, "l_out[0]=none": 1.0}, ELEMENTS, asked)
    for item, words in (
        ("l_out=bf16", "there is no site l_out;"),
        ("nosuch[7]=bf16", "there is no site nosuch"),
        ("int8:group=32", "the estimate has no int8:group=32; it has bf16"),
        ("l_out[1]=int8", "the estimate has no int8"),
    ):
        with pytest.raises(FqError, match=f"--costs: .*: {re.escape(words)}"):
            check_costs({item: 1.0}, ELEMENTS, asked)


def test_what_the_solver_prints_is_not_seen(klds, capfd, monkeypatch):
    import scipy.optimize

    solver = scipy.optimize.milp

    def loud(*args, **options):
        os.write(1, b"lines of its own")
        return solver(*args, **options)

    monkeypatch.setattr("scipy.optimize.milp", loud)
    asked, said = judged_of(klds)
    solve(choices_of(asked, said, SITES, ELEMENTS), said, kld=1e-4)
    print("ours", flush=True)
    assert capfd.readouterr().out == "ours\n"


def test_budgets_that_none_keeps(klds):
    asked, said = judged_of(klds)
    choices = choices_of(asked, said, SITES, ELEMENTS)
    with pytest.raises(FqError, match="no choice of formats has a cost of at most 4"):
        solve(choices, said, cost=4.0)
    only = choices_of(asked, said, SITES, ELEMENTS, {"none": 1.0})
    assert solve(only, said, kld=0.0).rules == []
    bound = [Choice("l_out[0]", 0, 4, (Option("bf16", 16.0, 1e-3, 0),))]
    with pytest.raises(FqError, match="no choice of formats has a mean KL of at most"):
        solve(bound, said, kld=1e-4)


def test_what_is_worse_in_both_is_no_option(klds):
    klds[0, 1] = 2 * klds[0, 2]  # fp8 at l_out[0]: dearer than mxfp4, and worse
    asked, said = judged_of(klds)
    choice = choices_of(asked, said, SITES, ELEMENTS)[0]
    assert [option.spec for option in choice.options] == ["mxfp4", "bf16", None]
    assert [option.cost for option in choice.options] == [4.25 * 64, 16 * 64, 32 * 64]


def test_a_marked_cell_is_no_option(klds):
    marks = [["", "", "large"]] + [[""] * 3] * 4
    asked, said = judged_of(klds, marks=marks)
    assert [o.spec for o in choices_of(asked, said, SITES, ELEMENTS)[0].options] == [
        "fp8_e4m3fn",
        "bf16",
        None,
    ]


def test_sites_that_are_not_asked_for_are_left_out(klds):
    asked, said = judged_of(klds)
    assert [c.site for c in choices_of(asked, said, ["l_out[3]", "k[0]"], ELEMENTS)] == ["l_out[3]"]
    with pytest.raises(FqError, match="none of the sites"):
        choices_of(asked, said, ["k[0]"], ELEMENTS)


def test_rules_join_layers(klds):
    asked, said = judged_of(klds)
    choices = choices_of(asked, said, SITES, ELEMENTS)
    of = [{o.spec: o for o in choice.options} for choice in choices]
    specs = ["mxfp4", "mxfp4", "bf16", None, "mxfp4"]
    plan = plan_of(choices, [one[spec] for one, spec in zip(of, specs, strict=True)], said)
    assert plan.rules == ["l_out[0-1,4]=mxfp4", "l_out[2]=bf16"]
    norm = Choice("output_norm.weighted", 0, 64, (Option("bf16", 1.0, 0.1, 0),))
    assert plan_of([norm], norm.options, said).rules == ["output_norm.weighted=bf16"]
    layers = Choice("ffn_norm[3].raw", 0, 64, (Option("bf16", 1.0, 0.1, 0),))
    assert plan_of([layers], layers.options, said).rules == ["ffn_norm[3].raw=bf16"]


def test_cells_that_were_measured_are_what_they_are(klds):
    """Whatever the estimate says, and whether it is marked."""
    marks = np.full((5, 3), "", object)
    marks[3, 2] = "large"
    asked, said = judged_of(klds, error=ModelError(0.0, 0.5, 9, 9.0), marks=marks)
    exact = {(i, 2): np.linspace(1e-6, 3e-6, 8) for i in (1, 3)}
    said = dataclasses.replace(said, exact=exact)
    choices = choices_of(asked, said, SITES, ELEMENTS)
    plan = solve(choices, said, kld=1e-5 + float(klds[:, 0].sum()))
    picked = {choice.site: option for choice, option in zip(plan.choices, plan.picked, strict=True)}
    for i in (1, 3):
        assert picked[SITES[i]].spec == "mxfp4" and picked[SITES[i]].kld == pytest.approx(2e-6)
    assert sum(option.kld for option in plan.picked) == pytest.approx(plan.kld)
    (mxfp4,) = (p for p in uniform_plans(choices, said, asked, None) if p.picked[0].spec == "mxfp4")
    assert mxfp4.kld == pytest.approx(klds[[0, 2, 4], 2].sum() + 4e-6)


def test_cells_that_were_measured_have_no_error_of_the_estimate():
    asked, said = judged_of(np.full((4, 3), 1e-4), error=ModelError(0.1, 0.5, 16, 400.0), largest=0.2)
    way = 1e-4 * np.tile([0.9, 1.1], 4)
    half = dataclasses.replace(said, exact={(i, 2): way for i in (0, 1)})
    every = dataclasses.replace(said, exact={(i, 2): way for i in range(4)}, errors=None)
    choices = choices_of(asked, half, SITES[:4], ELEMENTS)
    low, high = np.log(np.array(solve(choices, half, kld=1.0).interval) / 4e-4)
    of_chunks = t_quantile(0.05, 7) * 0.05 * math.sqrt(8 / 7) / math.sqrt(8)
    of_model = t_quantile(0.05, 15) * 0.5 * math.sqrt(0.25 / 400 + 0.04 * 2 / 16)
    assert (high - low) / 2 == pytest.approx(math.hypot(of_chunks, of_model))
    assert (high + low) / 2 == pytest.approx(0.5 * 0.1)
    low, high = np.log(np.array(solve(choices, every, kld=1.0).interval) / 4e-4)
    assert (high, low) == (pytest.approx(2 * of_chunks), pytest.approx(-2 * of_chunks))


def test_what_a_plan_hangs_on_most():
    """By what it adds to the interval, not by what it costs alone."""
    sites = "k[0]", "k[1]", "l_out[0]", "l_out[1]"
    klds = np.repeat([[1e-4], [2e-4], [5e-4], [9e-4]], 3, axis=1)
    error, largest = ModelError(0.0, 1.0, 16, 400.0), np.array([[0.4], [0.4], [0.04], [0.04]])
    asked, said = judged_of(klds, error=error, sites=sites, largest=largest)
    plan = solve(choices_of(asked, said, sites, dict.fromkeys(sites, 8)), said, kld=1.0)
    assert [site for site, _ in least_sure(plan, said, 9)] == ["k[1]", "k[0]", "l_out[1]", "l_out[0]"]
    said = dataclasses.replace(said, exact={(1, 2): np.full(8, 2e-4)})
    assert least_sure(plan, said, 2) == [("k[0]", "mxfp4"), ("l_out[1]", "mxfp4")]
    # or by one chunk that has all of it
    said.found.by_chunk[:, 2, 2] = np.array([5e-4 * 8] + [0] * 7)
    assert least_sure(plan, said, 2) == [("l_out[0]", "mxfp4"), ("k[0]", "mxfp4")]
    few = judged_of(klds, 3, error=error, sites=sites, largest=largest)[1]
    assert least_sure(plan, few, 2) == []


def test_a_plans_interval():
    """Chunks scatter together; a cell's own error, by its spread, averages out, what is common to all does
    not."""
    error, largest = ModelError(0.05, 0.7, 16, 250.0), np.array([[0.1], [0.2], [0.3], [0.4]])
    asked, said = judged_of(np.full((4, 3), 1e-4), error=error, scatter=0.1, largest=largest)
    choices = choices_of(asked, said, SITES[:4], ELEMENTS)
    plan = solve(choices, said, kld=1.0)
    assert plan.kld == pytest.approx(4e-4)
    low, high = np.log(np.array(plan.interval) / plan.kld)
    se = 0.1 * math.sqrt(8 / 7) / math.sqrt(8)
    spreads = largest**2 + se**2
    of_model = t_quantile(0.05, 15) * 0.7 * math.sqrt(1 / 250 + spreads.sum() / 16)
    assert (high - low) / 2 == pytest.approx(math.hypot(t_quantile(0.05, 7) * se, of_model))
    assert (high + low) / 2 == pytest.approx(0.05)
    for few in (judged_of(np.full((4, 3), 1e-4)), judged_of(np.full((4, 3), 1e-4), 3, error)):
        assert solve(choices, few[1], kld=1.0).interval is None


def test_uniform_formats_and_the_front(klds):
    klds[2, 0] = np.nan  # bf16 does not fit there
    asked, said = judged_of(klds)
    choices = choices_of(asked, said, SITES, ELEMENTS)
    plans = uniform_plans(choices, said, asked, None)
    assert [(one.picked[0].spec, one.cost) for one in plans] == [("mxfp4", 4.25), ("fp8_e4m3fn", 8.0)]
    assert plans[0].kld == pytest.approx(klds[:, 2].sum())
    found = front(choices, said)
    assert found[0].cost <= 4.25 * (1 + 1e-6) and found[-1].kld == 0
    assert all(a.cost < b.cost and a.kld > b.kld for a, b in itertools.pairwise(found))
    # with a choice at each site no plan is worse than a uniform format of its cost
    assert solve(choices, said, cost=8.0).kld <= plans[1].kld


def test_planned_sites(tiny):
    sites = planned_sites(tiny.values, "weighted")
    assert Site(Place("ffn_norm", 0), "weighted") in sites and Site(Place("ffn_norm", 0), "raw") not in sites
    assert Site(Place("v", 0)) in sites and Site(Place("v_proj", 0)) not in sites, "it is the same numbers"
    assert len(planned_sites(tiny.values, "all")) == len(sites) + 2 * 5
    with pytest.raises(FqError, match="the point must be in, raw, weighted or all, not 'out'"):
        planned_sites(tiny.values, "out")
    assert planned_sites([Value(Place("l_out", 0))], "raw") == [Site(Place("l_out", 0))]
    elements = elements_of(tiny.graph)
    assert (
        elements["l_out[0]"] == 64 and elements["k[1]"] == tiny.hparams.n_head_kv * tiny.hparams.n_embd_head
    )


def test_costs(tmp_path, klds):
    path = tmp_path / "costs.csv"
    path.write_text("item,cost\nbf16,2\nfp8_e4m3,1\nl_out[1]=fp8_e4m3fn,0.5\nint8:group=32,3\nnone,9\n")
    costs = read_costs(path)
    assert costs == {"bf16": 2, "fp8_e4m3fn": 1, "l_out[1]=fp8_e4m3fn": 0.5, "int8:group=32": 3, "none": 9}
    asked, said = judged_of(klds)
    first, second, *_ = choices_of(asked, said, SITES, ELEMENTS, costs)
    assert [(o.spec, o.cost) for o in first.options] == [("fp8_e4m3fn", 64), ("bf16", 128), (None, 576)]
    assert second.options[0].cost == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the first line must be item,cost"),
        ("format,cost\n", "the first line must be item,cost"),
        ("item,cost\nbf17,1\n", "line 2: unknown format 'bf17'"),
        ("item,cost\nbf16,one\n", "line 2: a cost is a number from 0, not 'one'"),
        ("item,cost\nbf16,-1\n", "line 2: a cost is a number from 0, not '-1'"),
        ("item,cost\nbf16,nan\n", "line 2: a cost is a number from 0, not 'nan'"),
        ("item,cost\nbf16\n", "line 2: must be an item and its cost"),
        ("item,cost\nbf16,1\nbf16:nearest-even,1\n", "line 3: bf16 is there twice"),
    ],
)
def test_bad_costs(tmp_path, text, words):
    path = tmp_path / "costs.csv"
    path.write_text(text)
    with pytest.raises(FqError, match=words):
        read_costs(path)
    path.write_bytes(b"item,cost\n\xff,1\n")
    with pytest.raises(FqError, match="is no CSV file in UTF-8"):
        read_costs(path)
