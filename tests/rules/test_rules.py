"""Rules and counters: which sites a rule takes, which rows are rounded, what is counted."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq_kernels import Executor, format_names, reference, rms_norm_f32, round_trip
from fq_kernels.formats import Format, get_format
from fq_kernels.rules import MODES, POINTS, FakeQuant, Place, Rule, Site, Value, describe_values

N = 96
NORMS = [Place(kind, layer) for layer in range(3) for kind in ("attn_norm", "ffn_norm")]
NORMS.append(Place("output_norm", None))
KINDS = ("attn_norm", "ffn_norm", "output_norm")
VALUES = [Value(norm, norm_n=norm.layer is not None) for norm in NORMS]
FFN_1 = Place("ffn_norm", 1)
RAW_1, WEIGHTED_1 = Site(FFN_1, "raw"), Site(FFN_1, "weighted")
SITES = [site for value in VALUES for site in value.sites]
WEIGHT = np.random.default_rng(8).uniform(0.5, 2, N).astype(np.float32)


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, N)).astype(np.float32)


def run(context: FakeQuant, norm: Place, x: np.ndarray, executor: Executor | None = None) -> np.ndarray:
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
        ({"kind": "attn_norm", "layer": 2}, [Place("attn_norm", 2)]),
        ({"kind": "ffn_norm", "layer": 0}, [Place("ffn_norm", 0)]),
        ({"layer": -1}, [n for n in NORMS if n.kind == "ffn_norm"]),
        ({"layer": range(1, 9)}, [FFN_1, Place("ffn_norm", 2)]),
        ({"layer": range(0, 3, 2)}, [Place("ffn_norm", 0), Place("ffn_norm", 2)]),
        ({"layer": [range(1), np.int64(2)]}, [Place("ffn_norm", 0), Place("ffn_norm", 2)]),
        ({"kind": "output_norm"}, [Place("output_norm", None)]),
        ({"kind": "all"}, NORMS),
        ({"kind": "*"}, NORMS),
        ({"kind": "*", "layer": 1}, [Place("attn_norm", 1), Place("ffn_norm", 1)]),
        ({"kind": "*", "layer": range(3)}, NORMS[:-1]),
        ({"kind": "norm"}, NORMS[:-1]),
        ({"kind": "norm", "layer": 1}, [Place("attn_norm", 1), Place("ffn_norm", 1)]),
        ({"kind": "output_norm", "layer": 0}, []),
        ({"layer": 3}, []),
    ],
)
@pytest.mark.parametrize("point", POINTS)
def test_matching(options, expected, point):
    if options.get("kind") == "norm" and point != "raw":
        return
    rule = Rule("bf16", point=point, **options)
    sites = [Site(norm, point) for norm in expected]
    assert [site for v in VALUES for site in v.sites if rule.takes(v, site.point)] == sites
    if expected:
        assert [c.site for c in FakeQuant(VALUES, rule).matched] == sites
    else:
        with pytest.raises(ValueError, match="matches no site; there are attn_norm") as caught:
            FakeQuant(VALUES, [Rule("bf16", kind="all"), rule])
        assert str(rule) in str(caught.value) and describe_values(VALUES) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "MLP norm"}, r"kind must be a name such as ffn_norm or l_out, or \*, not 'MLP norm'"),
        ({"kind": None}, r"kind must be a name such as ffn_norm or l_out, or \*, not None"),
        ({"point": "middle"}, "point must be one of in, raw, weighted, not 'middle'"),
        ({"kind": "l_out", "point": "raw"}, "norms alone have points, and l_out is none"),
        ({"kind": "activation", "point": "in"}, r"point must be left out: .*, and activation is none"),
        ({"kind": "norm", "point": "weighted"}, "point must be raw for kind norm"),
        ({"mode": "once"}, "mode must be one of every, first-call, not 'once'"),
        ({"layer": -2}, "layer must be a layer number, or -1 for all layers, not -2"),
        ({"layer": [3, -1]}, "layer must be a layer number, or -1 for all layers, not -1"),
        ({"layer": range(5, 5)}, "layer names no layer"),
        ({"layer": []}, "layer names no layer"),
        ({"format": "bf15"}, "unknown format 'bf15'; "),
    ],
)
def test_rules_name_the_field_that_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        Rule(**{"format": "bf16", **options})


@pytest.mark.parametrize("layer", ["5", 1.5, [1, "2"], object()])
def test_a_layer_that_is_no_number(layer):
    with pytest.raises(TypeError, match="layer must be a layer number, a range or several, not"):
        Rule("bf16", layer=layer)


@pytest.mark.parametrize(
    ("text", "rule", "written"),
    [
        ("ffn_norm[5]=bf16", Rule("bf16", layer=5), "ffn_norm[5].raw=bf16"),
        (
            "ffn_norm[0-10,15].weighted=bf16:truncate",
            Rule("bf16:truncate", layer=[*range(11), 15], point="weighted"),
            "ffn_norm[0-10,15].weighted=bf16:truncate",
        ),
        ("*[*].raw=f16", Rule("f16", "*"), "*[*].raw=f16"),
        ("*=f16", Rule("f16", "all"), "*[*].raw=f16"),
        ("all[2]=f16", Rule("f16", "*", 2), "*[2].raw=f16"),
        ("output_norm=f16", Rule("f16", "output_norm"), "output_norm.raw=f16"),
        (
            "output_norm[*].weighted=f16",
            Rule("f16", "output_norm", point="weighted"),
            "output_norm.weighted=f16",
        ),
        ("output_norm[0]=f16", Rule("f16", "output_norm", 0), "output_norm[0].raw=f16"),
        ("ffn_norm=bf16:first-call", Rule("bf16", mode="first-call"), "ffn_norm[*].raw=bf16:first-call"),
        ("ffn_norm=bf16:every", Rule("bf16"), "ffn_norm[*].raw=bf16"),
        (
            "norm[5]=bf16:truncate,first-call",
            Rule("bf16:truncate", "norm", 5, mode="first-call"),
            "norm[5].raw=bf16:truncate,first-call",
        ),
        (
            "attn_norm=bf16:first-call,stochastic,seed=9",
            Rule(Format("bf16", "stochastic", 9), "attn_norm", mode="first-call"),
            "attn_norm[*].raw=bf16:stochastic,seed=9,first-call",
        ),
        (
            " ffn_norm[ 3 , 1 - 2 ].raw = BF16 : truncate , First-Call ",
            Rule("bf16:truncate", layer=range(1, 4), mode="first-call"),
            "ffn_norm[1-3].raw=bf16:truncate,first-call",
        ),
        ("ffn_norm[4,0-1,1-2,3,9]=bf16", Rule("bf16", layer=[9, range(5)]), "ffn_norm[0-4,9].raw=bf16"),
    ],
)  # fmt: skip
def test_rules_as_text(text, rule, written):
    assert Rule.parse(text) == rule
    assert hash(Rule.parse(text)) == hash(rule)
    assert str(rule) == written
    assert Rule.parse(written) == rule


@pytest.mark.parametrize(
    "options", ["asymmetric,group=32", "first-call,asymmetric,group=32", "tensor,first-call"]
)
def test_a_formats_own_options_stand_beside_the_mode(options):
    rule = Rule.parse(f"*=int8:{options}")
    own = [option for option in options.split(",") if option != "first-call"]
    assert rule.format == get_format(f"int8:{','.join(own)}")
    assert rule.mode == ("first-call" if "first-call" in options else "every")
    assert Rule.parse(str(rule)) == rule


@st.composite
def any_rules(draw, n_layers=40):
    """Rules over layers 0 to n_layers - 1, with the set of those layers that each names."""
    spec = draw(st.sampled_from(format_names()))
    if "stochastic" in spec:
        spec += f",seed={draw(st.integers(0, 2**64 - 1))}"
    kind = draw(st.sampled_from([*KINDS, "norm", "*", "all"]))
    numbers = st.integers(0, n_layers - 1)
    pairs = st.tuples(numbers, numbers).map(sorted)
    pieces = draw(st.none() | st.lists(numbers | pairs.map(lambda p: range(p[0], p[1] + 1)), min_size=1))
    layers = set(range(n_layers))
    if pieces is not None:
        layers = {i for piece in pieces for i in (piece if isinstance(piece, range) else [piece])}
    point = "raw" if kind == "norm" else draw(st.sampled_from([None, *POINTS]))
    return Rule(spec, kind, pieces, point, draw(st.sampled_from(MODES))), pieces, layers


@given(any_rules())
def test_a_rules_text_is_the_rule(drawn):
    rule, pieces, layers = drawn
    assert Rule.parse(str(rule)) == rule
    # the same layers in another order and other pieces are the same rule
    if pieces is not None:
        assert Rule(rule.format, rule.kind, layers, rule.point, rule.mode) == rule
        assert {i for r in rule.layers for i in r} == layers


@given(st.lists(any_rules(n_layers=3), max_size=6))
def test_later_rules_win(drawn):
    """Against the sites of each rule written out, one by one."""
    owner = {}
    for rule, pieces, layers in drawn:
        kinds = {"norm": ("attn_norm", "ffn_norm"), "*": KINDS}.get(rule.kind, (rule.kind,))
        of_layers = [kind for kind in kinds if kind != KINDS[2]]
        owner |= {Site(Place(kind, i), rule.point): rule for kind in of_layers for i in layers}
        if KINDS[2] in kinds and pieces is None:
            owner[Site(NORMS[-1], rule.point)] = rule
    given_rules = [rule for rule, pieces, _ in drawn if rule.kind != "output_norm" or pieces is None]
    context = FakeQuant(VALUES, given_rules)
    assert {site: c.rule for site, c in context.counters.items()} == {site: owner.get(site) for site in SITES}
    assert [c.site for c in context.matched] == [site for site in SITES if site in owner]


BAD_RULES = {
    "": "there is no =FORMAT",
    "ffn_norm[5]": "there is no =FORMAT",
    "ffn_norm[5]:bf16": "there is no =FORMAT",
    "=bf16": "kind must be a name such as ffn_norm or l_out, or *, not ''",
    "**=bf16": "kind must be a name",
    "FFN_NORM=bf16": "kind must be",
    "l_out[1].raw=bf16": "point must be left out: norms alone have points, and l_out is none",
    "ffn_norm[=bf16": "'ffn_norm[' is not written KIND[LAYERS].POINT",
    "ffn_norm 5=bf16": "'ffn_norm 5' is not written KIND",
    "ffn_norm[1][2]=bf16": "is not written KIND",
    "ffn_norm.raw[1]=bf16": "is not written KIND",
    "ffn_norm[]=bf16": "not ''",
    "ffn_norm[1,]=bf16": "not ''",
    "ffn_norm[x]=bf16": "layers must be * or numbers and ranges such as 0-10,15, not 'x'",
    "ffn_norm[-1]=bf16": "not '-1'",
    "ffn_norm[1-2-3]=bf16": "not '1-2-3'",
    "ffn_norm[²]=bf16": "not '²'",
    "ffn_norm[1.5]=bf16": "not '1.5'",
    "ffn_norm[0,9-3]=bf16": "layers 9-3 run backwards",
    "ffn_norm[1].=bf16": "point must be one of in, raw, weighted, not ''",
    "ffn_norm[1].cooked=bf16": "point must be one of in, raw, weighted, not 'cooked'",
    "norm[1].weighted=bf16": "point must be raw for kind norm",
    "ffn_norm=": "unknown format ''",
    "ffn_norm=first-call": "unknown format 'first-call'",
    "ffn_norm=bf16:once": "format 'bf16:once'",
    "ffn_norm=bf16:first-call,every": "two modes: first-call, every",
    "ffn_norm=bf16:stochastic,seed=x": "unknown option 'seed=x'",
    f"ffn_norm[{'9' * 5000}]=bf16": "layers must be",
}


@pytest.mark.parametrize("text", BAD_RULES, ids=lambda text: text[:40])
def test_text_that_is_no_rule(text):
    with pytest.raises(ValueError) as caught:
        Rule.parse(text)
    assert str(caught.value).startswith(f"rule {text!r}: ") and BAD_RULES[text] in str(caught.value)
    with pytest.raises(ValueError, match="rule "):
        FakeQuant(VALUES, ["ffn_norm=bf16", text])


def test_what_is_no_text():
    for wrong in (None, 5, [5], [b"ffn_norm=bf16"]):
        with pytest.raises(TypeError, match="a rule is a string such as"):
            FakeQuant(VALUES, wrong)


@pytest.mark.parametrize(
    ("rule", "missing"),
    [
        ("ffn_norm[0,57]=bf16", "57"),
        ("*[1-2,5-9]=bf16", "5-9"),
        ("norm[0,3]=bf16", "3"),
        ("*[0,3]=acc=bf16", "3"),
    ],
)
def test_layers_of_which_nothing_is_taken(rule, missing):
    with pytest.raises(ValueError, match=f"takes nothing of layer {missing}; there are attn_norm"):
        FakeQuant(VALUES, rule)
    FakeQuant(VALUES, rule, matching_only=True)  # of figures, which may be of a time when it was taken


def test_a_format_that_does_not_fit_the_rows():
    values = [value._replace(width=48) for value in VALUES]
    with pytest.raises(ValueError, match=r"^attn_norm\[0\]\.raw: format int8:had=32 rotates .* rows of 48 "):
        FakeQuant(values, "*=int8:had=32")
    assert FakeQuant(values, "*=int8:had=16").matched
    assert FakeQuant(values, "*=int8:had=32", matching_only=True).matched


def test_a_range_is_not_written_out():
    tracemalloc.start()
    rule = Rule.parse("ffn_norm[0-999999999999]=bf16")
    assert str(rule) == "ffn_norm[0-999999999999].raw=bf16"
    assert [c.site.place.layer for c in FakeQuant(VALUES, rule).matched] == [0, 1, 2]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_names():
    assert str(RAW_1) == "ffn_norm[1].raw"
    assert str(Site(Place("output_norm", None), "weighted")) == "output_norm.weighted"


def test_describe_values():
    points = "points in, raw, weighted"
    assert describe_values(VALUES) == f"attn_norm[0-2], ffn_norm[0-2], output_norm; {points}"
    assert describe_values(VALUES[:2]) == f"attn_norm[0], ffn_norm[0]; {points}"
    assert describe_values(VALUES[-1:]) == f"output_norm; {points}"
    others = [Value(Place("inp_embd")), Value(Place("k", 0), 2), Value(Place("k", 1), 2)]
    assert describe_values(others) == "inp_embd, k[0-1]"
    assert describe_values([*others, VALUES[0]]) == f"inp_embd, k[0-1], attn_norm[0]; {points} of norms"


# What is computed


def test_without_rules_nothing_is_rounded():
    context, x = FakeQuant(VALUES), rows(4)
    for norm in NORMS:
        assert run(context, norm, x).tobytes() == plain(x).tobytes()
    assert context.matched == []
    assert [c.rows_seen for c in context.counters.values()] == [4] * len(SITES)


@pytest.mark.parametrize("point", ["raw", "weighted"])
def test_points(point):
    x = rows(4)
    got = run(FakeQuant(VALUES, [Rule("bf16:truncate", point=point)]), FFN_1, x)
    assert got.tobytes() == rounded(x, "bf16:truncate", point).tobytes()
    other = "raw" if point == "weighted" else "weighted"
    assert got.tobytes() != rounded(x, "bf16:truncate", other).tobytes()


def after_both(x: np.ndarray, raw: Format | str, weighted: Format | str) -> np.ndarray:
    return round_trip(round_trip(rms_norm_f32(x), raw) * WEIGHT, weighted)


@pytest.mark.parametrize(("raw", "weighted"), [("bf16", "f16"), ("f16", "bf16:truncate"), ("bf16", "bf16")])
def test_a_raw_and_a_weighted_rule_both_act(executor, raw, weighted):
    context = FakeQuant(VALUES, [f"ffn_norm={raw}", f"ffn_norm[1].weighted={weighted}"])
    x = rows(5)
    got = run(context, FFN_1, x, executor)
    assert got.tobytes() == after_both(x, raw, weighted).tobytes()
    assert got.tobytes() not in (rounded(x, raw).tobytes(), rounded(x, weighted, "weighted").tobytes())
    other = Place("ffn_norm", 0)
    assert run(context, other, x).tobytes() == rounded(x, raw).tobytes()
    counting_rows = FakeQuant(VALUES, context.rules, count_errors=False)
    assert run(counting_rows, FFN_1, x, executor).tobytes() == got.tobytes()
    assert [counting_rows.counters[s].rows_quantised for s in (RAW_1, WEIGHTED_1)] == [5, 5]
    # each site counts what its own rule did to its own values
    values = reference.rms_norm_f32(x)
    for site, value, quant in (
        (RAW_1, values, raw),
        (WEIGHTED_1, reference.round_trip(values, raw) * WEIGHT, weighted),
    ):
        for name, expected in expected_counts(value, quant).items():
            assert getattr(context.counters[site], name) == pytest.approx(expected, rel=1e-9), (site, name)
    assert (context.rows_seen(FFN_1), context.rows_quantised(FFN_1)) == (5, 5)
    totals = context.as_dict()
    assert (totals["rows_seen"], totals["rows_quantised"]) == (10, 10)


@pytest.mark.parametrize(("raw", "weighted"), [MODES, MODES[::-1], (MODES[1], MODES[1])])
def test_both_points_have_modes_of_their_own(raw, weighted):
    rules = [f"ffn_norm=bf16:{raw}", f"ffn_norm.weighted=f16:{weighted}"]
    context, counting_rows = FakeQuant(VALUES, rules), FakeQuant(VALUES, rules, count_errors=False)
    for seed in (1, 2):
        x = rows(3, seed)
        expected = plain(x)
        for row in range(3):
            points = [mode == "every" or (seed, row) == (1, 0) for mode in (raw, weighted)]
            one = x[row : row + 1]
            if all(points):
                expected[row] = after_both(one, "bf16", "f16")
            elif any(points):
                expected[row] = rounded(one, "bf16") if points[0] else rounded(one, "f16", "weighted")
        assert run(context, FFN_1, x).tobytes() == expected.tobytes()
        assert run(counting_rows, FFN_1, x).tobytes() == expected.tobytes()
    counts = [context.counters[site].rows_quantised for site in (RAW_1, WEIGHTED_1)]
    assert counts == [6 if mode == "every" else 1 for mode in (raw, weighted)]
    assert context.rows_quantised(FFN_1) == max(counts)


def test_unmatched_norms_stay_exact():
    context, x = FakeQuant(VALUES, [Rule("bf16", layer=1)]), rows(4)
    for norm in NORMS:
        assert (run(context, norm, x).tobytes() == plain(x).tobytes()) == (norm != FFN_1)


def test_a_norm_that_the_graph_does_not_have():
    with pytest.raises(KeyError):
        run(FakeQuant(VALUES), Place("ffn_norm", 9), rows(1))


# Coverage


def test_every_rounds_each_row_of_each_call():
    context = FakeQuant(VALUES, [Rule("bf16")])
    for seed, n in enumerate([3, 1, 5]):
        x = rows(n, seed)
        assert run(context, FFN_1, x).tobytes() == rounded(x, "bf16").tobytes()
    counter = context.counters[RAW_1]
    assert (counter.rows_seen, counter.rows_quantised, counter.elements) == (9, 9, 9 * N)
    assert (counter.coverage, counter.rows_skipped) == (1, 0)
    assert context.rows_seen(Place("ffn_norm", 0)) == 0


def test_first_call_rounds_the_first_row_after_a_reset_alone():
    context = FakeQuant(VALUES, [Rule("bf16", mode="first-call")])
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
        counter = context.counters[RAW_1]
        assert (counter.rows_seen, counter.rows_quantised, counter.elements) == (13, 1, N)
        assert (counter.coverage, counter.rows_skipped) == (1 / 13, 12)
        # each site has a first row of its own
        other = Place("ffn_norm", 2)
        assert run(context, other, x)[0].tobytes() == rounded(x, "bf16")[0].tobytes()
        context.reset()
        assert context.rows_seen(FFN_1) == 0


def test_first_call_of_norm_n_is_the_first_row_that_reaches_the_name():
    """As in the original experiment: of a layer's two norms the first to run, whichever it is."""
    attention = Place("attn_norm", 1)
    for first, second in ((attention, FFN_1), (FFN_1, attention)):
        context = FakeQuant(VALUES, "norm[1]=bf16:first-call")
        run(context, second, rows(0))
        for norm in (first, second, first, second):
            x = rows(3, seed=4)
            expected = plain(x)
            if not any(context.rows_seen(n) for n in NORMS):
                expected[0] = rounded(x, "bf16")[0]
            assert run(context, norm, x).tobytes() == expected.tobytes()
        assert (context.rows_quantised(first), context.rows_quantised(second)) == (1, 0)
        assert context.counters[Site(second, "raw")].rows_skipped == 6
        context.reset()
        assert run(context, second, x)[0].tobytes() == rounded(x, "bf16")[0].tobytes()


