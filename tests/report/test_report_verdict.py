"""The report's words say no more than its intervals and paired tests do."""

from __future__ import annotations

import json
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_store import (
    TIED,
    TWO_FIRST,
    WINNER,
    cells_for,
    data_for,
    data_of,
    finished_of,
    layer_of,
    layers,
    run_of,
)

from fq.measure.figures import figures
from fq.measure.inference import ratio_test, t_p
from fq.report.data import Group, between, groups_of, kl_text, ranges, same_top_text, significant
from fq.report.layers import additivity_words, layers_text
from fq.report.noise import noise_text
from fq.report.page import report_html
from fq.report.tables import at_a_glance, cell_tables
from fq.report.verdict import verdict
from fq.results.compare import Side, compare_cells


def said(data):
    """{what a statement is about: its text}"""
    return {one.about: " ".join(one.lines) for one in verdict(data)}


# ---------------------------------------------------------------- layers


def test_one_layer_costs_most():
    text = said(data_for(WINNER))
    assert "Layer 2 costs most, which is resolved, in bf16." in text["In short"]
    most = text["Which layers"]
    assert re.search(
        r"Layer 2 costs most, mean KL 1\.05e-05 \(1\.0\de-05 to 1\.0\de-05\), 69 % of the sum over all 4: "
        "that is resolved",
        most,
    )
    assert "The last place is shared by layers 0, 1 and 3." in most
    assert "Of 6 pairs of layers the order of 3 is resolved, that of 3 is not;" in most


def test_all_layers_tied():
    text = said(data_for(TIED))
    assert "No layer is told from another: no order is resolved, in bf16." in text["In short"]
    assert (
        "No layer can be told from another: of 3 pairs the order of none is resolved." in text["Which layers"]
    )
    assert "which costs most is not resolved" in text["Which layers"]


def test_overlapping_intervals_are_ordered_where_the_pairs_are():
    """What makes a chunk hard is common to all layers: their intervals overlap, their ratio is certain."""
    data = data_for(TIED, in_step=True)
    lows, highs = zip(*(e["comparison"]["mean_kld_ci95_chunks"] for e in data["cells"][1:4]), strict=True)
    assert max(lows) < min(highs)
    text = said(data)
    assert "Layer 1 costs most, which is resolved" in text["In short"]
    assert "The order of all 3 is resolved." in text["Which layers"]


def test_intervals_that_do_not_overlap_are_not_ordered_among_many():
    """Each pair alone would be: of 66 pairs one in twenty is by chance."""
    spans = [(1e-6, 3e-6)] * 11 + [(2.6e-6, 4.1e-6)]
    data = data_for(spans)
    low = data["cells"][12]["comparison"]["mean_kld_ci95_chunks"][0]
    assert all(entry["comparison"]["mean_kld_ci95_chunks"][1] < low for entry in data["cells"][1:12])
    assert "which costs most is not resolved" in said(data)["Which layers"]
    assert "Layer 11 costs most" not in str(said(data))


def test_first_place_shared():
    text = said(data_for(TWO_FIRST))
    assert "The first place is shared by layers 0 and 2, not ordered among themselves" in text["In short"]
    assert "which of them costs most is not resolved" in text["Which layers"]
    assert "The largest figure is that of layer 2, 1.30e-05" in text["Which layers"]
    assert "Layer 3 costs least" in text["Which layers"]
    assert "Of 6 pairs of layers the order of 5 is resolved, that of 1 is not;" in text["Which layers"]


def test_how_many_chunks_the_next_pair_needs():
    """So many chunks of the same means and scatter resolve it, and one fewer does not."""
    data = data_for(TWO_FIRST)
    text = said(data)["Which layers"]
    ((needed, *rest),) = [re.findall(r"would need about (\d+) chunks", text)]
    assert [needed] == rest  # there is one such pair, which is of the first place too
    assert (
        f"the next would need about {needed} chunks, should means and scatter stay. To tell layer 2 from"
        in text
    )
    one, other = (np.array(data["cells"][i]["comparison"]["chunks"]["mean_kld"]) for i in (3, 1))
    test = ratio_test(one, other)
    for chunks, enough in ((int(needed), True), (int(needed) - 1, False)):
        # one of six pairs
        assert (6 * t_p(test.t * np.sqrt(chunks / 8), chunks - 1) < 0.05) == enough


