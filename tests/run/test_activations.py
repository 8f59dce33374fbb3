"""--activations ggml: inputs of matrix products rounded as ggml's CPU code does it."""

from __future__ import annotations

import ggml_oracle
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from fq import Context, FqError, Model, Perplexity
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq.gguf.types import GGML_TYPES
from fq.run.activations import ggml_format, round_as_ggml
from fq.run.weights import Weight, can_unpack, mul_mat
from fq_kernels import Executor
from fq_kernels.formats import get_format
from fq_kernels.rules import FakeQuant

# those that gguf-py packs, one of each kind of input and block
PACKED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
N_IN = 256


@pytest.mark.parametrize("type_", [t for t in GGML_TYPES.values() if can_unpack(t)], ids=lambda t: t.name)
def test_the_format_is_ggmls(type_):
    ggmls = GGML_TYPES[ggml_oracle.vec_dot_type(type_.id)].name
    ours = ggml_format(type_)
    assert (get_format(ours).name.upper() if ours else "F32") == ggmls


def inputs(n_tokens: int, seed: int) -> np.ndarray:
    """Rows with outliers, a mean, a block of zeros and one of a single number."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_tokens, N_IN), dtype=np.float32) * np.float32(np.exp(rng.uniform(-3, 3)))
    x += np.float32(rng.uniform(-2, 2))
    x[:, 7] *= 30
    x[0, 32:64] = 0
    x[-1, 64:96] = 1.5
    return x


@given(seed=seeds, n_tokens=st.sampled_from([1, 3, 8, 9, 40]))
@pytest.mark.parametrize("name", PACKED)
def test_products_are_ggmls(executor, name, seed, n_tokens):
    x = inputs(n_tokens, seed)
    w = np.random.default_rng(seed + 1).standard_normal((48, N_IN), dtype=np.float32) + np.float32(0.3)
    qtype = GGMLQuantizationType[name]
    packed = np.ascontiguousarray(quantize(w, qtype)).view(np.uint8).reshape(48, -1)
    weight = Weight(packed, GGML_TYPES[int(qtype)], N_IN)
    fmt = ggml_format(weight.type)
    rounded = x if fmt is None else round_as_ggml(x, fmt, np.empty_like(x), executor)
    ours = mul_mat(rounded, weight, executor, np.empty((n_tokens, 48), np.float32))
    exact = mul_mat(x, weight, executor, np.empty((n_tokens, 48), np.float32))
    ggmls = ggml_oracle.mul_mat(x, packed, weight.type.id)
    # adding in another order makes errors of this size, rounding to 8 bits much larger ones
    size = np.abs(x) @ np.abs(w).T
    tolerance = 2e-6 * size
    assert (np.abs(ours - ggmls) <= tolerance).all()
    if name.startswith("Q"):
        assert (np.abs(ours - exact) > tolerance).mean() > 0.5


def test_the_stored_sum_is_rounded_too(executor):
    """A weight with nothing but a minimum multiplies the sum that Q8_1 stores, a half-precision number."""
    x = inputs(9, 1)
    w = np.full((4, N_IN), 1.0, np.float32)
    packed = quantize(w, GGMLQuantizationType.Q4_1)
    weight = Weight(packed, GGML_TYPES[3], N_IN)
    rounded = round_as_ggml(x, "q8_1:nearest-even", np.empty_like(x), executor)
    ours = mul_mat(rounded, weight, executor, np.empty((9, 4), np.float32))
    ggmls = ggml_oracle.mul_mat(x, packed, 3)
    assert np.abs(ours - ggmls).max() <= 1e-6 * np.abs(x).sum(axis=1).max()
    assert np.abs(rounded.values.sum(axis=1) - ggmls[:, 0]).max() > 1e-5 * np.abs(x).sum(axis=1).max()


@pytest.fixture(scope="module")
def q4_1(tmp_path_factory):
    path = tmp_path_factory.mktemp("q4_1") / "q4_1.gguf"
    write_llama_gguf(path, tiny_shape(n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128), mix="Q4_1")
    return Model(path)


def test_float_weights_take_the_input_as_it_is(tiny, executor):
    exact, ggml = (Context(tiny, 16, executor, activations=a).eval([1, 2, 3, 4]) for a in ("exact", "ggml"))
    assert exact.tobytes() == ggml.tobytes()


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_bits_do_not_depend_on_threads(q4_1, n_tokens):
    logits = []
    for threads in (1, 2, 5):
        with Executor(threads) as executor:
            context = Context(q4_1, 64, executor, activations="ggml")
            logits += [
                context.eval(range(n_tokens), slice(None)).tobytes() for _ in range(2) if not context.clear()
            ]
    assert len(set(logits)) == 1


def test_the_baseline_can_be_exact(q4_1, executor):
    tokens = np.random.default_rng(0).integers(0, 512, 64)
    options = {"n_ctx": 32, "executor": executor}
    deployed = Perplexity(q4_1, tokens, activations="ggml", **options)
    both = Perplexity(q4_1, tokens, activations="ggml", baseline_activations="exact", control=True, **options)
    exact = Perplexity(q4_1, tokens, fake_quant=FakeQuant(q4_1.values, "ffn_norm=bf16"), **options)
    for run in (deployed, both, exact):
        assert list(run) == [0, 1]
    result = both.result()
    assert result["comparison"]["ppl_base"] == exact.result()["comparison"]["ppl_base"]
    assert result["ppl"] == result["comparison"]["ppl_quant"] == deployed.result()["ppl"]
    assert "comparison" not in deployed.result()
    assert result["control"]["exactly_zero"]
    # 8 bits for every product's input are more than the 8 bits of one norm's mantissa
    assert result["comparison"]["mean_kld"] > exact.result()["comparison"]["mean_kld"] > 0


def test_unknown_activations(tiny, executor):
    with pytest.raises(FqError, match="activations must be exact or ggml, not 'q8'"):
        Context(tiny, 16, executor, activations="q8")
    with pytest.raises(FqError, match="baseline activations must be exact or ggml, not 'q8'"):
        Perplexity(tiny, range(64), n_ctx=32, executor=executor, baseline_activations="q8")


def test_what_a_deployed_model_rounds(smollm2, executor):
    """llama.cpp's own: a mean KL of 2.8e-3 between the two numerics of SmolLM2 Q4_1, over 8 chunks."""
    tokens = smollm2.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))
    run = Perplexity(
        smollm2, tokens, chunks=2, chunk_order="first", activations="ggml", baseline_activations="exact",
        executor=executor,
    )  # fmt: skip
    assert list(run) == [0, 1]
    assert run.result()["comparison"]["mean_kld"] == pytest.approx(2.8e-3, rel=0.25)