def test_the_name_norm_n_is_reached_whatever_rule_takes_the_site():
    context, x = FakeQuant(VALUES, ["norm=bf16:first-call", "attn_norm[1]=f16"]), rows(2)
    assert run(context, Place("attn_norm", 1), x).tobytes() == rounded(x, "f16").tobytes()
    assert run(context, FFN_1, x).tobytes() == plain(x).tobytes()
    # without first-call the name is both norms
    context = FakeQuant(VALUES, "norm=bf16")
    for norm in NORMS:
        expected = plain(x) if norm.layer is None else rounded(x, "bf16")
        assert run(context, norm, x).tobytes() == expected.tobytes()


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
    context = FakeQuant(VALUES, [Rule(quant, "attn_norm", point=point)])
    batches = [rows(3, 1), rows(1, 2) * np.float32(1e3), rows(40, 3)]
    batches[2][7, 5] = np.inf
    batches[2][9] = 0
    for x in batches:
        run(context, Place("attn_norm", 2), x, executor)
    values = np.concatenate(
        [reference.rms_norm_f32(x, weight=WEIGHT if point == "weighted" else None) for x in batches]
    )
    counter = context.counters[Site(Place("attn_norm", 2), point)]
    for name, expected in expected_counts(values, quant).items():
        assert getattr(counter, name) == pytest.approx(expected, rel=1e-9, abs=1e-18), name
    assert counter.changed > 0 and counter.not_finite > 0
    assert counter.rows_seen == counter.rows_quantised == 44


