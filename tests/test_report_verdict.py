"""The report's words say no more than the intervals do."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_store import TIED, TWO_FIRST, WINNER, cells_for, data_for, data_of, layer_of, layers, run_of

from model.report.data import Group, between, kl_text, ranges, significant
from model.report.tables import at_a_glance
from model.report.verdict import additivity_words, layers_text, verdict


def said(data):
    """{what a statement is about: its text}"""
    return {one.about: " ".join(one.lines) for one in verdict(data)}


def test_one_layer_costs_most():
    text = said(data_for(WINNER))
    assert "Layer 2 costs most, which is resolved, in bf16." in text["In short"]
    most = text["Which layers"]
    assert re.search(
        r"Layer 2 costs most, mean KL 1\.05e-05 \(1\.0\de-05 to 1\.0\de-05\), 69 % of the sum over all 4: "
        "its interval lies above every other",
        most,
    )
    assert "The last place is shared by layers 0, 1 and 3." in most
    assert "Of 6 pairs of layers the order of 3 is resolved, that of 3 is not." in most


def test_all_layers_tied():
    text = said(data_for(TIED))
    assert "No layer is told from another: all intervals overlap, in bf16." in text["In short"]
    assert "No layer can be told from another: all 3 intervals overlap." in text["Which layers"]
    assert "which costs most is not resolved" in text["Which layers"]


def test_first_place_shared():
    text = said(data_for(TWO_FIRST))
    assert "The first place is shared by layers 0 and 2, not ordered among themselves" in text["In short"]
    assert "which of them costs most is not resolved" in text["Which layers"]
    assert "The largest figure is that of layer 2, 1.30e-05" in text["Which layers"]
    assert "Layer 3 costs least" in text["Which layers"]
    assert "Of 6 pairs of layers the order of 5 is resolved, that of 1 is not." in text["Which layers"]


def test_every_layer_has_its_place():
    text = said(data_for([(1e-6, 2e-6), (1e-5, 2e-5), (1e-4, 2e-4)]))
    assert "Then comes layer 1. Layer 0 costs least" in text["Which layers"]
    assert "The order of all 3 is resolved." in text["Which layers"]


def test_a_single_cell():
    text = said(data_for([(1e-6, 2e-6)]))
    assert "One site was measured, layer 0, in bf16." in text["In short"]
    assert "There is nothing to order." in text["Which layers"]
    assert "Perplexity goes from" in text["Which layers"]


def test_one_chunk_orders_nothing():
    text = said(data_for([(1e-6, 1e-6), (1e-3, 1e-3)], chunks=1, specs=("bf16", "int8")))
    assert "Without intervals no layer is told from another" in text["In short"]
    assert "from bf16 it is not told apart" in text["In short"] or "from int8 it is not" in text["In short"]
    assert "without intervals no order is resolved" in text["Which format at ffn_norm[*].raw"]
    assert "One chunk of 16 tokens, 7 of them scored: there are no intervals" in text["How sure"]
    assert "costs most" not in " ".join(text.values()).replace("which costs most", "")
    assert text["Which layers: ffn_norm[*].raw=bf16"].count("without an interval") == 1


def test_few_chunks_are_said_to_be_few():
    assert "Fewer than eight chunks" in said(data_for(WINNER, chunks=4))["How sure"]
    assert "Fewer than eight chunks" not in said(data_for(WINNER))["How sure"]


def test_partial():
    first = verdict(data_for(WINNER, done=3))[0]
    assert (first.about, first.tone) == ("Partial result", "warning")
    assert first.lines[0].startswith("3 of 8 chunks have ended in every cell")
    (only,) = verdict(data_for(WINNER, done=0))
    assert only.lines[0].startswith("No chunk of 8 has ended in every cell yet, so there are no figures.")


def test_the_control():
    data = data_for(WINNER)
    assert "exactly 0 in every figure" in said(data)["Control"]
    assert "The control is exactly 0." in said(data)["In short"]
    data["cells"][0]["exactly_zero"] = False
    first = verdict(data)[0]
    assert (first.about, first.tone) == ("Control", "bad")
    assert "NOT come out as 0: no figure of this run can be trusted" in first.lines[0]
    assert "exactly 0" not in said(data)["In short"]
    del data["cells"][0]
    assert "no control" in said(data)["Control"]


def test_formats_in_order():
    run = run_of(cells_for(layers(2), ("bf16", "int8", "f16")), [("ffn_norm", 0), ("ffn_norm", 1)], 8)
    scale = {"bf16": 1e-5, "int8": 1e-3, "f16": 1.01e-5}
    data = data_of(run, lambda cell: scale[cell.name.partition("=")[2]] * np.linspace(1, 1.2, 8))
    text = said(data)
    assert "int8 costs most, 99 times as much as f16, which comes next: resolved." in text["In short"]
    order = text["Which format at ffn_norm[*].raw"]
    assert "int8 1.10e-03 (" in order and "int8 costs most" in order and "that is resolved" in order
    assert "Not ordered, as their intervals overlap: f16 and bf16." in order


def test_in_short_is_as_sure_as_the_order():
    """The third has a wide interval, which holds the first's; a cost of 0 leaves no ratio."""
    run = run_of(cells_for(layers(2), ("int8", "f16", "bf16")), [("ffn_norm", 0), ("ffn_norm", 1)], 8)
    ends = {"int8": (9, 11), "f16": (7.9, 8.1), "bf16": (1.5, 13.5)}
    means = {spec: np.linspace(*both, 8) for spec, both in ends.items()}
    text = said(data_of(run, lambda cell: 1e-4 * means[cell.name.partition("=")[2]]))
    assert "int8 has the largest mean KL divergence, but from bf16 it is not told apart." in text["In short"]
    assert "Which one costs most is not resolved" in text["Which format at ffn_norm[*].raw"]
    means["f16"] = means["bf16"] = np.zeros(8)
    text = said(data_of(run, lambda cell: 1e-4 * means[cell.name.partition("=")[2]]))
    assert "int8 costs most: resolved." in text["In short"]