def test_every_layer_has_its_place():
    text = said(data_for([(1e-6, 2e-6), (1e-5, 2e-5), (1e-4, 2e-4)]))
    assert "Then comes layer 1. Layer 0 costs least" in text["Which layers"]
    assert "The order of all 3 is resolved." in text["Which layers"]


def test_a_single_cell():
    text = said(data_for([(1e-6, 2e-6)]))
    assert "One site was measured, layer 0, in bf16." in text["In short"]
    assert "There is nothing to order." in text["Which layers"]
    assert "Perplexity goes from" in text["Which layers"]


def entry_of(i, klds):
    klds = np.asarray(klds)
    return {
        "name": f"ffn_norm[{i}].raw=bf16",
        "sites": [{"kind": "ffn_norm", "layer": i, "point": "raw"}],
        "comparison": {
            "mean_kld": float(klds.mean()),
            "mean_kld_ci95_chunks": None,
            "chunks": {"mean_kld": klds.tolist()},
        },
    }


def resolved_by_hand(klds):
    """(larger, smaller) of all pairs whose p, adjusted by Holm's steps, is below 5 %."""
    tests = {(i, j): ratio_test(klds[i], klds[j]) for i, j in combinations(range(len(klds)), 2)}
    found = set()
    for step, pair in enumerate(sorted(tests, key=lambda pair: tests[pair].p)):
        if tests[pair].p * (len(tests) - step) >= 0.05:
            break
        found.add(pair if tests[pair].ratio > 1 else pair[::-1])
    return found


@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(4, 12), st.floats(0.02, 1), st.floats(0, 1))
def test_layers_are_put_above_others_by_paired_tests_alone(seed, n, chunks, scatter, spread):
    draw = np.random.default_rng(seed)
    hard = draw.normal(0, 1, chunks)  # a chunk is hard for all of them
    klds = np.exp(draw.normal(0, spread, (n, 1)) + hard + draw.normal(0, scatter, (n, chunks)))
    group = Group("ffn_norm[*].raw=bf16", [entry_of(i, k) for i, k in enumerate(klds)], sum_of_singles=1.0)
    text = layers_text(group)
    over = resolved_by_hand(klds)
    smaller, larger = {b for _, b in over}, {a for a, _ in over}
    first, last = set(range(n)) - smaller, set(range(n)) - larger
    most = re.findall(r"Layer (\d+) costs most", text)
    assert most == ([str(*first)] if len(first) == 1 else [])
    assert re.findall(r"Layer (\d+) costs least", text) == ([str(*last)] if len(last) == 1 else [])
    pairs = n * (n - 1) // 2
    if 0 < len(over) < pairs:
        assert f"Of {pairs} pairs of layers the order of {len(over)} is resolved" in text
    else:
        assert ("No layer can be told from another" in text) == (not over)
        assert (f"The order of all {n} is resolved" in text) == (len(over) == pairs)


def test_nothing_is_ordered_without_all_of_the_cells():
    run = run_of(cells_for(layers(3), ["bf16"], cumulative=True), [("ffn_norm", i) for i in range(3)], 8)
    finished = finished_of(run, lambda cell: np.linspace(1, 2, 8) * (1 + len(cell.name)))
    data = figures(run.about, run.cells, {at: left for at, left in finished.items() if at[0] != 1})
    text = said(data)
    assert "in every cell but one that is left out" in text["Partial result"]
    assert "no layer is told from another, as some are left out" in text["In short"].lower()
    assert text["Which layers"].startswith("Of 3 layers 1 is left out: nothing is said of their order.")
    assert "costs most" not in str(text) and "the sum of the single ones" not in str(text)
    page = report_html(data | {"run": 1, "started": ""})
    assert "Mean KL divergence of the first sites together" not in page


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_below_four_chunks_nothing_is_ordered(chunks):
    spans = [(1e-6, 1.01e-6), (1e-3, 1.01e-3)]
    data = data_for(spans, chunks=chunks, specs=("bf16", "noise_bf16", "int8"), drift=0.5)
    text = said(data)
    assert "no layer is told from another" in text["In short"].lower()
    assert "no order is told" in text["In short"]
    assert "no order is told" in text["Which format at ffn_norm[*].raw"]
    assert "fewer than four, so there is no interval here and no rank" in text.pop("How sure")
    everything = " ".join(text.values())
    assert "costs most" not in everything and "resolved" not in everything
    for name, tables in cell_tables(data):
        for row in tables[0].rows if name != "control" else ():
            assert row[1] == "" and row[3] == "no interval"
    assert not any(" to " in cell for row in at_a_glance(data).rows for cell in row)