def test_counters_of_first_call_count_its_row_alone():
    context = FakeQuant(VALUES, [Rule("bf16", mode="first-call")])
    x = rows(6)
    run(context, FFN_1, x)
    run(context, FFN_1, rows(6, 1))
    counter = context.counters[RAW_1]
    for name, expected in expected_counts(reference.rms_norm_f32(x[:1]), "bf16").items():
        assert getattr(counter, name) == pytest.approx(expected, rel=1e-9), name


def test_truncation_is_biased_and_nearest_even_is_not():
    x = np.abs(rows(200))
    bias = {}
    for quant in ("bf16", "bf16:truncate"):
        context = FakeQuant(VALUES, [Rule(quant)])
        run(context, FFN_1, x)
        counter = context.counters[RAW_1]
        bias[quant] = counter.mean_error / counter.mean_abs_error
    assert bias["bf16:truncate"] == pytest.approx(-1)
    assert abs(bias["bf16"]) < 0.05


def test_counters_without_rows_or_error():
    context = FakeQuant(VALUES, [Rule("bf16")])
    counter = context.counters[RAW_1]
    assert (counter.coverage, counter.mean_error, counter.mean_abs_error, counter.sqnr_db) == (0, 0, 0, None)
    run(context, FFN_1, np.zeros((2, N), np.float32))
    assert (counter.coverage, counter.changed, counter.max_abs_error, counter.sqnr_db) == (1, 0, 0, None)


