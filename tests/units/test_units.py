"""Units: how they are written, what goes together, and which norms take them."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from command_line import fq
from strategies import assert_same_bits

from fq import Context, Executor, FqError, Perplexity
from fq.run.fork import Fork
from fq_kernels import NormUnit, register_format, rms_norm_f32, rms_norm_unit, round_trip
from fq_kernels.formats import unregister_format
from fq_kernels.rules import FakeQuant, Place, Rule, Site, UnitRule, Value, parse_rule
from fq_kernels.units import STEPS

F32 = np.float32
N = 96
NORMS = [Place(kind, layer) for layer in range(2) for kind in ("attn_norm", "ffn_norm")] + [
    Place("output_norm")
]
VALUES = [Value(norm, norm_n=norm.layer is not None) for norm in NORMS] + [Value(Place("l_out", 0))]
WEIGHT = np.random.default_rng(8).uniform(0.5, 2, N).astype(F32)


def rows(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, N)).astype(F32)


def norm(rules: FakeQuant, place: Place, x: np.ndarray) -> np.ndarray:
    return rules.rms_norm(place, x, eps=1e-5, weight=WEIGHT, out=np.empty_like(x))


# ---------------------------------------------------------------- written


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        (" acc = bf16 ; order = lanes=16; ", "acc=bf16;order=lanes=16"),
        ("out=FP8_E4M3:truncate,no-saturate", "out=fp8_e4m3fn:truncate,no-saturate"),
        ("rsqrt=lut=8,linear,bf16:truncate", "rsqrt=lut=8,linear,bf16:truncate"),
        ("rsqrt=lut=6,newton=2", "rsqrt=newton=2,lut=6"),
        ("rsqrt=bf16", "rsqrt=bf16"),
        ("rsqrt=exact,bf16", "rsqrt=bf16"),
        ("rsqrt=exact", "rsqrt=exact"),
        ("gain=1 + w, bf16", "gain=1+w,bf16"),
        ("acc=F32;x=f32", "x=f32;acc=f32"),
        ("acc=e8m10:stochastic", "acc=e8m10:stochastic,seed=0"),
        ("acc=bf16;order=chunk = 8, F32", "acc=bf16;order=chunk=8,f32"),
        ("acc=f32;order=chunk=8,bf16:truncate", "acc=f32;order=chunk=8,bf16:truncate"),
    ],
)
def test_text(text, canonical):
    unit = NormUnit.parse(text)
    assert str(unit) == canonical and NormUnit.parse(canonical) == unit
    assert pickle.loads(pickle.dumps(unit)) == unit and hash(unit) == hash(NormUnit.parse(canonical))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acc", "'acc' is not written STEP=VALUE, with one of the steps x, square, acc"),
        ("sum=bf16", "'sum=bf16' is not written STEP=VALUE"),
        ("acc=bf16;acc=f32", "step acc is there twice"),
        ("acc=bf17", "step acc: unknown format 'bf17'"),
        ("acc=", "step acc"),
        ("out=mxfp4", "step out: format mxfp4 does not round each element alone"),
        ("out=int8", "step out: format int8 does not round each element alone"),
        ("out=fp8_e4m3:row", "does not round each element alone"),
        ("out=nvfp4:scale=1", "does not round each element alone"),
        ("out=int8:scale=@cal.json", "does not round each element alone"),
        ("out=bf16:dither", "has dither"),
        ("out=noise_bf16", "is a row's noise"),
        ("acc=bf16;order=lanes", "step order: must be sequential, lanes=N, tree, torch, chunk=N or"),
        ("acc=bf16;order=tree,f32", "step order: must be"),
        ("acc=bf16;order=chunk=8,mxfp4", "step order: format mxfp4 does not round"),
        ("acc=bf16;order=tree=3", "step order: must be"),
        ("acc=bf16;order=lanes=3", "step order: lanes must be a power of two, not 3"),
        ("acc=bf16;order=lanes=1024", "'1024' must be a number from 2 to 512"),
        ("acc=bf16;order=chunk=0", "'0' must be a number from 1"),
        ("acc=bf16;order=chunk=99999999999999999999", "must be a number from 1"),
        ("eps=below", "step eps: must be inside or outside, not 'below'"),
        ("rsqrt=lut=0", "step rsqrt: '0' must be a number from 1 to 16"),
        ("rsqrt=newton=99", "'99' must be a number from 1 to 8"),
        ("rsqrt=linear", "step rsqrt: must be exact, lut=BITS, newton=K"),
        ("rsqrt=lut=4,lut=5", "step rsqrt: must be exact"),
        ("gain=2+w", "step gain: must be w or 1+w"),
        ("gain=1+w,mxfp4", "step gain: format mxfp4 does not round"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(text, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        NormUnit.parse(text)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["*=order=tree"], r"attn_norm\[0\]: step order: tree needs acc"),
        (["*=acc=f64;order=tree"], "step order: tree needs acc"),
        (["*=acc=bf16;order=tree", "ffn_norm=acc=f64"], r"ffn_norm\[0\]: step order: tree needs acc"),
        (["*=eps=outside", "*=rsqrt=lut=4"], "step eps: outside needs an exact rsqrt"),
    ],
)
def test_steps_that_do_not_go_together(texts, message):
    with pytest.raises(ValueError, match=message):
        FakeQuant(VALUES, texts)
    FakeQuant(VALUES, [*texts, "*=acc=bf16;eps=inside"])
    with pytest.raises(ValueError, match="step order: tree needs acc"):
        rms_norm_unit(np.ones((1, 4), F32), "order=tree")


def test_steps_by_name():
    unit = NormUnit(acc="bf16", out="bf16:truncate")
    assert unit == NormUnit.parse("out=bf16:truncate;acc=bf16") and set(unit.steps) < set(STEPS)
    assert repr(unit) == "NormUnit('acc=bf16;out=bf16:truncate')"


def test_a_rule_with_a_step_behind_its_sites_is_a_unit_rule():
    rule = parse_rule("ffn_norm[0-1]=acc=bf16;order=lanes=16")
    assert isinstance(rule, UnitRule) and str(rule) == "ffn_norm[0-1]=acc=bf16;order=lanes=16"
    assert UnitRule.parse(str(rule)) == rule == UnitRule("acc=bf16;order=lanes=16", "ffn_norm", range(2))
    assert isinstance(parse_rule("ffn_norm=int8:scale=0.5"), Rule)
    register_format("raw", lambda x: x)
    try:
        assert isinstance(parse_rule("ffn_norm=raw"), Rule)
    finally:
        unregister_format("raw")
    assert str(parse_rule("output_norm=x=bf16")) == "output_norm=x=bf16"
    assert str(parse_rule("all=out=bf16:stochastic", seed=4)) == "*[*]=out=bf16:stochastic,seed=4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_norm.raw=acc=bf16", r"'ffn_norm.raw' is not written KIND\[LAYERS\]"),
        ("l_out=acc=bf16", "kind must be a norm's, such as ffn_norm, or \\*, not 'l_out'"),
        ("norm=acc=bf16", "kind must be a norm's"),
        ("ffn_norm=", "there is no =STEP=VALUE"),
        ("ffn_norm=;", "unit must have a step"),
        ("ffn_norm=acc=bf17", "unit rule 'ffn_norm=acc=bf17': step acc: unknown format"),
        ("ffn_norm[x]=acc=bf16", "layers must be"),
    ],
)
def test_unit_rules_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        UnitRule.parse(text)


# ---------------------------------------------------------------- norms


def test_a_norm_computes_by_its_unit_and_others_do_not():
    rules = FakeQuant(VALUES, "ffn_norm[1]=acc=bf16")
    x = rows(5)
    assert_same_bits(norm(rules, Place("ffn_norm", 1), x), rms_norm_unit(x, "acc=bf16", weight=WEIGHT))
    assert_same_bits(norm(rules, Place("ffn_norm", 0), x), rms_norm_f32(x, weight=WEIGHT))
    assert rules.takes(Place("ffn_norm", 1)) and not rules.takes(Place("ffn_norm", 0))
    assert not rules.matched and rules.rows_seen(Place("ffn_norm", 1)) == 5


def test_each_step_is_of_the_last_rule_that_names_it():
    rules = FakeQuant(VALUES, ["*=acc=bf16;out=f16", "ffn_norm=acc=f32", "ffn_norm[1]=x=bf16"])
    assert str(rules.units[Place("attn_norm", 0)]) == "acc=bf16;out=f16"
    assert str(rules.units[Place("ffn_norm", 0)]) == "acc=f32;out=f16"
    assert str(rules.units[Place("ffn_norm", 1)]) == "x=bf16;acc=f32;out=f16"


@pytest.mark.parametrize(("step", "point"), [("x", "in"), ("raw", "raw"), ("out", "weighted")])
def test_a_step_and_a_rule_at_the_same_place_are_refused(step, point):
    with pytest.raises(ValueError, match=f"step {step} of a unit .* round the same value of ffn_norm"):
        FakeQuant(VALUES, [f"ffn_norm[1].{point}=bf16", f"*={step}=bf16"])
    FakeQuant(VALUES, [f"ffn_norm[1].{point}=bf16", f"*={step}=f32"])
    FakeQuant(VALUES, [f"ffn_norm[1].{point}=bf16", f"attn_norm={step}=bf16"])


def test_a_unit_rule_without_a_norm_is_an_error():
    with pytest.raises(
        ValueError, match=r"q_norm\[\*\]=acc=bf16 matches no norm; there are attn_norm\[0-1\]"
    ):
        FakeQuant(VALUES, "q_norm=acc=bf16")


@pytest.mark.parametrize("count_errors", [True, False])
def test_rules_at_other_places_of_the_norm_act_between_its_steps(count_errors):
    place = Place("ffn_norm", 0)
    unit = "acc=bf16;weight=bf16;out=f16:stochastic,seed=3"
    rules = FakeQuant(
        VALUES, [f"ffn_norm={unit}", "ffn_norm.in=e8m5", "ffn_norm.raw=e8m4"], count_errors=count_errors
    )
    mine = NormUnit.parse(unit).seeded("ffn_norm[0]")
    x = rows(7)
    norm(rules, place, rows(3))
    raw = round_trip(rms_norm_unit(round_trip(x, "e8m5"), "acc=bf16"), "e8m4")
    expected = round_trip(raw * round_trip(WEIGHT, "bf16"), mine.formats["out"], first_row=3)
    assert_same_bits(norm(rules, place, x), expected)
    assert [rules.counters[Site(place, p)].rows_quantised for p in ("in", "raw", "weighted")] == [10, 10, 0]
    weighted = FakeQuant(VALUES, ["ffn_norm=acc=bf16", "ffn_norm.weighted=int8"])
    assert_same_bits(
        norm(weighted, place, x), round_trip(rms_norm_unit(x, "acc=bf16", weight=WEIGHT), "int8")
    )


def test_first_call_beside_a_unit():
    rules = FakeQuant(VALUES, ["*=acc=bf16", "norm[*]=bf16:first-call"])
    for place in NORMS[:2]:
        norm(rules, place, rows(3))
    assert [rules.rows_quantised(place) for place in NORMS[:2]] == [1, 0]


# ---------------------------------------------------------------- models


def test_variants_with_units_share_what_they_can_and_have_the_bits_of_their_own(model, executor):
    texts = [["ffn_norm[1]=acc=bf16"], ["*=x=bf16:stochastic;acc=f32"], ["output_norm=out=bf16"], ["*=x=f32"]]
    ids = np.random.default_rng(1).integers(3, 512, 23)
    variants = [FakeQuant(model.values, text) for text in texts]
    fork = Fork(model, 23, executor, batch=9)
    assert fork.first_node(variants[0]) > 0
    base, *logits = [x.copy() for x in fork.logits(ids, 0, variants)][: len(texts) + 1]
    for text, got in zip(texts, logits, strict=True):
        parts = [rows[: len(got)] for rows in [Context(model, 23, executor, text).eval(ids, slice(None))]]
        assert_same_bits(got, parts[0][: len(got)])
    assert_same_bits(logits[-1], base)
    assert not np.array_equal(logits[0], base)


def test_a_perplexity_with_units(model):
    tokens = [int(i) for i in np.random.default_rng(2).integers(3, 512, 300)]
    with Executor(2) as executor:
        run = Perplexity(
            model, tokens, n_ctx=64, fake_quant=FakeQuant(model.values, "*=acc=bf16"), executor=executor
        )
        list(run)
        assert run.result()["comparison"]["mean_kld"] > 0
        with pytest.raises(FqError, match="a unit's roundings do not fall anew"):
            Perplexity(
                model, tokens, n_ctx=64, fake_quant=FakeQuant(model.values, "*=acc=bf16"),
                executor=executor, realisations=3,
            )  # fmt: skip


def test_the_commands_say_how_norms_compute(path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words of a text. " * 60)
    unit = "ffn_norm=acc=bf16;order=tree"
    out, _ = fq(
        "perplexity", "-m", path, "-f", text, "-c", 32, "--norm-unit", unit, "--json", tmp_path / "a.json"
    )
    assert "rule: ffn_norm[*]=acc=bf16;order=tree" in out and "rows seen" not in out
    norms = json.loads((tmp_path / "a.json").read_text())["fake_quant"]["norms"]
    assert {n["kind"] for n in norms if n.get("unit") == "acc=bf16;order=tree"} == {"ffn_norm"}
    out, _ = fq("sites", "-m", path, "--norm-unit", unit, "--fake-quant", "ffn_norm[0]=bf16")
    row = next(line for line in out.splitlines() if line.startswith("ffn_norm[0].raw"))
    assert row.split() == ["ffn_norm[0].raw", "ffn_norm-0", "ffn_norm[0].raw=bf16", "acc=bf16;order=tree"]
    _, err = fq("sites", "-m", path, "--norm-unit", "*[99]=x=bf16", status=2)
    assert "error: --norm-unit: *[99]=x=bf16 matches no norm" in err
    out, _ = fq("sites", "-m", path)
    assert "unit" not in out.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ffn_norm=acc=x"], "--norm-unit: unit rule 'ffn_norm=acc=x': step acc: unknown format 'x'"),
        (["q_norm=acc=bf16"], "--norm-unit: q_norm[*]=acc=bf16 matches no norm"),
        (["*=out=f16", "--fake-quant", "*.weighted=f16"], "round the same value of attn_norm[0]"),
    ],
)
def test_errors_of_the_commands(path, options, message):
    _, err = fq("perplexity", "-m", path, "-c", 32, "--norm-unit", *options, status=2)
    assert message in err and "Traceback" not in err
