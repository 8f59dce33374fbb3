"""Sites that are no norm's, and what a norm reads: against a float64 model, held against it at each."""

from __future__ import annotations

import os

import numpy as np
import pytest
from held_reference import Recorder, hold

from fq import Context, Executor, FakeQuant, FqError, Model, Perplexity, Sweep, cells_of
from fq.gguf.synthetic import tiny_shape, write_llama_gguf
from fq.run.trace import Trace
from fq_kernels import round_trip
from fq_kernels.rules import Place, Rule

# As test_runner's: largest |difference| over the largest |value|.
RTOL = 5e-6
N_TOKENS, N_HEAD, N_HEAD_KV = 24, 4, 2
ROWS = {"q": N_HEAD, "k": N_HEAD_KV, "v": N_HEAD_KV}  # of a token; else one
KINDS = ["inp_embd", "q_proj", "k_proj", "v_proj", "q", "k", "v", "kqv_out", "attn_out", "ffn_inp"]
KINDS += ["ffn_gate", "ffn_up", "ffn_act", "ffn_out", "l_out"]
ALL = slice(None)
RULES = {
    "the residual stream": ["l_out[*]=bf16", "ffn_inp[*]=bf16"],
    "the KV cache": ["k[*]=fp8_e4m3", "v[*]=fp8_e4m3"],
    "every activation": ["activation=bf16"],
    "what norms read": ["*.in=bf16"],
    "norms and values": ["*=bf16", "ffn_norm.in=f16", "ffn_act=bf16", "attn_norm[1].weighted=f16"],
} | {kind: [f"{kind}=bf16"] for kind in KINDS}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sites") / "tiny.gguf"
    shape = tiny_shape(
        n_layer=3, n_embd=64, n_head=N_HEAD, n_head_kv=N_HEAD_KV, n_ff=96, n_vocab=512, n_ctx_train=128
    )
    write_llama_gguf(path, shape, mix="F32")
    return path


@pytest.fixture(scope="module")
def model(path):
    return Model(path)