ERRORS = (
    "changed", "out_of_range", "to_zero", "subnormal", "not_finite", "max_abs_error", "mean_abs_error",
    "mean_error", "sqnr_db",
)  # fmt: skip


def test_as_dict_is_json():
    context = FakeQuant(VALUES, "output_norm.weighted=bf16:first-call")
    run(context, NORMS[-1], rows(3))
    data = json.loads(json.dumps(context.as_dict()))
    assert data["rules"] == ["output_norm.weighted=bf16:first-call"]
    [entry] = data["sites"]
    assert (entry["kind"], entry["layer"], entry["point"]) == ("output_norm", None, "weighted")
    assert (entry["format"], entry["mode"]) == ("bf16", "first-call")
    assert (entry["rows_seen"], entry["rows_quantised"], entry["rows_skipped"]) == (3, 1, 2)
    assert entry["elements"] == N and 0 < entry["changed"] <= N
    assert all(entry[name] is not None for name in ERRORS)


def test_values_out_of_the_formats_range_are_counted():
    """float32 holds 65520 and more, where f16 ends."""
    context = FakeQuant(VALUES, "ffn_norm.weighted=f16")
    x = rows(4)
    weight = WEIGHT.copy()
    weight[[3, 40]] = 1e6, -1e30
    values = reference.rms_norm_f32(x, weight=weight)
    for part in np.split(x, 2):
        context.rms_norm(FFN_1, part, eps=1e-5, weight=weight, out=np.empty_like(part))
    expected = int((np.abs(values) >= 65520).sum())
    counter = context.counters[WEIGHTED_1]
    assert counter.out_of_range == counter.as_dict()["out_of_range"] == expected >= 5
    assert context.counters[RAW_1].rule is None


