"""Profiles: what they make of a model's norms and residual, and the residual that a norm reads unrounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import fq
from strategies import assert_same_bits
from tiny_models import TINY, write_tiny

from fq import Context, FqError, Model
from fq.run.finite import first_not_finite
from fq.run.fork import Fork
from fq.run.trace import Trace
from fq_kernels import NormUnit, bf16_to_float, float_to_bf16, rms_norm_unit, round_trip
from fq_kernels.rules import FakeQuant, Place, Site
from fq_kernels.units.profiles import NORMS, PROFILES, describe_profiles, profile_rules

KINDS = {"inp_embd", "ffn_inp", "l_out", "k"}
F32 = np.float32


IDS = np.random.default_rng(1).integers(3, 512, 23)


def bf16(x: np.ndarray) -> np.ndarray:
    return round_trip(np.ascontiguousarray(x, F32), "bf16")


def rows(n: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((n, 64)).astype(F32), bf16(rng.uniform(0.5, 2, 64))


def unit_of(spec: str, plus_one: bool = False) -> NormUnit:
    rules = profile_rules(spec, KINDS, norms="gemma" if plus_one else "llama")
    return NormUnit.parse(rules[-1].partition("=")[2])


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_a_unit_and_its_residual(name, norms):
    rules = profile_rules(f"{name}:f16", KINDS, norms=norms)
    unit = rules[-1].partition("=")[2]
    assert str(NormUnit.parse(unit)) == unit and "DTYPE" not in str(describe_profiles())
    residual = [f"{kind}[*]=f16" for kind in ("inp_embd", "ffn_inp", "l_out")]
    assert rules[:-1] == (residual if PROFILES[name].residual else [])
    assert PROFILES[name].source.count("/") >= 2, "repository and file"


def test_llamas_norm_casts_before_the_weight_and_gemmas_after_one_plus_it():
    x, weight = rows()
    read = bf16(x)
    squares = np.square(read).astype(np.float64).mean(axis=1, keepdims=True)
    normed = read / np.sqrt(squares + 1e-5).astype(F32)
    for got, expected in (
        (rms_norm_unit(x, unit_of("hf"), weight=weight), bf16(bf16(normed) * weight)),
        (rms_norm_unit(x, unit_of("hf", True), weight=F32(1) + weight), bf16(normed * (F32(1) + weight))),
        (rms_norm_unit(x, unit_of("te"), weight=weight), bf16(normed * weight)),
    ):
        # the sum's order apart
        assert (got != expected).mean() < 0.01 and np.allclose(got, expected, rtol=2**-7)
    assert (
        rms_norm_unit(x, unit_of("hf"), weight=weight) != rms_norm_unit(x, unit_of("te"), weight=weight)
    ).any()


GOLDEN = json.loads(Path(__file__).with_name("hf_torch.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['n']}")
def test_hf_is_what_torch_gave(isa, case):
    """Written by `python -m bench.torch_norms --golden`."""
    rng, n = np.random.default_rng(case["seed"]), case["n"]
    x = rng.integers(-(1 << 20), 1 << 20, (2, n)).astype(F32) * F32(2.0**-17)
    weight = bf16_to_float(rng.integers(0x3E80, 0x4040, n).astype(np.uint16))
    y = rms_norm_unit(x, unit_of("hf", case["plus_one"]), eps=case["eps"], weight=weight)
    assert float_to_bf16(y).tobytes().hex() == case["out"]


def test_profiles_that_there_are_not(model):
    with pytest.raises(FqError, match="unknown profile 'torch'; there are ggml, hf"):
        model.profile_rules("torch")
    with pytest.raises(FqError, match="profile 'hf:fp8': the type must be bf16 or f16"):
        model.profile_rules("hf:fp8")


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [
        ("llama", "raw=bf16;weight=bf16;out=bf16"),
        ("gemma3", "weight=bf16;gain=1+w;out=bf16"),
        ("olmo2", "weight=bf16;out=bf16"),
    ],
)
def test_each_architecture_has_its_norms(tmp_path, architecture, norm):
    model = Model(write_tiny(tmp_path / "a.gguf", TINY[architecture]))
    rules = model.profile_rules("hf")
    assert rules[3] == f"*[*]=x=bf16;acc=f32;order=torch;{norm}"
    assert rules[:3] == ["inp_embd[*]=bf16", "ffn_inp[*]=bf16", "l_out[*]=bf16"]
    last = model.hparams.n_layer - 1
    fused = [f"ffn_norm[0-{last}]", f"attn_norm[1-{last}]", "output_norm"]
    found = model.profile_rules("flashinfer")
    assert found[4:] == [f"{sites}=x=unrounded" for sites in fused[2 * (architecture == "olmo2") :]]
    assert "x=bf16" in found[3]


def test_ggmls_profile_changes_nothing(model, executor):
    logits = Context(model, 23, executor).eval(IDS, slice(None)).copy()
    assert_same_bits(Context(model, 23, executor, model.profile_rules("ggml")).eval(IDS, slice(None)), logits)


# ---------------------------------------------------------------- a residual read unrounded


class Spy(FakeQuant):
    """Keeps what norms read and what they give."""

    def __init__(self, values, rules):
        super().__init__(values, rules)
        self.seen = {}

    def rms_norm(self, norm, x, **how):
        read = x.copy()
        out = super().rms_norm(norm, x, **how)
        self.seen[norm] = read, out.copy()
        return out

    def round(self, values, x, executor=None):
        before = x.copy()
        super().round(values, x, executor)
        self.seen[values[0].place] = before, x.copy()


@pytest.mark.parametrize("kind", ["inp_embd", "ffn_inp", "l_out"])
def test_a_norm_reads_the_residual_before_it_is_rounded(model, executor, kind):
    reader = {
        "inp_embd": Place("attn_norm", 0),
        "ffn_inp": Place("ffn_norm", 1),
        "l_out": Place("attn_norm", 2),
    }[kind]
    source = Place(kind, {"inp_embd": None, "ffn_inp": 1, "l_out": 1}[kind])
    seen = {}
    for x in ("f32", "unrounded"):
        spy = Spy(model.values, [f"{kind}[*]=e8m3", f"*=x={x};acc=f64"])
        Context(model, 23, executor, spy).eval(IDS, slice(None))
        before, after = spy.seen[source]
        read, _ = spy.seen[reader]
        assert_same_bits(after, round_trip(before, "e8m3"))
        assert_same_bits(read, before if x == "unrounded" else after)
        assert spy.counters[Site(source)].rows_quantised == 23, "counted once"
        seen[x] = after
    if kind == "l_out":
        assert not np.array_equal(seen["f32"], seen["unrounded"])


def test_shared_or_alone_the_bits_are_the_same(model, executor):
    rules = ["l_out[1]=e8m3", "attn_norm[2]=x=unrounded"]
    alone = Context(model, 23, executor, rules).eval(IDS, slice(None)).copy()
    fork = Fork(model, 23, executor, batch=9)
    blocks = [x.copy() for x in fork.logits(IDS, 0, [FakeQuant(model.values, rules)])]
    assert_same_bits(np.concatenate(blocks[1::2]), alone)
    assert not np.array_equal(np.concatenate(blocks[0::2]), alone)


def test_a_trace_and_what_is_not_finite_know_of_it(model, executor, tmp_path):
    rules = FakeQuant(model.values, ["l_out[1]=e2m3ieee", "attn_norm[2]=x=unrounded"])
    file = tmp_path / "trace.json"
    with Trace(file, {}) as trace:
        Context(model, 23, executor, rules, trace).eval(IDS, slice(None))
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e["name"] == "attn_norm-2"]
    assert {"site": "l_out[1]", "format": "e2m3ieee", "rows_rounded": 23} in events[0]["args"]["sites"]
    wild = FakeQuant(model.values, ["l_out[1]=e2m3:no-saturate", "attn_norm[2]=x=unrounded"])
    context = Context(model, 23, executor, wild)
    assert not np.isfinite(context.eval(IDS, slice(None))).all()
    assert first_not_finite(model, [(IDS, slice(None))], executor, wild)["node"] == "l_out-1"


# ---------------------------------------------------------------- commands


def test_the_commands(path, tmp_path):
    out, _ = fq("profiles")
    words = " ".join(out.split())
    assert (
        "aiter-bf16 bf16 bf16 bf16 chunk=8,f32" in words and "on gemma x acc" in words and "norm.cuh" in words
    )
    assert "on olmo2 x acc order weight out residual hf bf16 f32 torch bf16 bf16 bf16 " in words
    assert json.loads(fq("profiles", "--type", "f16", "--json")[0])["profiles"][1]["residual"] == "f16"
    text = tmp_path / "text.txt"
    text.write_text("Some words of a text. " * 60)
    out, _ = fq(
        "perplexity", "-m", path, "-f", text, "-c", 32, "--profile", "vllm", "--norm-unit", "*=rsqrt=lut=4"
    )
    assert "rule: l_out[*]=bf16" in out and "rule: *[*]=rsqrt=lut=4" in out
    out, _ = fq("perplexity", "-m", path, "-f", text, "-c", 32, "--profile", "ggml")
    assert "mean KL divergence      0.000e+00" in out
    assert "unknown profile 'x'" in fq("perplexity", "-m", path, "-c", 32, "--profile", "x", status=2)[1]