def test_sites_in_order():
    sites = {f"{kind}[*].raw": [f"{kind}[{i}].raw" for i in range(2)] for kind in ("attn_norm", "ffn_norm")}
    run = run_of(
        cells_for(sites, ("bf16",)), [(k, i) for i in range(2) for k in ("attn_norm", "ffn_norm")], 8
    )
    data = data_of(run, lambda cell: (1e-5 if "attn" in cell.name else 1e-6) * np.linspace(1, 1.2, 8))
    assert "attn_norm[*].raw costs most, 10 times as much as" in said(data)["Which sites in bf16"]


@pytest.mark.parametrize(
    "ratio, words",
    [(0.5, "cost less than"), (0.96, "add up"), (1.04, "add up"), (2.0, "cost more than")],
)
def test_additivity(ratio, words):
    single = np.array((1e-6, 1.1e-6))
    data = data_for([tuple(single)] * 4, together=tuple(4 * ratio * single))
    interval = f"({ratio:.3f} to {ratio:.3f})"  # both chunks have the same ratio
    assert f"{ratio:.3f} {interval} times the sum of the single ones" in said(data)["Which layers"]
    assert words in said(data)["Which layers"] and words in at_a_glance(data).rows[0][-1]


@pytest.mark.parametrize(
    "ratio, interval, words",
    [
        (1.2, (0.99, 1.5), "no departure"),
        (0.98, (0.9, 1.01), "no departure"),
        (0.98, (0.96, 0.99), "add up, to within 5 %"),
        (0.93, (0.9, 0.97), "cost less than"),
        (1.06, (1.03, 1.09), "cost more than"),
        (1.2, None, "no departure"),
    ],
)
def test_additivity_is_as_sure_as_its_interval(ratio, interval, words):
    assert words in additivity_words(Group("g", additivity=ratio, additivity_interval=interval))


