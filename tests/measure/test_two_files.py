"""One file's logits beside another's: figures of two files of one vocabulary."""

from __future__ import annotations

import json

import numpy as np
import pytest
from changed_models import rewrite
from command_line import fq

from fq import Context, Executor, FakeQuant, FqError, Model, NotFiniteError, Perplexity
from fq.measure.statistics import compare
from fq.run.finite import in_batches

N_CTX = 64


def shown(*arguments, status=0):
    out, _ = fq("perplexity", "-c", N_CTX, "--chunks", 4, *arguments, "--json", "-", status=status)
    return json.loads(out)


def test_a_file_and_its_twin_are_the_same(packed_path, twin_path):
    data = shown("-m", packed_path, "--base-model", twin_path, "--control")
    c = data["comparison"]
    assert (c["mean_kld"], c["max_kld"], c["ln_ppl_ratio"], c["same_top"]) == (0, 0, 0, 1)
    assert data["base_model"] == str(twin_path) and data["control"]["exactly_zero"]


def test_another_file_is_token_by_token_what_two_contexts_say(packed_path, tiny_path, executor):
    model, other = Model(packed_path), Model(tiny_path)
    tokens = np.arange(4 * N_CTX) % model.hparams.n_vocab
    run = Perplexity(model, tokens, base_model=other, executor=executor, n_ctx=N_CTX, chunk_order="first")
    for _ in run:
        pass
    first = run.settings.first_scored
    for position, paired in enumerate(run.paired):
        ids, targets = run.text[position]
        logits = []
        for one in (other, model):
            context = Context(one, N_CTX, executor)
            logits.append(np.concatenate([context.eval(p, o) for p, o in in_batches(ids[:-1], first, 512)]))
        expected = compare(*logits, targets, executor)
        for name, values in vars(expected).items():
            assert np.array_equal(values, getattr(paired, name)), name
    assert run.result()["comparison"]["mean_kld"] > 0


def test_the_baselines_file_is_not_written_over(packed_path, twin_path):
    before = twin_path.read_bytes()
    options = ["-c", N_CTX, "--chunks", 1, "--json", twin_path]
    _, err = fq("perplexity", "-m", packed_path, "--base-model", twin_path, *options, status=2)
    assert "is the baseline's model" in err and twin_path.read_bytes() == before


def test_rules_on_either_side(packed_path, twin_path):
    rule = "ffn_norm=bf16:stochastic"
    plain = shown("-m", packed_path, "--fake-quant", rule)["comparison"]
    of_stream = shown("-m", packed_path, "--base-model", twin_path, "--fake-quant", rule)
    assert of_stream["comparison"] == plain and "base_fake_quant" not in of_stream
    both = ["--fake-quant", rule, "--base-fake-quant", rule]
    data = shown("-m", packed_path, "--base-model", twin_path, *both, "--control")
    assert data["comparison"]["max_kld"] == 0 and data["control"]["exactly_zero"]
    assert data["base_fake_quant"]["sites"] == data["fake_quant"]["sites"]
    # of the baseline alone: without another file too
    data = shown("-m", packed_path, "--base-fake-quant", rule)["comparison"]
    assert data["ppl_quant"] == plain["ppl_base"] and data["ppl_base"] == plain["ppl_quant"]
    assert data["ln_ppl_ratio"] == pytest.approx(-plain["ln_ppl_ratio"])


def test_activations_of_each(packed_path, twin_path):
    ggml = shown("-m", packed_path, "--activations", "ggml", "--baseline-activations", "exact")["comparison"]
    options = ["--base-model", twin_path, "--activations", "ggml", "--baseline-activations", "exact"]
    assert shown("-m", packed_path, *options)["comparison"] == ggml


def test_a_baseline_that_is_lost_is_named(packed_path, twin_path, tmp_path, executor):
    path = tmp_path / "nan.gguf"
    rewrite(twin_path, path, change=lambda name, x: x * np.nan if name == "output_norm.weight" else x)
    model, nan = Model(packed_path), Model(path)
    tokens = np.arange(4 * N_CTX) % model.hparams.n_vocab
    with pytest.raises(NotFiniteError, match="result_norm"):
        list(Perplexity(model, tokens, base_model=nan, executor=executor, n_ctx=N_CTX))
    run = Perplexity(nan, tokens, base_model=model, executor=executor, n_ctx=N_CTX)
    list(run)
    assert run.not_finite[0]["node"] == "result_norm"


def test_other_vocabularies(packed_path, twin_path, tmp_path, executor):
    path = tmp_path / "other.gguf"
    rewrite(twin_path, path, tokens=lambda tokens: [*tokens[:-1], "another"])
    _, err = fq("perplexity", "-m", packed_path, "--base-model", path, "-c", N_CTX, status=2)
    assert "have other vocabularies: token " in err and "and 'another'" in err
    model = Model(packed_path)
    with pytest.raises(FqError, match="a baseline of its own needs the baseline"):
        Perplexity(model, [1] * 99, base_model=model, baseline=False, executor=executor, n_ctx=N_CTX)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base-fake-quant", "mlp=bf16"], "--base-fake-quant: "),
        (["--base-fake-quant", "ffn_norm=bf16", "--no-baseline"], "--base-fake-quant needs the baseline"),
        (["--base-model", "MODEL", "--no-baseline"], "--base-model needs the baseline"),
        (["--base-model", "MODEL", "--trace", "t.json"], "--trace is of one model"),
        (["--base-model", "none.gguf"], "none.gguf"),
    ],
)
def test_bad_requests(tiny_path, options, words):
    options = [tiny_path if one == "MODEL" else one for one in options]
    _, err = fq("perplexity", "-m", tiny_path, "-c", N_CTX, "--chunks", 1, *options, status=2)
    assert words in err


def test_the_memory_of_both_is_let_go_of(packed_path, twin_path):
    """Counters of an interrupted chunk are taken back on either side."""
    model, twin = Model(packed_path), Model(twin_path)
    rules = FakeQuant(model.values, ["ffn_norm=bf16"]), FakeQuant(twin.values, ["ffn_norm=bf16"])
    tokens = np.arange(4 * N_CTX) % model.hparams.n_vocab
    with Executor(1) as executor:
        run = Perplexity(
            model,
            tokens,
            base_model=twin,
            fake_quant=rules[0],
            base_fake_quant=rules[1],
            executor=executor,
            n_ctx=N_CTX,
        )
        going = iter(run)
        next(going)
        seen = [[c.rows_quantised for c in one.matched] for one in rules]
        assert seen[0] == seen[1] and min(seen[0]) > 0
        steps = []

        def stop():
            steps.append(1)
            if len(steps) > 3:
                raise KeyboardInterrupt

        run.on_step = stop
        with pytest.raises(KeyboardInterrupt):
            next(going)
    assert [[c.rows_quantised for c in one.matched] for one in rules] == seen
