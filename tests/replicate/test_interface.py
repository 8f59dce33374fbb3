"""The original report's global interface, against what its patch does (its section 2)."""

from __future__ import annotations

import pytest

from fq import Context, FqError, Model
from fq.gguf.synthetic import tiny_shape, write_llama_gguf
from fq.replicate import interface as report
from fq_kernels import Executor
from fq_kernels.rules import Place


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """TinyLlama's 22 layers, thin ones."""
    path = tmp_path_factory.mktemp("deep") / "deep.gguf"
    shape = tiny_shape(n_layer=22, n_embd=32, n_head=2, n_head_kv=1, n_ff=48, n_vocab=512, n_ctx_train=128)
    write_llama_gguf(path, shape, mix="F32")
    return Model(path)


@pytest.fixture
def context(deep, executor):
    context = Context(deep, 128, executor, "*=f16")
    report.set_default_context(context)
    yield context
    report.set_default_context(None)


def evaluate(context):
    """A prompt of 3 tokens and 4 decoded, as in the counting experiment."""
    context.clear()
    context.eval([1, 2, 3])
    for token in (4, 5, 6, 7):
        context.eval([token])


def counts():
    return report.global_call_count(), report.total_quantizations()


def test_the_experiments_counts(context):
    report.set_global_params(True, 30, -1)
    evaluate(context)
    assert counts() == (306, 22)
    assert [report.call_count(i) for i in range(22)] == [14] * 21 + [12]
    evaluate(context)  # the flags stay set
    assert counts() == (612, 22)
    report.set_global_params(True, "bf16", 5)
    assert counts() == (0, 0) and report.call_count(5) == 0
    evaluate(context)
    assert counts() == (306, 1)
    # the row of the attention norm, never the FFN norm's
    assert context.fake_quant.rows_quantised(Place("attn_norm", 5)) == 1
    assert context.fake_quant.rows_quantised(Place("ffn_norm", 5)) == 0


def test_disabled_rounds_and_counts_nothing(context, deep, executor):
    plain = Context(deep, 128, executor).eval([1, 2, 3])
    assert context.eval([1, 2, 3]).tobytes() == plain.tobytes()  # the default context's own rules are gone
    for params in [(True, 1, -1), (False, 0, -1)]:
        report.set_global_params(*params)
        context.clear()
        assert (context.eval([1, 2, 3]).tobytes() == plain.tobytes()) != params[0]
    assert counts() == (0, 0) and report.call_count(0) == 0


def test_the_type_is_acted_on(context):
    logits = []
    for number, name in [(30, "bf16"), (1, "F16")]:
        for type_ in (number, name):
            report.set_global_params(True, type_)
            context.clear()
            logits.append(context.eval([1, 2, 3]).tobytes())
    assert logits[0] == logits[1] != logits[2] == logits[3]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ((True, 16), "ggml type 16 is IQ2_XXS, not a format to round to; BF16 is 30"),
        ((True, 4), "there is no ggml type 4; BF16 is 30"),
        ((True, "bf15"), "unknown format 'bf15'"),
        ((True, 30, 22), "matches no site; there are inp_embd, attn_norm"),
        ((True, 30, -2), "layer must be a layer number"),
    ],
)
def test_bad_params_change_nothing(context, params, message):
    report.set_global_params(True, 30)
    evaluate(context)
    with pytest.raises(FqError, match=message):
        report.set_global_params(*params)
    assert counts() == (306, 22)
    with pytest.raises(FqError, match="the model has no layer 22"):
        report.call_count(22)


def test_without_a_default_context(context):
    report.set_global_params(True, 30)
    evaluate(context)
    report.set_default_context(None)
    assert counts() == (0, 0)
    with pytest.raises(FqError, match="no default context"):
        report.set_global_params(True, 30, -1)


def test_other_contexts_know_nothing_of_it(context, deep):
    with Executor(1) as executor:
        other = Context(deep, 128, executor)
        report.set_global_params(True, 30)
        other.eval([1, 2, 3])
    assert counts() == (0, 0) and other.fake_quant.matched == []