@pytest.mark.parametrize("chunks, warned", [(4, True), (7, True), (8, False)])
def test_few_chunks_are_warned_of(chunks, warned):
    random = {"chunk_order": "random", "chunk_seed": 3, "chunk_indices": [9, 4, 30, 2, 8, 11, 40, 5][:chunks]}
    how = verdict(data_for(WINNER, chunks=chunks, about=random))[-1]
    assert (how.about, how.tone) == ("How sure", "warning" if warned else "")
    assert ("Fewer than eight chunks" in " ".join(how.lines)) == warned
    assert "They were drawn at random from the text's 62 (seed 3)." in how.lines


def test_neighbouring_chunks_speak_for_themselves():
    how = verdict(data_for(WINNER))[-1]
    assert how.tone == "warning"
    assert (
        "the first of the text's 62: all that is said is of these neighbouring chunks, not of the text."
        in how.lines[-1]
    )
    how = verdict(data_for(WINNER, about={"n_tokens": 8 * 16 + 1}))[-1]
    assert how.tone == "" and "All 8 chunks of the text" in how.lines[-1]
    old = data_for(WINNER)
    del old["chunk_order"], old["chunk_indices"]  # of a version that knew no other chunks
    assert "neighbouring" in said(old)["How sure"]


def test_a_large_chunk_is_named():
    run = run_of(cells_for(layers(2), ("bf16",)), [("ffn_norm", 0), ("ffn_norm", 1)], 8)
    run.settings["chunk_indices"] = [50, 3, 17, 8, 9, 1, 2, 4]
    odd = np.array([1, 1.1, 9, 1.2, 1, 1.1, 1, 1.2])
    even = np.linspace(1, 1.2, 8)
    data = data_of(run, lambda cell: 1e-6 * (even if layer_of(cell) == 0 else odd))
    text = said(data)["Which layers"]
    assert "One chunk stands out: all together cost in chunk 17 4.3 times the mean." in text
    assert "Of 2 sites alone 1 has a chunk of more than three times the mean: layer 1 in chunk 17" in text
    rows = {row[0]: row for row in cell_tables(data)[0][1][0].rows}
    assert rows["ffn_norm[1].raw"][4] == "4.34 × mean (chunk 17)"
    assert rows["ffn_norm[0].raw"][4] == "1.09 × mean (chunk 4)"
    assert "stands out" not in str(said(data_for(WINNER)))


def test_first_call_differs_in_one_chunk():
    run = run_of(cells_for(layers(3), ("bf16:first-call",)), [("ffn_norm", i) for i in range(3)], 8)
    first = np.array([1.0] + 7 * [0.0])
    data = data_of(run, lambda cell: 1e-6 * (2 + (layer_of(cell) or 0)) * first)
    text = said(data)
    assert "At 3 of 3 sites at most one chunk differs from the unrounded model" in text["Which layers"]
    assert "no layer is told from another" in text["Which layers"]
    assert "resolved" not in text["In short"] and "stands out" not in text["Which layers"]
    assert "(nan" not in str(text) and "times the mean" not in str(text)


def test_partial():
    first = verdict(data_for(WINNER, done=3))[0]
    assert (first.about, first.tone) == ("Partial result", "warning")
    assert first.lines[0].startswith("3 of 8 chunks have ended in every cell")
    (only,) = verdict(data_for(WINNER, done=0))
    assert only.lines[0].startswith("No chunk of 8 has ended in every cell yet, so there are no figures.")