@pytest.fixture(scope="module")
def tokens():
    return [int(i) for i in np.random.default_rng(1).integers(3, 512, N_TOKENS)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_path_is_that_of_a_float64_model(path, model, tokens, rules, threads):
    with Executor(threads) as executor:
        hold(path, model, tokens, rules, executor, RTOL)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_counted_by_tokens_and_heads(model, tokens, kind):
    """In batches, and in the last layer, where some values have only the rows whose logits are wanted."""
    fake_quant = FakeQuant(model.values, f"{kind}=bf16")
    with Executor(2) as executor:
        context = Context(model, 128, executor, fake_quant)
        context.eval(tokens[:20])
        context.eval(tokens[20:])
    after_attention = ("ffn_inp", "ffn_gate", "ffn_up", "ffn_act", "ffn_out", "l_out")
    for counter in fake_quant.matched:
        layer = counter.site.place.layer
        n_tokens = 2 if layer == 2 and kind in after_attention else N_TOKENS
        rows = n_tokens * ROWS.get(kind, 1)
        n = {"q": 16, "k": 16, "v": 16, "k_proj": 32, "v_proj": 32}.get(kind, 64)
        n = 96 if kind in ("ffn_gate", "ffn_up", "ffn_act") else n
        assert (counter.rows_seen, counter.rows_quantised) == (rows, rows)
        assert counter.elements == rows * n and 0 < counter.changed <= counter.elements
    assert len(fake_quant.matched) == (1 if kind == "inp_embd" else 3)


def test_a_head_is_a_row(model, tokens):
    """A scale for each head of k, for each token of k_proj."""
    x = np.random.default_rng(0).standard_normal((5, N_HEAD_KV * 16)).astype(np.float32)
    for kind, n in (("k", 16), ("k_proj", 32)):
        fake_quant = FakeQuant(model.values, f"{kind}[1]=int8")
        values = [v for v in model.values if v.place == Place(kind, 1)]
        found = x.copy().reshape(5, -1, 16) if kind == "k" else x.copy()
        fake_quant.round(values, found)
        expected = round_trip(x.reshape(-1, n), "int8")
        assert found.tobytes() == expected.tobytes()


def test_first_call_takes_the_first_row_alone(model, tokens):
    fake_quant = Recorder(model.values, "k=bf16:first-call")
    with Executor(2) as executor:
        Context(model, 128, executor, fake_quant).eval(tokens)
    for counter in fake_quant.matched:
        before, after = fake_quant.seen[counter.site.place]
        assert (counter.rows_seen, counter.rows_quantised) == (N_TOKENS * N_HEAD_KV, 1)
        changed = (before != after).reshape(-1, 16).any(axis=1)
        assert changed[0] and not changed[1:].any()


def test_what_a_norm_reads_is_rounded_and_the_residual_is_not(model, tokens):
    fake_quant = Recorder(model.values, ["ffn_norm[0].in=bf16", "ffn_inp[0]=f16"])
    with Executor(2) as executor:
        context = Context(model, 128, executor, fake_quant)
        context.eval(tokens)
    _, residual = fake_quant.seen[Place("ffn_inp", 0)]
    assert fake_quant.read[Place("ffn_norm", 0)].tobytes() == residual.tobytes()
    (of_norm,) = (c for c in fake_quant.matched if c.site.point == "in")
    assert of_norm.rows_quantised == N_TOKENS and of_norm.changed > 0


def test_each_site_draws_numbers_of_its_own(model):
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    results = []
    for kind in ("l_out", "ffn_inp", "attn_out"):
        for layer in (0, 1):
            values = [v for v in model.values if v.place == Place(kind, layer)]
            found = x.copy()
            FakeQuant(model.values, "activation=bf16:stochastic,seed=1").round(values, found)
            results.append(found.tobytes())
    assert len(set(results)) == len(results)


CELLS = ["l_out", "k", "ffn_act[1]", "ffn_norm[0].in", "v_proj", "inp_embd"]


@pytest.mark.parametrize("batch", [512, 10])
def test_a_sweep_is_perplexity_to_the_last_bit(model, batch):
    """Each cell by itself and all of a kind together; the control is exactly 0."""
    text = np.random.default_rng(5).integers(3, 512, 100)
    cells = cells_of(model, CELLS, ["bf16", "fp8_e4m3"])
    options = {"n_ctx": 32, "chunks": 2, "batch": batch}
    with Executor(2) as executor:
        sweep = Sweep(model, text, cells, executor=executor, **options)
        for _ in sweep:
            pass
        found = sweep.result()
        assert found["cells"][0]["exactly_zero"]
        for cell in found["cells"][1:]:
            fake_quant = FakeQuant(model.values, cell["rules"])
            # with a trace it is evaluated by itself
            with Trace(os.devnull, {}) as trace:
                run = Perplexity(
                    model, text, fake_quant=fake_quant, executor=executor, trace=trace, **options
                )
                for _ in run:
                    pass
            result = run.result()
            assert cell["comparison"] == result["comparison"], cell["name"]
            for site, other in zip(cell["sites"], result["fake_quant"]["sites"], strict=True):
                assert {k: site[k] for k in ("rows_seen", "rows_quantised", "changed", "max_abs_error")} == {
                    k: other[k] for k in ("rows_seen", "rows_quantised", "changed", "max_abs_error")
                }
    kinds = [entry["sites"][0]["kind"] for entry in found["cells"] if entry["kind"] == "single"]
    assert kinds.count("l_out") == 6 and kinds.count("inp_embd") == 2


def test_activation_is_every_value_once(model):
    taken = {c.site.place.kind for c in FakeQuant(model.values, "activation=bf16").matched}
    assert taken == set(KINDS) - {"v_proj"}  # which v has
    assert all(c.site.point == "raw" for c in FakeQuant(model.values, "*=bf16").matched)
    assert {c.site.place.kind for c in FakeQuant(model.values, "norm=bf16").matched} == {
        "attn_norm",
        "ffn_norm",
    }


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("mlp_out=bf16", "matches no site; there are inp_embd, attn_norm.0-2., q_proj.0-2., k_proj.0-2."),
        ("l_out[3]=bf16", "matches no site"),
        ("q_norm=bf16", "matches no site"),
        ("l_out.raw=bf16", "norms alone have points, and l_out is none"),
        ("activation.in=bf16", "norms alone have points"),
    ],
)
def test_a_rule_for_what_there_is_not(model, rule, said):
    with Executor(1) as executor, pytest.raises(FqError, match=said):
        Context(model, 8, executor, rule)


def test_a_rule_as_text():
    assert str(Rule.parse("k[*]=fp8_e4m3")) == "k[*]=fp8_e4m3fn"
    assert str(Rule.parse("ffn_norm[2].in=bf16")) == "ffn_norm[2].in=bf16"
    for text in ("inp_embd=bf16", "activation[0-2]=int8:group=16", "l_out=bf16:first-call"):
        assert Rule.parse(str(Rule.parse(text))) == Rule.parse(text)
