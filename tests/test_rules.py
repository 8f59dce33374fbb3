"""Rules and counters: which sites a rule takes, which rows are rounded, what is counted."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq_kernels import Executor, reference, rms_norm_f32
from fq_kernels.formats import Format
from fq_kernels.rules import KINDS, FakeQuant, Norm, Rule, Site, describe_norms

N = 96
NORMS = [Norm(kind, layer) for layer in range(3) for kind in ("attn_norm", "ffn_norm")]
NORMS.append(Norm("output_norm", None))
FFN_1 = Norm("ffn_norm", 1)
WEIGHT = np.random.default_rng(8).uniform(0.5, 2, N).astype(np.float32)


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, N)).astype(np.float32)


def run(context: FakeQuant, norm: Norm, x: np.ndarray, executor: Executor | None = None) -> np.ndarray:
    out = np.empty_like(x)
    assert context.rms_norm(norm, x, eps=1e-5, weight=WEIGHT, out=out, executor=executor) is out
    return out


def plain(x: np.ndarray) -> np.ndarray:
    return rms_norm_f32(x, weight=WEIGHT)


def rounded(x: np.ndarray, quant: str, point: str = "raw") -> np.ndarray:
    return rms_norm_f32(x, weight=WEIGHT, quant=quant, point=point)


# Rules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [n for n in NORMS if n.kind == "ffn_norm"]),
        ({"kind": "attn_norm"}, [n for n in NORMS if n.kind == "attn_norm"]),
        ({"kind": "attn_norm", "layer": 2}, [Norm("attn_norm", 2)]),
        ({"kind": "ffn_norm", "layer": 0}, [Norm("ffn_norm", 0)]),
        ({"kind": "output_norm"}, [Norm("output_norm", None)]),
        ({"kind": "all"}, NORMS),
        ({"kind": "all", "layer": 1}, [Norm("attn_norm", 1), Norm("ffn_norm", 1)]),
        ({"kind": "output_norm", "layer": 0}, []),
        ({"layer": 3}, []),
    ],
)
def test_matching(options, expected):
    rule = Rule("bf16", **options)
    assert [norm for norm in NORMS if rule.matches(norm)] == expected
    if expected:
        assert [c.norm for c in FakeQuant(NORMS, [rule]).matched] == expected
    else:
        with pytest.raises(ValueError, match="matches no site; there are attn_norm") as caught:
            FakeQuant(NORMS, [Rule("bf16", kind="all"), rule])
        assert str(rule) in str(caught.value) and describe_norms(NORMS) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mlp_norm"}, "kind must be one of attn_norm, ffn_norm, output_norm, all, not 'mlp_norm'"),
        ({"point": "middle"}, "point must be one of raw, weighted, not 'middle'"),
        ({"mode": "once"}, "mode must be one of every, first-call, not 'once'"),
        ({"layer": -2}, "layer must be a layer number, or -1 for all layers, not -2"),
        ({"format": "bf15"}, "unknown format 'bf15'; there are bf16"),
    ],
)
def test_rules_name_the_field_that_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        Rule(**{"format": "bf16", **options})


def test_rules_read_as_they_are_written():
    assert Rule("bf16").format == Format("bf16")
    assert str(Rule("bf16")) == "ffn_norm[*].raw=bf16 (every)"
    full = Rule("f16", "attn_norm", 3, "weighted", "first-call")
    assert str(full) == "attn_norm[3].weighted=f16 (first-call)"
    assert str(Rule("bf16:truncate", "all")) == "*[*].raw=bf16:truncate (every)"
    assert str(Rule("bf16", "output_norm")) == "output_norm.raw=bf16 (every)"
    assert str(Site(FFN_1, "raw")) == "ffn_norm[1].raw"
    assert str(Site(Norm("output_norm", None), "weighted")) == "output_norm.weighted"


def test_describe_norms():
    assert describe_norms(NORMS) == "attn_norm[0-2], ffn_norm[0-2], output_norm; points raw, weighted"
    assert describe_norms(NORMS[:2]) == "attn_norm[0], ffn_norm[0]; points raw, weighted"
    assert describe_norms(NORMS[-1:]) == "output_norm; points raw, weighted"


# What is computed


def test_without_rules_nothing_is_rounded():
    context, x = FakeQuant(NORMS), rows(4)
    for norm in NORMS:
        assert run(context, norm, x).tobytes() == plain(x).tobytes()
    assert context.matched == []
    assert [c.rows_seen for c in context.counters.values()] == [4] * len(NORMS)


def test_later_rules_win():
    rules = [
        Rule("bf16", kind="all"),
        Rule("f16", kind="ffn_norm", layer=1),
        Rule("bf16:truncate", kind="ffn_norm", point="weighted"),
        Rule("bf16:nearest-away", kind="ffn_norm", layer=2),
    ]
    context, x = FakeQuant(NORMS, rules), rows(4)
    taken = {norm: context.counters[norm].rule for norm in NORMS}
    assert taken[Norm("attn_norm", 1)] == taken[Norm("output_norm", None)] == rules[0]
    assert taken[Norm("ffn_norm", 0)] == taken[FFN_1] == rules[2]
    assert taken[Norm("ffn_norm", 2)] == rules[3]
    for norm, rule in taken.items():
        assert run(context, norm, x).tobytes() == rounded(x, rule.format, rule.point).tobytes()


@pytest.mark.parametrize("point", ["raw", "weighted"])
def test_points(point):
    x = rows(4)
    got = run(FakeQuant(NORMS, [Rule("bf16:truncate", point=point)]), FFN_1, x)
    assert got.tobytes() == rounded(x, "bf16:truncate", point).tobytes()
    other = "raw" if point == "weighted" else "weighted"
    assert got.tobytes() != rounded(x, "bf16:truncate", other).tobytes()


def test_unmatched_norms_stay_exact():
    context, x = FakeQuant(NORMS, [Rule("bf16", layer=1)]), rows(4)
    for norm in NORMS:
        assert (run(context, norm, x).tobytes() == plain(x).tobytes()) == (norm != FFN_1)


def test_a_norm_that_the_graph_does_not_have():
    with pytest.raises(KeyError):
        run(FakeQuant(NORMS), Norm("ffn_norm", 9), rows(1))


# Coverage


def test_every_rounds_each_row_of_each_call():
    context = FakeQuant(NORMS, [Rule("bf16")])
    for seed, n in enumerate([3, 1, 5]):
        x = rows(n, seed)
        assert run(context, FFN_1, x).tobytes() == rounded(x, "bf16").tobytes()
    counter = context.counters[FFN_1]
    assert (counter.rows_seen, counter.rows_quantised, counter.elements) == (9, 9, 9 * N)
    assert counter.coverage == 1
    assert context.counters[Norm("ffn_norm", 0)].rows_seen == 0


def test_first_call_rounds_the_first_row_after_a_reset_alone():
    context = FakeQuant(NORMS, [Rule("bf16", mode="first-call")])
    empty = run(context, FFN_1, rows(0))
    assert empty.shape == (0, N)
    for _ in range(2):
        x = rows(5, 1)
        expected = plain(x)
        assert (expected[0] != rounded(x, "bf16")[0]).any()
        expected[0] = rounded(x, "bf16")[0]
        assert run(context, FFN_1, x).tobytes() == expected.tobytes()
        for seed in (2, 3):
            x = rows(4, seed)
            assert run(context, FFN_1, x).tobytes() == plain(x).tobytes()
        counter = context.counters[FFN_1]
        assert (counter.rows_seen, counter.rows_quantised, counter.elements) == (13, 1, N)
        assert counter.coverage == 1 / 13
        # each site has a first row of its own
        other = Norm("ffn_norm", 2)
        assert run(context, other, x)[0].tobytes() == rounded(x, "bf16")[0].tobytes()
        context.reset()
        assert context.counters[FFN_1].rows_seen == 0


# Counters


def expected_counts(values: np.ndarray, quant: str) -> dict[str, float]:
    results = reference.round_trip(values, quant)
    finite = np.isfinite(values) & np.isfinite(results)
    error = (results[finite].astype(np.float64) - values[finite]).ravel()
    square = math.fsum(values[finite].astype(np.float64).ravel() ** 2)
    noise = math.fsum(error**2)
    return {
        "elements": values.size,
        "changed": int(((values != results) & ~(np.isnan(values) & np.isnan(results))).sum()),
        "not_finite": int((~finite).sum()),
        "max_abs_error": float(np.abs(error).max()),
        "mean_abs_error": math.fsum(np.abs(error)) / finite.sum(),
        "mean_error": math.fsum(error) / finite.sum(),
        "sqnr_db": 10 * math.log10(square / noise),
    }


@pytest.mark.parametrize("point", ["raw", "weighted"])
@pytest.mark.parametrize("quant", ["bf16", "bf16:truncate", "bf16:nearest-away", "f16"])
def test_counters_are_numpys(executor, quant, point):
    context = FakeQuant(NORMS, [Rule(quant, "attn_norm", point=point)])
    batches = [rows(3, 1), rows(1, 2) * np.float32(1e3), rows(40, 3)]
    batches[2][7, 5] = np.inf
    batches[2][9] = 0
    for x in batches:
        run(context, Norm("attn_norm", 2), x, executor)
    values = np.concatenate(
        [reference.rms_norm_f32(x, weight=WEIGHT if point == "weighted" else None) for x in batches]
    )
    counter = context.counters[Norm("attn_norm", 2)]
    for name, expected in expected_counts(values, quant).items():
        assert getattr(counter, name) == pytest.approx(expected, rel=1e-9, abs=1e-18), name
    assert counter.changed > 0 and counter.not_finite > 0
    assert counter.rows_seen == counter.rows_quantised == 44


def test_counters_of_first_call_count_its_row_alone():
    context = FakeQuant(NORMS, [Rule("bf16", mode="first-call")])
    x = rows(6)
    run(context, FFN_1, x)
    run(context, FFN_1, rows(6, 1))
    counter = context.counters[FFN_1]
    for name, expected in expected_counts(reference.rms_norm_f32(x[:1]), "bf16").items():
        assert getattr(counter, name) == pytest.approx(expected, rel=1e-9), name


def test_truncation_is_biased_and_nearest_even_is_not():
    x = np.abs(rows(200))
    bias = {}
    for quant in ("bf16", "bf16:truncate"):
        context = FakeQuant(NORMS, [Rule(quant)])
        run(context, FFN_1, x)
        counter = context.counters[FFN_1]
        bias[quant] = counter.mean_error / counter.mean_abs_error
    assert bias["bf16:truncate"] == pytest.approx(-1)
    assert abs(bias["bf16"]) < 0.05


def test_counters_without_rows_or_error():
    context = FakeQuant(NORMS, [Rule("bf16")])
    counter = context.counters[FFN_1]
    assert (counter.coverage, counter.mean_error, counter.mean_abs_error, counter.sqnr_db) == (0, 0, 0, None)
    run(context, FFN_1, np.zeros((2, N), np.float32))
    assert (counter.coverage, counter.changed, counter.max_abs_error, counter.sqnr_db) == (1, 0, 0, None)


def test_as_dict_is_json():
    context = FakeQuant(NORMS, [Rule("bf16", "output_norm", point="weighted")])
    run(context, NORMS[-1], rows(2))
    entry = json.loads(json.dumps(context.matched[0].as_dict()))
    assert (entry["kind"], entry["layer"], entry["point"]) == ("output_norm", None, "weighted")
    assert (entry["format"], entry["mode"]) == ("bf16", "every")
    assert (entry["rows_seen"], entry["rows_quantised"], entry["elements"]) == (2, 2, 2 * N)


# Callbacks


@pytest.mark.parametrize(("mode", "point"), [("every", "raw"), ("first-call", "weighted")])
def test_on_row(mode, point):
    calls = []
    rule = Rule("bf16", point=point, mode=mode)
    context = FakeQuant(NORMS, [rule], on_row=lambda *row: calls.append(row))
    x = rows(3)
    for _ in range(2):
        run(context, FFN_1, x)
    run(context, Norm("attn_norm", 1), x)
    value = reference.rms_norm_f32(x, weight=WEIGHT if point == "weighted" else None)
    error = np.abs(reference.round_trip(value, "bf16").astype(np.float64) - value)
    expected = [(Site(FFN_1, point), float(e[0]), float(e[-1])) for e in error]
    assert expected[0][1] != expected[0][2]
    assert calls == (expected * 2 if mode == "every" else expected[:1])


# State


def test_contexts_do_not_share_state():
    rules = [Rule("bf16", mode="first-call")]
    a, b = FakeQuant(NORMS, rules), FakeQuant(NORMS, rules)
    x = rows(3)
    first = run(a, FFN_1, x)
    assert b.counters[FFN_1].rows_seen == 0
    assert run(b, FFN_1, x).tobytes() == first.tobytes()
    a.reset()
    assert (a.counters[FFN_1].rows_seen, b.counters[FFN_1].rows_seen) == (0, 3)
    assert a.counters[FFN_1].sums is not b.counters[FFN_1].sums
    assert b.counters[FFN_1].sums.any()


def test_rules_given_as_a_list_may_change_afterwards():
    rules = [Rule("bf16")]
    context = FakeQuant(iter(NORMS), rules)
    rules.clear()
    context.reset()
    assert len(context.matched) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_norms_draw_numbers_of_their_own(kind):
    context, x = FakeQuant(NORMS, [Rule("bf16:stochastic,seed=1", "all")]), rows(4)
    results = [run(context, norm, x).tobytes() for norm in NORMS]
    assert len(set(results)) == len(NORMS)
    again = FakeQuant(NORMS, [Rule("bf16:stochastic,seed=1", kind)])
    for norm, result in zip(NORMS, results, strict=True):
        if norm.kind == kind:
            assert run(again, norm, x).tobytes() == result
    other = FakeQuant(NORMS, [Rule("bf16:stochastic,seed=2", "all")])
    assert not set(results) & {run(other, norm, x).tobytes() for norm in NORMS}


@given(cuts=st.sets(st.integers(1, 11)))
def test_stochastic_does_not_see_batches(executor, cuts):
    x = rows(12)
    rule = [Rule("bf16:stochastic,seed=1")]
    whole = run(FakeQuant(NORMS, rule), FFN_1, x)
    context = FakeQuant(NORMS, rule)
    parts = [run(context, FFN_1, part, executor) for part in np.split(x, sorted(cuts))]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    context.reset()
    assert run(context, FFN_1, x).tobytes() == whole.tobytes()