def test_what_underflows_is_counted():
    """The smallest normal number of fp8_e4m3fn is 2^-6, the smallest at all 2^-9."""
    context = FakeQuant(VALUES, "ffn_norm.weighted=fp8_e4m3fn")
    x = rows(4)
    weight = WEIGHT.copy()
    weight[::3] *= np.float32(2.0**-8)
    context.rms_norm(FFN_1, x, eps=1e-5, weight=weight, out=np.empty_like(x))
    result = np.abs(reference.rms_norm_f32(x, weight=weight, quant="fp8_e4m3fn", point="weighted"))
    counter = context.counters[WEIGHTED_1]
    assert counter.to_zero == counter.as_dict()["to_zero"] == np.count_nonzero(result == 0) > 5
    small = (result > 0) & (result < 2.0**-6)
    assert counter.subnormal == counter.as_dict()["subnormal"] == np.count_nonzero(small) > 5


def test_subnormals_of_elements_that_share_a_scale_are_not_counted():
    context = FakeQuant(VALUES, "ffn_norm.weighted=mxfp4")
    x = rows(4)
    context.rms_norm(FFN_1, x, eps=1e-5, weight=WEIGHT, out=np.empty_like(x))
    counter = context.counters[WEIGHTED_1]
    assert counter.subnormal is None and counter.to_zero > 0