@pytest.mark.parametrize("same", [False, True])
def test_scales_found_on_the_text_that_is_measured_on_are_said_to_be(same):
    data = data_for(WINNER)
    data["calibrations"] = [{"file": "runs/cal.json", "same_text": same}]
    assert ("Static scales" in said(data)) is same
    if same:
        assert (
            "The scales of cal.json were found on the text that is measured on" in said(data)["Static scales"]
        )


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


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_not_finite_is_named_and_in_no_order(as_json):
    data = data_for(WINNER, specs=("bf16", "int8"))
    for i in (3, 5):  # the winner, and a whole
        entry = data["cells"][i]
        entry["not_finite_tokens"] = 2
        entry["comparison"]["mean_kld"] = None if as_json else np.nan
        entry["comparison"]["mean_kld_ci95_chunks"] = None
        entry["comparison"]["chunks"]["mean_kld"][0] = None if as_json else np.nan
    statements = verdict(json.loads(json.dumps(data)) if as_json else data)
    (named,) = (one for one in statements if one.about == "Not finite")
    assert named.tone == "warning"
    assert "ffn_norm[2].raw=bf16 and ffn_norm[*].raw=bf16" in named.lines[0]
    text = said(data)
    assert "layer 2" not in text["Which layers: ffn_norm[*].raw=bf16"].lower()
    assert "There is nothing to order" in text["Which format at ffn_norm[*].raw"]
    assert "nan" not in str(text)


def test_finite_until_a_token_is_not():
    """The chunks' means say nothing of tokens that were left out."""
    data = data_for(WINNER)
    assert "Not finite" not in said(data)
    data["cells"][3]["not_finite_tokens"] = 1
    assert "ffn_norm[2].raw=bf16" in said(data)["Not finite"]
    assert "Layer 2 costs most" not in str(said(data))


# ---------------------------------------------------------------- formats


def test_formats_in_order():
    run = run_of(cells_for(layers(2), ("bf16", "int8", "f16")), [("ffn_norm", 0), ("ffn_norm", 1)], 8)
    scale = {"bf16": 1e-5, "int8": 1e-3, "f16": 1.01e-5}

    def means(cell):
        spec = cell.name.partition("=")[2]
        return scale[spec] * np.random.default_rng(len(spec)).permutation(np.linspace(1, 1.2, 8))

    text = said(data_of(run, means))
    assert re.search(
        r"int8 costs most, 99\.0 \(9\d\.\d to 1\d\d\) times as much as f16, which comes next: resolved\.",
        text["In short"],
    )
    order = text["Which format at ffn_norm[*].raw"]
    assert "int8 1.10e-03 (" in order and "int8 costs most" in order and "that is resolved" in order
    assert "Not resolved is the order of f16 and bf16." in order
    assert re.search(r"To tell f16 and bf16 apart would need about \d+ chunks", order)


def test_in_short_is_as_sure_as_the_order():
    run = run_of(cells_for(layers(2), ("int8", "f16", "bf16")), [("ffn_norm", 0), ("ffn_norm", 1)], 8)
    ends = {"int8": (9, 11), "f16": (7.9, 8.1), "bf16": (1.5, 16.5)}
    means = {spec: np.linspace(*both, 8) for spec, both in ends.items()}
    text = said(data_of(run, lambda cell: 1e-4 * means[cell.name.partition("=")[2]]))
    assert "int8 has the largest mean KL divergence, but from bf16 it is not told apart." in text["In short"]
    assert "Which one costs most is not resolved" in text["Which format at ffn_norm[*].raw"]


def test_what_costs_nothing_is_in_no_order():
    run = run_of(cells_for(layers(2), ("int8", "f16", "tf32")), [("ffn_norm", 0), ("ffn_norm", 1)], 8)
    scale = {"int8": 1e-4, "f16": 1e-6, "tf32": 0.0}
    text = said(data_of(run, lambda cell: scale[cell.name.partition("=")[2]] * np.linspace(1, 1.2, 8)))
    order = text["Which format at ffn_norm[*].raw"]
    assert "the whole order is resolved. Exactly as unrounded in every chunk: tf32." in order
    assert "int8 costs most, 100 (100 to 100) times as much as f16: resolved." in text["In short"]
    nothing = text["Which layers: ffn_norm[*].raw=tf32"]
    assert "Exactly as unrounded in every chunk: layers 0 and 1." in nothing


