"""Figures of an estimate: from chunks that are made up, so that each is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fq.commands.show_sensitivity import sensitivity_text
from fq.measure.estimates import (
    GAIN_ERROR,
    LARGEST,
    LEAST_SPREAD,
    MIN_ALIKE,
    USUAL_CV,
    Asked,
    Gains,
    ModelError,
    dearest,
    estimated,
    gains_in_need,
    intervals,
    judged,
    marks_of,
    sensitivity_figures,
    to_verify,
)
from fq.measure.inference import t_quantile
from fq.measure.sensitivity import COLUMNS
from fq_kernels.formats.gain import BY

ABOUT = {"model": "m.gguf", "text": "t", "n_tokens": 4096, "n_ctx": 64, "n_chunks_asked": 4}
ABOUT |= {"chunk_order": "first", "chunk_indices": [0, 1, 2, 3]}
USUAL = {"value_sq": 100.0, "error_sq": 0.01, "along": 0.0, "cross": 0.0, "largest": 0.1}
COSTS = {"blocks": 1e-4, "by_token": 1e-4, "neighbours": 1e-4, "by_element": 1e-4, "unbounded": 1e-4}
COSTS |= {"common": 0.0}
COSTS |= {"whole_by_token": 2e-4, "whole_by_element": 3e-4}


def asked_of(n_sites, formats=("bf16",), classes=None, kind="l_out"):
    sites = tuple(f"{kind}[{i}]" for i in range(n_sites))
    return Asked(sites, tuple(formats), tuple(classes or range(n_sites)), 4, 0, COLUMNS)


def chunks_of(asked, n=4, **columns):
    """Alike in all cells but for what is given, which spreads over (chunks, sites, formats)."""
    shape = (n, len(asked.sites), len(asked.formats))
    columns = {"unbounded": columns.get("blocks", COSTS["blocks"])} | columns
    values = {name: np.broadcast_to((USUAL | COSTS)[name], shape) for name in COLUMNS}
    values |= {name: np.broadcast_to(value, shape) for name, value in columns.items()}
    return list(np.stack([values[name] for name in COLUMNS], axis=-1))


def gains_of(asked, **klds):
    return Gains(asked.classes, {int(key[1:]): np.array(value) * BY * BY for key, value in klds.items()})


def test_an_estimate_is_the_sum_of_its_parts():
    asked = asked_of(3, classes=(5, 5, None))
    found = estimated(asked, chunks_of(asked, along=0.01, cross=-2e-5), gains_of(asked, c5=[1.0, 3.0]))
    assert found.kld[:, 0] == pytest.approx([1e-4 - 2e-5 + 1e-4 * 2, 1e-4 - 2e-5 + 1e-4 * 2, 1e-4])
    assert found.share_along[:, 0] == pytest.approx([2e-4 / 2.8e-4, 2e-4 / 2.8e-4, 0])


def test_a_cross_term_that_no_square_has_is_left_out():
    """Twice the root of what its parts cost is the most; by the mean over chunks."""
    asked = asked_of(2, classes=(0, None))
    gains = gains_of(asked, c0=[4.0])  # along 4e-4 beside blocks of 1e-4
    for cross, kept in ((3.9e-4, True), (-3.9e-4, True), (4.1e-4, False), (-4.1e-4, False)):
        found = estimated(asked, chunks_of(asked, along=0.01, cross=cross), gains)
        assert found.kld[:, 0] == pytest.approx([5e-4 + cross * kept, 1e-4])
        assert found.cross[:, 0] == pytest.approx([cross * kept, 0])
    uneven = np.array([8e-4, 0, 0, 0])[:, None, None]
    found = estimated(asked, chunks_of(asked, along=0.01, cross=uneven), gains)
    assert found.by_chunk[:, 0, 0] == pytest.approx([13e-4, 5e-4, 5e-4, 5e-4])


def test_no_cost_is_below_zero():
    asked = asked_of(1)
    uneven = np.array([-8e-4, 0, 0, 0])[:, None, None]
    found = estimated(asked, chunks_of(asked, cross=uneven, along=0.01), gains_of(asked, c0=[4.0]))
    assert found.by_chunk[:, 0, 0] == pytest.approx([0.0, 5e-4, 5e-4, 5e-4])


@pytest.mark.parametrize("late", ["unbounded", "common"])
def test_runs_of_before_a_column(late):
    asked = replace(asked_of(MIN_ALIKE), columns=tuple(name for name in COLUMNS if name != late))
    left = [np.delete(chunk, COLUMNS.index(late), axis=-1) for chunk in chunks_of(asked_of(MIN_ALIKE))]
    found = estimated(asked, left, gains_of(asked, **{f"c{i}": [1.0] for i in range(MIN_ALIKE)}))
    assert found.kld == pytest.approx(1e-4) and found.unbounded == pytest.approx(found.kld)


def test_blocks_are_smoothed_by_the_other_sums():
    """Under the kind's factors, here 2 and 3, which one site with four and one with five times as much do not
    share."""
    asked = asked_of(MIN_ALIKE, classes=[None] * MIN_ALIKE)
    shape = (MIN_ALIKE, 1)
    blocks, by_token, by_element = np.full(shape, 6e-4), np.full(shape, 3e-4), np.full(shape, 2e-4)
    blocks[0] *= 4
    by_element[1] *= 5
    # of the logarithms of (token / blocks, element / blocks): the kind's means
    token, element = 4 ** (-1 / MIN_ALIKE) / 2, (5 / 4) ** (1 / MIN_ALIKE) / 3
    found = estimated(
        asked, chunks_of(asked, blocks=blocks, by_token=by_token, by_element=by_element), gains_of(asked)
    )
    wanted = np.cbrt(blocks * (by_token / token) * (by_element / element))
    assert found.kld == pytest.approx(wanted)
    assert found.kld[0, 0] < 2 * found.kld[2, 0], "not four times"
    few = asked_of(MIN_ALIKE - 1, classes=[None] * (MIN_ALIKE - 1))
    found = estimated(few, chunks_of(few, blocks=blocks[:-1]), gains_of(few))
    assert found.kld[:, 0] == pytest.approx(blocks[:-1, 0])


def test_sites_that_leave_nothing_or_nan_have_no_say_in_the_factor():
    asked = asked_of(MIN_ALIKE + 2, classes=[None] * (MIN_ALIKE + 2))
    blocks = np.full((MIN_ALIKE + 2, 1), 2e-4)
    blocks[:3, 0] = 0, np.nan, 8e-4
    found = estimated(asked, chunks_of(asked, blocks=blocks), gains_of(asked))
    assert found.kld[0, 0] == 0 and np.isnan(found.kld[1, 0])
    mean = 2 * 4 ** (1 / MIN_ALIKE)
    assert found.kld[2:4, 0] == pytest.approx(
        [1e-4 * np.cbrt(8 * mean * mean), 1e-4 * np.cbrt(2 * mean * mean)]
    )


def with_common(common, n=MIN_ALIKE):
    asked = asked_of(n, classes=[None] * n)
    return estimated(asked, chunks_of(asked, common=common), gains_of(asked)).kld[:, 0] / 1e-4


def test_what_lines_have_in_common_is_the_kinds():
    """Of the middle half, over chunks; a site that leaves NaN has no say."""
    common = np.array([-2.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.5, np.nan, 9.0])[None, :, None] * 1e-4
    scatter = np.array([-1.0, 1.0, -2.0, 2.0])[:, None, None] * 1e-4
    assert with_common(common + scatter, 9) == pytest.approx(1 + (0.2 + 0.3 + 0.4 + 0.4) / 4)
    assert with_common(common[:, :7] + scatter, 7) == pytest.approx(1.0), "too few to tell"


def test_no_site_is_said_to_cost_nothing():
    """Squares of lines may come out far below those of their blocks."""
    assert with_common(np.full((1, MIN_ALIKE, 1), -3e-4)) == pytest.approx(0.2)


def test_intervals_have_three_parts():
    asked = asked_of(2, classes=(0, None))
    blocks = np.array([1.0, 2.0, 3.0, 2.0])[:, None, None] * 1e-4
    errors = ModelError(0.1, 0.7, 9, 250.0)
    gains = gains_of(asked, c0=[1.0, 2.0])
    found = estimated(asked, chunks_of(asked, blocks=blocks, along=0.01, largest=0.3), gains)
    low, high = np.log(intervals(asked, found, gains, errors)[:, 0]).T
    se = math.sqrt(2 / 3) * 1e-4 / math.sqrt(4)
    cv = math.sqrt(0.5) / 1.5
    share = 1.5e-4 / 3.5e-4
    halves = [
        math.hypot(
            t_quantile(0.05, 3) * se / kld,
            2 * share * cv / math.sqrt(2),
            t_quantile(0.05, 8) * 0.7 * math.sqrt(0.3**2 + (se / kld) ** 2 + 1 / 250),
        )
        for kld, share in ((3.5e-4, share), (2e-4, 0))
    ]
    assert (high - low) / 2 == pytest.approx(halves)
    assert (high + low) / 2 == pytest.approx(np.log(found.kld[:, 0]) + 0.1)
    assert intervals(asked, found, gains, None) is None
    few = estimated(asked, chunks_of(asked, n=3), gains)
    assert intervals(asked, few, gains, errors) is None


def test_a_spread_of_what_there_is_no_cost_of():
    asked = asked_of(4, classes=[None] * 4)
    blocks = np.array([0.0, math.nan, math.inf, 1e-4])[None, :, None]
    found = estimated(asked, chunks_of(asked, blocks=blocks, largest=0.0), gains_of(asked))
    assert found.spread[:, 0].tolist() == [LEAST_SPREAD] * 4
    one = estimated(asked, chunks_of(asked, n=1, largest=0.25), gains_of(asked))
    assert one.spread[:, 0].tolist() == [0.25] * 4


def test_the_model_error_is_a_prediction_interval():
    """Of values that have one mean and are in proportion to spreads: weighted by these."""
    logs, spreads = np.array([0.1, -0.2, 0.9, 0.0]), np.array([0.1, 0.1, 0.5, 0.2])
    error = ModelError.of(logs, spreads)
    weights = spreads**-2
    assert error.mean == pytest.approx(np.average(logs, weights=weights))
    assert (error.n, error.weight) == (4, pytest.approx(weights.sum()))
    # equal spreads are as if there were none
    alike = ModelError.of(logs, [0.5] * 4)
    assert alike.mean == pytest.approx(0.2) and alike.sd == pytest.approx(2 * np.std(logs, ddof=1))
    half = t_quantile(0.05, 3) * np.std(logs, ddof=1) * math.sqrt(1.25)
    assert alike.half(np.array([0.5, 1.0])) == pytest.approx([half, half * math.sqrt(4.25 / 1.25)])
    assert ModelError.of(logs[:3], spreads[:3]) is None


def test_a_model_error_holds_as_often_as_it_says():
    rng = np.random.default_rng(3)
    held = []
    for _ in range(4000):
        spreads = 10 ** rng.uniform(-2, 0, 9)
        logs = 0.3 + 0.5 * spreads * rng.standard_normal(9)
        error = ModelError.of(logs[:8], spreads[:8])
        held.append(abs(logs[8] - error.mean) <= error.half(spreads[8]))
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(
    ("columns", "spec", "mark"),
    [
        ({}, "bf16", ""),
        ({"blocks": math.nan}, "bf16", "not finite"),
        ({"blocks": 1.01 * LARGEST}, "bf16", "large"),
        ({"blocks": 0.99 * LARGEST}, "bf16", ""),
        ({"unbounded": 1.01 * LARGEST}, "bf16", "large"),
        ({"unbounded": 0.99 * LARGEST}, "bf16", ""),
        ({"blocks": 1.01 * LARGEST, "unbounded": 0.9 * LARGEST}, "bf16", "large"),
        ({}, "int8:tensor", "tensor"),
        ({"largest": 0.51}, "bf16", "one block"),
        ({"neighbours": 1.51e-4}, "bf16", "correlated"),
        ({"along": 0.02}, "bf16", "far"),
        ({"along": -0.02}, "bf16", "far"),
        ({"along": 0.015, "blocks": 1e-6}, "bf16", ""),
        ({"along": 0.02, "blocks": 5e-4}, "bf16", ""),
        ({"along": -0.124, "blocks": 0.02}, "bf16", ""),
        ({"along": -0.126, "blocks": 0.02}, "bf16", "clipped"),
        # where nearly all is along the value, the blocks do not matter
        ({"largest": 0.51, "neighbours": 1.51e-4, "along": 0.0151}, "bf16", ""),
        ({"neighbours": 0.0, "by_token": 0.0}, "bf16", ""),
    ],
)
def test_marks(columns, spec, mark):
    asked = asked_of(1, [spec])
    found = estimated(asked, chunks_of(asked, **columns), gains_of(asked, c0=[1.0]))
    assert marks_of(asked, found).tolist() == [[mark]]


def test_gains_are_measured_until_their_part_is_small():
    asked = asked_of(4, classes=(0, 1, 2, None))
    along, blocks = np.array([[0.01], [1e-4], [0.1], [0.1]]), np.array([[1e-6], [1e-6], [1e-6], [1e-6]])
    left = chunks_of(asked, along=along, blocks=blocks)
    klds = [1.0, 2.0, 1.2, 1.8, 1.4, 1.6, 1.5, 1.5]
    for n in range(1, 9):
        gains = gains_of(asked, c0=klds[:n], c1=klds[:n], c2=klds[:n])
        cv = np.std(klds[:n], ddof=1) / np.mean(klds[:n]) if n > 1 else USUAL_CV
        wanting = gains_in_need(asked, estimated(asked, left, gains), gains)
        # not the one along which there is nothing, nor the one that is marked, as far
        assert wanting == ([0] if cv / math.sqrt(n) > GAIN_ERROR else [])
        assert wanting or n > 3


def test_a_class_without_a_gain_is_yet_to_be_measured():
    asked = asked_of(2)
    found = estimated(asked, chunks_of(asked, along=0.01), gains_of(asked, c0=[1.0]))
    assert marks_of(asked, found).tolist() == [[""], ["unmeasured"]]
    data = sensitivity_figures(ABOUT, asked, chunks_of(asked), gains_of(asked, c0=[1.0]), {})
    assert data["partial"]
    data = sensitivity_figures(ABOUT, asked, chunks_of(asked), gains_of(asked, c0=[1.0], c1=[1.0]), {})
    assert not data["partial"]


def test_cells_to_verify_are_of_all_sizes_kinds_and_formats():
    formats = ["bf16", "f16", "int8", "mxfp4"]
    sites = tuple(f"{kind}[{i}]" for kind in ("q", "k", "l_out") for i in range(8))
    asked = Asked(sites, tuple(formats), (None,) * 24, 4, 0, COLUMNS)
    sizes = np.geomspace(1e-8, 1e-3, 96).reshape(24, 4)
    sizes[0, 0] = 1.0
    found = estimated(
        asked,
        chunks_of(asked, blocks=sizes, by_token=sizes, by_element=sizes, neighbours=sizes),
        gains_of(asked),
    )
    chosen = to_verify(asked, found, marks_of(asked, found), 12)
    assert len(set(chosen)) == 12 and chosen == to_verify(asked, found, marks_of(asked, found), 12)
    assert ("q[0]", "bf16") not in chosen, "it is marked"
    assert {site.partition("[")[0] for site, _ in chosen} == {"q", "k", "l_out"}
    assert all(2 <= sum(spec == one for _, spec in chosen) <= 4 for one in formats)
    ranks = sorted(int(np.searchsorted(np.sort(sizes.ravel()), sizes[asked.cell(*cell)])) for cell in chosen)
    assert all(8 * k - 1 <= rank <= 8 * k + 8 for k, rank in enumerate(ranks))
    assert len(to_verify(asked, found, marks_of(asked, found), 500)) == 95
    assert to_verify(asked, found, marks_of(asked, found), 0) == []


@pytest.fixture
def data():
    asked = asked_of(8, ["bf16", "int8"], classes=[None] * 8)
    sizes = np.array([[1e-4], [2e-4], [5e-5], [0.06], [1e-6], [np.nan], [3e-4], [2e-5]])
    left = chunks_of(asked, blocks=sizes, by_token=sizes, by_element=sizes, neighbours=sizes)
    exact = {(f"l_out[{i}]", "bf16"): np.full(4, 1.1 * sizes[i, 0]) for i in (0, 1, 2, 3, 6)}
    exact["l_out[7]", "int8"] = np.full(3, 1.0)  # too few are there yet
    return sensitivity_figures(ABOUT, asked, left, gains_of(asked), exact)


def test_figures(data):
    json.dumps(data, allow_nan=False)
    assert [cell["site"] for cell in data["cells"][:3]] == ["l_out[0]", "l_out[1]", "l_out[2]"]
    of_bf16 = {cell["layer"]: cell for cell in data["cells"] if cell["format"] == "bf16"}
    assert [of_bf16[i]["rank"] for i in range(8)] == [4, 3, 5, 1, 7, None, 2, 6]
    assert of_bf16[5]["mean_kld"] is None and of_bf16[5]["mark"] == "not finite"
    assert of_bf16[0]["sqnr_db"] == pytest.approx(40)
    assert (of_bf16[0]["kind"], of_bf16[0]["point"]) == ("l_out", None)
    assert len(data["verified"]) == 5
    assert [one["mark"] for one in data["verified"]] == [None, None, None, "large", None]
    error = data["model_error"]
    assert error["ln_ratio_mean"] == pytest.approx(math.log(1.1)) and error["n"] == 4
    assert error["ln_ratio_sd_over_spread"] == pytest.approx(0, abs=1e-12)
    assert error["ratio_ci95"] == pytest.approx([1.1, 1.1])
    assert of_bf16[0]["spread"] == error["spread_median"] and of_bf16[5]["spread"] is None
    low, high = of_bf16[0]["mean_kld_ci95"]
    assert low == pytest.approx(1.1e-4) and high == pytest.approx(1.1e-4)


def test_cells_measured_in_part_are_compared_over_what_is_there():
    """A run that ended while they were measured."""
    asked = asked_of(1, classes=[None])
    about = ABOUT | {"n_chunks_asked": 6, "chunk_indices": list(range(6))}
    blocks = np.array([1.0, 1.0, 1.0, 1.0, 9.0, 9.0])[:, None, None] * 1e-4
    left, exact = chunks_of(asked, n=6, blocks=blocks), {("l_out[0]", "bf16"): np.full(4, 2e-4)}
    data = sensitivity_figures(about, asked, left, gains_of(asked), exact)
    assert data["verified"][0]["ratio"] == pytest.approx(2.0) and data["partial"]


def test_text(data):
    text = sensitivity_text(data)
    assert "8 sites in 2 formats, by 4 labels a token" in text
    assert "4 of 16 cells are marked, not to be trusted:" in text
    assert "l_out[3]=bf16" in text and "1.10" in text
    assert "exact / estimate of one more like most, 95 %: 1.10 to 1.10" in text


def test_figures_without_chunks():
    data = sensitivity_figures(ABOUT, asked_of(2), [], gains_of(asked_of(2)), {})
    assert data["cells"] == [] and data["partial"] and "there are no figures" in sensitivity_text(data)


def test_pairs_beside_what_each_costs_alone():
    asked = asked_of(4)
    exact = {
        (f"l_out[{i}]", "bf16"): np.array(klds) for i, klds in enumerate(([1.0, 2, 3, 4], [2.0, 2, 2, 2]))
    }
    pairs = {
        ("l_out[0]", "l_out[1]", "bf16"): np.array([4.5, 6, 7.5, 9]),
        ("l_out[0]", "l_out[2]", "bf16"): np.array([1.0, 1, 1, 1]),  # of which one is not measured alone
    }
    data = sensitivity_figures(
        ABOUT, asked, chunks_of(asked), gains_of(asked, c0=[1], c1=[1], c2=[1], c3=[1]), exact, pairs
    )
    (one,) = data["pairs"]
    assert one["sites"] == ["l_out[0]", "l_out[1]"] and one["alone"] == [2.5, 2.0]
    assert one["over_sum"] == pytest.approx(1.5) and one["over_sum_ci95"] == pytest.approx((1.5, 1.5))
    assert one["mean_kld"] == pytest.approx(6.75) and not data["partial"]
    pairs["l_out[0]", "l_out[1]", "bf16"] = np.array([4.5, 6])
    data = sensitivity_figures(
        ABOUT, asked, chunks_of(asked), gains_of(asked, c0=[1], c1=[1], c2=[1], c3=[1]), exact, pairs
    )
    (one,) = data["pairs"]
    assert one["alone"] == [1.5, 2.0] and one["over_sum_ci95"] is None and data["partial"]


def test_the_dearest_of_a_format_are_of_different_values():
    sites = ("ffn_norm[0].raw", "ffn_norm[0].weighted", "l_out[0]", "l_out[1]", "q[0]")
    asked = Asked(sites, ("bf16", "int8"), (None,) * 5, 4, 0, COLUMNS)
    blocks = np.array([[5.0, 1], [6.0, 2], [9.0, 3], [4.0, 4], [0.0, 0]]) * 1e-5
    found = estimated(asked, chunks_of(asked, blocks=blocks), Gains(asked.classes, {}))
    marks = np.full((5, 2), "", object)
    marks[2, 0] = "large"
    assert dearest(asked, found, marks, 2) == [
        (("ffn_norm[0].weighted", "l_out[1]"), "bf16"),
        (("l_out[0]", "l_out[1]"), "int8"),
    ]
    assert len(dearest(asked, found, marks, 9)[0][0]) == 2


def test_what_is_measured_and_not_finite_is_no_choice():
    """Whatever was estimated there."""
    asked = asked_of(2)
    gains = gains_of(asked, c0=[1.0], c1=[1.0])
    lost = np.array([1e-4, np.nan, 1e-4, 1e-4])
    said = judged(asked, chunks_of(asked), gains, {("l_out[1]", "bf16"): lost})
    assert list(said.marks[:, 0]) == ["", "not finite"] and not said.exact
    assert said.trusted(0, 0) and not said.trusted(1, 0)