@pytest.mark.parametrize("mode", MODES)
def test_counting_rows_alone(mode):
    """The same bits and the same rows; no error figures, and no memory taken for them."""
    rule, x = f"ffn_norm=bf16:{mode}", rows(2000)
    with_errors, context = FakeQuant(VALUES, rule), FakeQuant(VALUES, rule, count_errors=False)
    out = np.empty_like(x)
    tracemalloc.start()
    context.rms_norm(FFN_1, x, eps=1e-5, weight=WEIGHT, out=out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2000 * 8  # one column of statistics
    assert out.tobytes() == run(with_errors, FFN_1, x).tobytes()
    counter, entry = context.counters[RAW_1], context.counters[RAW_1].as_dict()
    counted = with_errors.counters[RAW_1].as_dict()
    assert entry == counted | dict.fromkeys(ERRORS)
    assert all(getattr(counter, name) is None for name in ERRORS) and counted["changed"]


def test_rows_are_reported_though_errors_are_not_counted():
    calls = []
    context = FakeQuant(VALUES, "ffn_norm=bf16", lambda *row: calls.append(row), count_errors=False)
    run(context, FFN_1, rows(3))
    assert len(calls) == 3 and calls[0][1] > 0
    assert context.counters[RAW_1].max_abs_error is None


# Callbacks


@pytest.mark.parametrize(("mode", "point"), [("every", "raw"), ("first-call", "weighted")])
def test_on_row(mode, point):
    calls = []
    rule = Rule("bf16", point=point, mode=mode)
    context = FakeQuant(VALUES, [rule], on_row=lambda *row: calls.append(row))
    x = rows(3)
    for _ in range(2):
        run(context, FFN_1, x)
    run(context, Place("attn_norm", 1), x)
    value = reference.rms_norm_f32(x, weight=WEIGHT if point == "weighted" else None)
    error = np.abs(reference.round_trip(value, "bf16").astype(np.float64) - value)
    expected = [(Site(FFN_1, point), float(e[0]), float(e[-1])) for e in error]
    assert expected[0][1] != expected[0][2]
    assert calls == (expected * 2 if mode == "every" else expected[:1])


# State


def test_contexts_do_not_share_state():
    rules = [Rule("bf16", mode="first-call")]
    a, b = FakeQuant(VALUES, rules), FakeQuant(VALUES, rules)
    x = rows(3)
    first = run(a, FFN_1, x)
    assert b.rows_seen(FFN_1) == 0
    assert run(b, FFN_1, x).tobytes() == first.tobytes()
    a.reset()
    assert (a.rows_seen(FFN_1), b.rows_seen(FFN_1)) == (0, 3)
    assert a.counters[RAW_1].changed == 0 < b.counters[RAW_1].changed


def test_rules_given_as_a_list_may_change_afterwards():
    several = [Rule("bf16")]
    context = FakeQuant(iter(VALUES), several)
    several.clear()
    context.reset()
    assert len(context.matched) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_norms_draw_numbers_of_their_own(kind):
    context, x = FakeQuant(VALUES, [Rule("bf16:stochastic,seed=1", "all")]), rows(4)
    results = [run(context, norm, x).tobytes() for norm in NORMS]
    assert len(set(results)) == len(NORMS)
    again = FakeQuant(VALUES, [Rule("bf16:stochastic,seed=1", kind)])
    for norm, result in zip(NORMS, results, strict=True):
        if norm.kind == kind:
            assert run(again, norm, x).tobytes() == result
    other = FakeQuant(VALUES, [Rule("bf16:stochastic,seed=2", "all")])
    assert not set(results) & {run(other, norm, x).tobytes() for norm in NORMS}


def test_stochastic_points_draw_numbers_of_their_own():
    x, ones = rows(2), np.ones(N, np.float32)
    results = []
    for point in ("raw", "weighted"):  # with a weight of 1 both points round the same values
        context = FakeQuant(VALUES, f"*.{point}=bf16:stochastic")
        results.append(context.rms_norm(FFN_1, x, eps=1e-5, weight=ones, out=np.empty_like(x)))
    assert results[0].tobytes() != results[1].tobytes()


@given(cuts=st.sets(st.integers(1, 11)))
def test_stochastic_does_not_see_batches(executor, cuts):
    x = rows(12)
    rule = [Rule("bf16:stochastic,seed=1")]
    whole = run(FakeQuant(VALUES, rule), FFN_1, x)
    context = FakeQuant(VALUES, rule)
    parts = [run(context, FFN_1, part, executor) for part in np.split(x, sorted(cuts))]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    context.reset()
    assert run(context, FFN_1, x).tobytes() == whole.tobytes()