def test_sites_in_order():
    sites = {f"{kind}[*].raw": [f"{kind}[{i}].raw" for i in range(2)] for kind in ("attn_norm", "ffn_norm")}
    run = run_of(
        cells_for(sites, ("bf16",)), [(k, i) for i in range(2) for k in ("attn_norm", "ffn_norm")], 8
    )
    data = data_of(run, lambda cell: (1e-5 if "attn" in cell.name else 1e-6) * np.linspace(1, 1.2, 8))
    assert (
        "attn_norm[*].raw costs most, 10.0 (10.0 to 10.0) times as much as"
        in said(data)["Which sites in bf16"]
    )


def test_the_report_and_compare_agree():
    """Raw against weighted: the same two cells over the same chunks have one verdict, whoever says it."""
    outcomes = []
    for seed in range(12):
        draw = np.random.default_rng(seed)
        hard = np.exp(draw.normal(0, 1, 8))  # so that the intervals overlap by far
        of_chunk = {
            p: s * hard * np.exp(draw.normal(0, 0.12, 8)) for p, s in (("raw", 0.857), ("weighted", 1))
        }
        sites = {f"ffn_norm[*].{p}": [f"ffn_norm[{i}].{p}" for i in range(2)] for p in of_chunk}
        run = run_of(cells_for(sites, ("bf16",)), [("ffn_norm", 0), ("ffn_norm", 1)], 8)

        def means(cell, of_chunk=of_chunk):
            return 1e-5 * of_chunk["raw" if ".raw" in cell.name else "weighted"]

        raw, weighted = "ffn_norm[*].raw", "ffn_norm[*].weighted"
        side = Side(1, run, finished_of(run, means))
        compared = compare_cells([(side, f"{weighted}=bf16"), (side, f"{raw}=bf16")])
        outcomes.append(compared["cells"][0]["of_runs"][1]["verdict"])
        text = said(data_of(run, means))["Which sites in bf16"]
        assert (f"{weighted} costs most" in text) == (outcomes[-1] == "smaller"), seed
        assert (f"{raw} costs most" in text) == (outcomes[-1] == "larger"), seed
        assert ("No order among them is resolved" in text) == (outcomes[-1] == "not resolved"), seed
    assert {"smaller", "not resolved"} <= set(outcomes)


# ---------------------------------------------------------------- additivity


@pytest.mark.parametrize(
    "ratio, words",
    [(0.5, "cost less than"), (0.96, "add up"), (1.04, "add up"), (2.0, "cost more than")],
)
def test_additivity(ratio, words):
    single = np.array((1e-6, 1.1e-6))
    data = data_for([tuple(single)] * 4, together=tuple(4 * ratio * single), in_step=True)
    interval = f"({ratio:.3f} to {ratio:.3f})"  # all chunks have the same ratio
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
        (1.2, None, "nothing is said"),
    ],
)
def test_additivity_is_as_sure_as_its_interval(ratio, interval, words):
    text = additivity_words(Group("g", additivity=ratio, additivity_interval=interval))
    assert words in text and "resolved" not in text


# ---------------------------------------------------------------- perplexity


def test_of_one_rounding_there_is_the_figure_of_the_perplexity_alone():
    """Its interval is of the chunks: that it leaves 0 out does not say that rounding moves it."""
    data = data_for(TIED, together=(1e-4, 2e-4), drift=0.5)
    low, high = data["cells"][4]["comparison"]["ln_ppl_ratio_ci95_chunks"]
    assert 0 < low < high
    text = said(data)
    assert "erplexity" not in text["In short"]
    (sentences,) = re.findall(r"Perplexity of all together .*", text["Which layers"])
    assert "the figure of this one rounding alone" in sentences and "--realisations" in sentences
    assert "resolved" not in sentences and "(+" not in sentences
    assert "of this one rounding alone" in at_a_glance(data).rows[0][3]