def test_perplexity_is_resolved_or_not():
    assert (
        "No change of the perplexity is resolved." in said(data_for(TIED, together=(1e-4, 2e-4)))["In short"]
    )
    moved = data_for(TIED, together=(1e-4, 2e-4), drift=0.5)
    assert "A change of the perplexity is resolved for ffn_norm[*].raw=bf16." in said(moved)["In short"]
    assert "the interval leaves 0 out" in said(moved)["Which layers"]


def test_noise_beside_its_format():
    specs = ("bf16", "noise_bf16")
    run = run_of(cells_for(layers(4), specs), [("ffn_norm", i) for i in range(4)], 8)

    def means(cell):
        factor = (
            {0: 0.1, 1: 1.0, 2: 10.0, 3: 10.0, None: 4.0}[layer_of(cell)] if "noise" in cell.name else 1.0
        )
        return 1e-6 * factor * np.linspace(1, 1.2, 8)

    text = said(data_of(run, means))
    assert (
        "costs 5.28 times as much, summed over single sites. Rounding costs more than its noise at 1 of 4 "
        "sites and less at 2; at 1 that is not resolved."
    ) in text["Which layers"]
    assert not any("noise_" in about for about in text)


intervals_of_layers = st.lists(
    st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)).map(sorted).map(tuple), min_size=2, max_size=12
)


@given(intervals_of_layers)
def test_no_layer_is_put_above_one_that_overlaps_it(intervals):
    entries = [
        {
            "name": f"ffn_norm[{i}].raw=bf16",
            "sites": [{"kind": "ffn_norm", "layer": i, "point": "raw"}],
            "comparison": {"mean_kld": sum(interval) / 2, "mean_kld_ci95_chunks": interval},
        }
        for i, interval in enumerate(intervals)
    ]
    text = layers_text(Group("ffn_norm[*].raw=bf16", entries, sum_of_singles=1.0))
    others = [intervals[:i] + intervals[i + 1 :] for i in range(len(intervals))]
    above = [str(i) for i, x in enumerate(intervals) if all(x[0] > other[1] for other in others[i])]
    below = [str(i) for i, x in enumerate(intervals) if all(x[1] < other[0] for other in others[i])]
    assert re.findall(r"Layer (\d+) costs most", text) == above
    assert re.findall(r"Layer (\d+) costs least", text) == below
    pairs = list(combinations(intervals, 2))
    ordered = sum(a[1] < b[0] or b[1] < a[0] for a, b in pairs)
    if 0 < ordered < len(pairs):
        counted = rf"Of {len(pairs)} pairs of layers the order of {ordered} is resolved"
        assert counted in text
    else:
        assert ("No layer can be told from another" in text) == (ordered == 0)
        assert (f"The order of all {len(intervals)} is resolved" in text) == (ordered == len(pairs))


# ---------------------------------------------------------------- figures as text


@pytest.mark.parametrize(
    "value, text",
    [(9.66e-3, "9.66e-03"), (-2e-7, "−2.00e-07"), (0.0, "0"), (2.5, "2.50"), (None, "–"), (np.inf, "∞")],
)
def test_kl_text(value, text):
    assert kl_text(value) == text


def test_figures_as_text():
    assert significant(24.49742, 6) == "24.4974" and significant(0.0412) == "0.0412"
    assert significant(9.999) == "10.0" and significant(-np.inf) == "−∞"
    assert between(None) == "no interval" and between((1e-6, 2e-6)) == "1.00e-06 to 2.00e-06"
    assert ranges([9, 0, 1, 2, 6, 8]) == "0–2, 6, 8 and 9"
    assert ranges([4]) == "4" and ranges([5, 4]) == "4 and 5"
