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
from fq.gguf.synthetic import tiny_shape, write_llama_gguf
from fq.run.fork import Fork
from fq_kernels import NormUnit, bf16_to_float, float_to_bf16, rms_norm_unit, round_trip
from fq_kernels.rules import FakeQuant, Place, Site
from fq_kernels.units import PROFILES, describe_profiles, profile_rules

KINDS = {"inp_embd", "ffn_inp", "l_out", "k"}
F32 = np.float32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("profiles") / "tiny.gguf"
    write_llama_gguf(
        path, tiny_shape(n_layer=3, n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128), mix="Q8_0"
    )
    return path


@pytest.fixture(scope="module")
def model(path):
    return Model(path)


IDS = np.random.default_rng(1).integers(3, 512, 23)


def bf16(x: np.ndarray) -> np.ndarray:
    return round_trip(np.ascontiguousarray(x, F32), "bf16")


def rows(n: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((n, 64)).astype(F32), bf16(rng.uniform(0.5, 2, 64))


def unit_of(spec: str, plus_one: bool = False) -> NormUnit:
    return NormUnit.parse(profile_rules(spec, KINDS, plus_one=plus_one)[-1].partition("=")[2])


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_a_unit_and_its_residual(name, plus_one):
    rules = profile_rules(f"{name}:f16", KINDS, plus_one=plus_one)
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


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_gemmas_files_hold_one_plus_w(tmp_path, architecture):
    rules = Model(write_tiny(tmp_path / "a.gguf", TINY[architecture])).profile_rules("hf")
    assert ("gain=1+w" in rules[-1]) == (architecture == "gemma3")
    assert rules[:3] == ["inp_embd[*]=bf16", "ffn_inp[*]=bf16", "l_out[*]=bf16"]


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


# ---------------------------------------------------------------- commands


def test_the_commands(path, tmp_path):
    out, _ = fq("profiles")
    assert "aiter-bf16  bf16       bf16    bf16" in out and "on Gemma" in out and "norm.cuh" in out
    assert json.loads(fq("profiles", "--type", "f16", "--json")[0])[1]["residual"] == "f16"
    text = tmp_path / "text.txt"
    text.write_text("Some words of a text. " * 60)
    out, _ = fq(
        "perplexity", "-m", path, "-f", text, "-c", 32, "--profile", "vllm", "--norm-unit", "*=rsqrt=lut=4"
    )
    assert "rule: l_out[*]=bf16" in out and "rule: *[*]=rsqrt=lut=4" in out
    out, _ = fq("perplexity", "-m", path, "-f", text, "-c", 32, "--profile", "ggml")
    assert "mean KL divergence      0.000e+00" in out
    assert "unknown profile 'x'" in fq("perplexity", "-m", path, "-c", 32, "--profile", "x", status=2)[1]