@pytest.mark.parametrize("p, resolved", [(0.004, True), (0.3, False)])
def test_several_realisations_resolve_it_or_do_not(p, resolved):
    data = data_for(TIED, together=(1e-4, 2e-4), drift=0.5)
    drawn = {"n": 5, "ln_ppl_ratio": 0.01, "ln_ppl_ratio_ci95": [0.002, 0.018], "p": p / 2, "p_adjusted": p}
    data["cells"][4]["realisations"] = drawn | {"resolved": resolved}
    text = said(data)
    which = "the change is resolved" if resolved else "no change of it is resolved"
    assert f"by +1.0 % (+0.20 % to +1.8 %), the mean of 5 realisations: {which}." in text["Which layers"]
    assert (
        "A change of the perplexity is resolved for ffn_norm[*].raw=bf16." in text["In short"]
    ) == resolved
    assert ("No change of the perplexity is resolved." in text["In short"]) != resolved
    drawn |= {"ln_ppl_ratio_ci95": None, "p": None, "p_adjusted": None}
    data["cells"][4]["realisations"] = drawn
    assert "erplexity" not in said(data)["In short"]
    assert "nothing is said of how sure that is" in said(data)["Which layers"]


# ---------------------------------------------------------------- controls


def beside(spec, factors, scatter):
    """The figures of four layers in bf16 and of a control beside it, its costs by layer."""
    run = run_of(cells_for(layers(4), ("bf16", spec)), [("ffn_norm", i) for i in range(4)], 8)
    hard = np.geomspace(1, 30, 8)

    def means(cell):
        layer = layer_of(cell)
        own = np.exp(np.random.default_rng([layer or 0, spec in cell.name]).normal(0, scatter, 8))
        return 1e-6 * hard * own * ({**factors, None: 4.0}[layer] if spec in cell.name else 1.0)

    return data_of(run, means)


def test_noise_beside_its_format_by_pairs():
    """Chunks differ thirtyfold, so that all intervals overlap; between a site and its noise they cancel."""
    data = beside("noise_bf16", {0: 0.5, 1: 1.0, 2: 2.0, 3: 2.0}, 0.01)
    text = said(data)
    assert re.search(
        r"in place of the rounding error costs 1\.3\d \(1\.3\d to 1\.3\d\) times as much, summed over single "
        r"sites\. Rounding costs more than its noise at 1 of 4 sites and less at 2; "
        r"at 1 that is not resolved\.",
        text["Which layers"],
    )
    assert not any("noise_" in about for about in text)


def test_the_sites_against_their_noise_are_tested_together():
    """Of one site p is 0.03: by itself it would be resolved, of four it is not."""
    data = beside("noise_bf16", {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, 0.01)
    ours, noise = ([e for e in data["cells"] if e["kind"] == "single"][i : i + 4] for i in (0, 4))
    even, odd = np.ones(8), np.array([1.4, 1.3, 1.1, 1.3, 0.9, 1.1, 1.0, 1.1])
    for entry in ours:
        entry["comparison"]["chunks"]["mean_kld"] = even.tolist()
    for entry in noise:
        entry["comparison"]["chunks"]["mean_kld"] = even.tolist()
    noise[0]["comparison"]["chunks"]["mean_kld"] = odd.tolist()
    assert 0.0125 < ratio_test(even, odd).p < 0.05
    assert "at 0 of 4 sites and less at 0; at 4 that is not resolved" in said(data)["Which layers"]


def test_random_signs_beside_the_noise():
    data = beside("noise_bf16", {i: 2.0 for i in range(4)}, 0.01)
    group = groups_of(data)[0]
    group.signs, group.noise = group.noise, None
    text = noise_text(group)
    assert text.startswith("The rounding's own errors with random signs cost 2.0")
    assert "less at 4; at 0 that is not resolved" in text
    group.noise = group.signs
    assert "Gaussian noise" in noise_text(group) and "random signs" in noise_text(group)


# ---------------------------------------------------------------- same top token


def test_same_top_has_its_interval_also_where_all_agree():
    data = data_for(WINNER)
    entry = data["cells"][1]
    assert re.fullmatch(r"[\d.]+ % \([\d.]+ to [\d.]+ %\)", same_top_text(entry))
    entry["comparison"] |= {"same_top": 1.0, "same_top_ci95_chunks": (0.996, 1.0)}
    assert same_top_text(entry) == "100 % (99.6 to 100 %)"
    entry["comparison"] |= {"same_top": 0.999997, "same_top_ci95_chunks": None}
    assert same_top_text(entry) == "99.9997 %"


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
