"""The measurement: which tokens are scored, on what context, what is counted, and known figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fq import Context, FqError, Perplexity, Sampler
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.chunks import first_scored, n_scored_per_chunk
from fq.run.generation import generate
from fq_kernels.rules import FakeQuant, Rule

N_CTX = 32
CHUNKS = 3
BOS = 1


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))


def rules(model, *, kind="ffn_norm", **options):
    return FakeQuant(model.values, [Rule("bf16", kind=kind, **options)])


def finished(model, tokens, executor, **options):
    run = Perplexity(model, tokens, executor=executor, **({"n_ctx": N_CTX, "chunks": CHUNKS} | options))
    assert list(run) == list(range(run.n_chunks))
    return run


def independent_nll(model, tokens, chunk, executor, fake_quant=None):
    """nll of the scored tokens of a chunk, from the logits of all that predict one."""
    ids = list(tokens[chunk * N_CTX : (chunk + 1) * N_CTX])
    context = Context(model, N_CTX, executor, fake_quant)
    logits = context.eval([BOS, *ids[1:-1]], slice(None)).astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.array([-math.log(p[i, ids[i + 1]]) for i in range(N_CTX // 2, N_CTX - 1)])


def test_it_equals_an_independent_computation(tiny, tokens, executor):
    run = finished(tiny, tokens, executor)
    want = [independent_nll(tiny, tokens, i, executor) for i in run.text.indices]
    for got, nll in zip(run.nll, want, strict=True):
        np.testing.assert_allclose(got, nll, rtol=1e-5)
    result = run.result()
    all_ = np.concatenate(want)
    assert result["n_scored"] == len(all_) == CHUNKS * (N_CTX // 2 - 1)
    assert result["ppl"] == run.ppl == pytest.approx(math.exp(all_.mean()), rel=1e-5)
    assert result["ppl_se"] == pytest.approx(run.ppl * all_.std(ddof=1) / math.sqrt(len(all_)), rel=1e-4)
    for i, chunk in enumerate(result["chunks"]):
        so_far = np.concatenate(want[: i + 1])
        assert chunk["index"] == run.text.indices[i]
        assert chunk["nll"] == pytest.approx(want[i].mean(), rel=1e-5)
        assert chunk["ppl_cumulative"] == pytest.approx(math.exp(so_far.mean()), rel=1e-5)


def test_the_rules_are_in_the_quantised_stream_alone(tiny, tokens, executor):
    run = finished(tiny, tokens, executor, fake_quant=rules(tiny))
    for i, (index, paired) in enumerate(zip(run.text.indices, run.paired, strict=True)):
        plain = independent_nll(tiny, tokens, index, executor)
        rounded = independent_nll(tiny, tokens, index, executor, rules(tiny))
        np.testing.assert_allclose(paired.nll_base, plain, rtol=1e-5)
        np.testing.assert_allclose(paired.nll, rounded, rtol=1e-4)
        assert (paired.nll != paired.nll_base).all()
        assert (run.nll[i] == paired.nll).all()


def test_bos_takes_the_place_of_a_chunks_first_token(tiny, tokens, executor):
    """What the first token was is not seen, and it is BOS itself that is evaluated."""
    seen = []
    run = Perplexity(tiny, tokens, n_ctx=N_CTX, chunks=2, chunk_order="first", executor=executor)
    evaluate = run.context.evaluate
    run.context.evaluate = lambda *args: seen.append(tuple(args[2])) or evaluate(*args)
    assert list(run) == [0, 1]
    seen = list(dict.fromkeys(seen))  # once for each layer
    assert [ids[0] for ids in seen] == [BOS, BOS]
    assert list(seen[1][1:]) == list(tokens[N_CTX + 1 : 2 * N_CTX - 1])
    # the caller's own array is left alone
    assert tokens[N_CTX] != BOS and run.tokens[N_CTX] == tokens[N_CTX]


def test_without_bos_the_first_token_stays(tiny, tokens, executor, monkeypatch):
    with_bos = finished(tiny, tokens, executor, chunks=2, chunk_order="first").nll
    monkeypatch.setattr(tiny.tokenizer, "add_bos", False)
    without = finished(tiny, tokens, executor, chunks=2, chunk_order="first").nll
    assert (without[0] == with_bos[0]).all()  # the text itself starts with BOS
    assert (without[1] != with_bos[1]).any()


@pytest.mark.parametrize("spec", ["bf16", "int8:tensor"])
@pytest.mark.parametrize("batch", [1, 7, N_CTX // 2, N_CTX - 1, N_CTX, 5 * N_CTX])
def test_the_batch_size_changes_neither_figures_nor_counts(tiny, tokens, executor, batch, spec):
    def of(**settings):
        rounded = FakeQuant(tiny.values, [Rule(spec, kind="all")])
        return finished(tiny, tokens, executor, chunks=2, fake_quant=rounded, **settings).result()

    assert of(batch=batch) == of()


def test_rows_seen(tiny, tokens, executor):
    """The chunk's last token predicts nothing; the last layer keeps the scored rows after attention."""
    run = finished(tiny, tokens, executor, fake_quant=rules(tiny, layer=0))
    all_rows, scored = CHUNKS * (N_CTX - 1), CHUNKS * n_scored_per_chunk(N_CTX)
    got = {
        (n["kind"], n["layer"]): (n["rows_seen"], n["rows_quantised"])
        for n in run.result()["fake_quant"]["norms"]
    }
    assert got == {
        ("attn_norm", 0): (all_rows, 0),
        ("ffn_norm", 0): (all_rows, all_rows),
        ("attn_norm", 1): (all_rows, 0),
        ("ffn_norm", 1): (scored, 0),
        ("output_norm", None): (scored, 0),
    }
    [site] = run.result()["fake_quant"]["sites"]
    assert (site["kind"], site["layer"], site["point"], site["format"]) == ("ffn_norm", 0, "raw", "bf16")
    assert site["elements"] == all_rows * tiny.hparams.n_embd


def test_first_call_rounds_one_row_in_the_whole_run(tiny, tokens, executor):
    run = finished(tiny, tokens, executor, fake_quant=rules(tiny, mode="first-call"))
    assert [s["rows_quantised"] for s in run.result()["fake_quant"]["sites"]] == [1, 1]
    # layer 0's is row 0 of chunk 0; the other chunks are as the baseline
    assert (run.paired[0].kld != 0).any()
    for later in run.paired[1:]:
        assert (later.kld == 0).all() and (later.nll == later.nll_base).all()


@pytest.mark.parametrize("n_ctx, scored", [(3, 1), (4, 1), (5, 2), (33, 16), (512, 255)])
def test_the_scored_half(n_ctx, scored):
    assert n_scored_per_chunk(n_ctx) == scored
    assert first_scored(n_ctx) + scored == n_ctx - 1


def test_the_smallest_context(tiny, tokens, executor):
    run = finished(tiny, tokens, executor, n_ctx=3, chunks=1, fake_quant=rules(tiny), control=True)
    result = run.result()
    assert result["n_scored"] == 1
    assert result["control"]["exactly_zero"]


def test_control_is_exactly_zero(tiny, tokens, executor):
    result = finished(tiny, tokens, executor, fake_quant=rules(tiny), control=True).result()
    assert result["control"]["exactly_zero"] is True
    for key in ("ln_ppl_ratio", "mean_kld", "max_kld", "median_kld", "mean_dp", "rms_dp"):
        assert result["control"][key] == 0.0
        assert result["comparison"][key] != 0.0
    assert result["control"]["same_top"] == 1.0


def test_control_without_rules(tiny, tokens, executor):
    result = finished(tiny, tokens, executor, chunks=1, control=True).result()
    assert result["control"]["exactly_zero"] and "comparison" not in result


def test_control_notices_a_difference(tiny, tokens, executor, monkeypatch):
    run = Perplexity(tiny, tokens, n_ctx=N_CTX, chunks=1, control=True, executor=executor)
    plain = run._evaluation

    def unsteady(*args):
        for i, logits in enumerate(plain(*args)):
            if i == 1:
                logits[3, 5] = np.nextafter(logits[3, 5], np.float32(9))
            yield logits

    monkeypatch.setattr(run, "_evaluation", unsteady)
    assert list(run) == [0]
    assert run.result()["control"]["exactly_zero"] is False


def test_without_the_baseline_the_quantised_stream_is_the_same(tiny, tokens, executor):
    both = finished(tiny, tokens, executor, fake_quant=rules(tiny))
    alone = finished(tiny, tokens, executor, fake_quant=rules(tiny), baseline=False)
    assert np.concatenate(both.nll).tobytes() == np.concatenate(alone.nll).tobytes()
    assert "comparison" not in alone.result()
    assert alone.result()["fake_quant"] == both.result()["fake_quant"]
    assert alone.ppl == both.result()["comparison"]["ppl_quant"]


def test_more_chunks_than_the_text_has(tiny, tokens, executor):
    text = tokens[: 2 * N_CTX + N_CTX // 2]
    asked = finished(tiny, text, executor, chunks=100)
    assert asked.n_chunks == asked.done == 2
    assert not asked.result()["partial"]
    assert finished(tiny, text, executor, chunks=-1).ppl == asked.ppl


@pytest.mark.parametrize(
    "n_tokens, options, message",
    [
        (N_CTX - 1, {}, "31 tokens; one chunk needs 32"),
        (0, {}, "0 tokens; one chunk needs 32"),
        (200, {"n_ctx": 2}, "2 tokens has nothing to score"),
        (200, {"n_ctx": 0}, "0 tokens has nothing to score"),
        (200, {"n_ctx": -5}, "-5 tokens has nothing to score"),
        (200, {"chunks": 0}, "chunks must be positive"),
        (200, {"chunks": -2}, "chunks must be positive"),
        (200, {"n_ctx": 129}, "context of 129 tokens: the model allows at most 128"),
        (20, {"n_ctx": 129}, "context of 129 tokens"),  # of two faults the one that no text mends
        (200, {"batch": 0}, "batch size must be at least 1"),
        (200, {"control": True, "baseline": False, "fake_quant": True}, "needs the baseline"),
    ],
)
def test_bad_input(tiny, tokens, executor, n_tokens, options, message):
    if options.pop("fake_quant", False):
        options["fake_quant"] = rules(tiny)
    with pytest.raises(FqError, match=message):
        Perplexity(tiny, tokens[:n_tokens], executor=executor, **({"n_ctx": N_CTX} | options))


def test_exactly_one_chunk_is_enough(tiny, tokens, executor):
    assert finished(tiny, tokens[:N_CTX], executor).n_chunks == 1


@pytest.mark.parametrize("part", [0.1, 0.5, 1])
def test_interrupted_in_a_chunk_and_resumed(tiny, tokens, executor, monkeypatch, part):
    """Before, while and after the rules' stream has counted rows: complete chunks alone are counted, and
    going on gives what an undisturbed run gives."""
    whole = finished(tiny, tokens, executor, fake_quant=rules(tiny), control=True, batch=10)
    run = Perplexity(
        tiny,
        tokens,
        n_ctx=N_CTX,
        chunks=CHUNKS,
        fake_quant=rules(tiny),
        control=True,
        batch=10,
        executor=executor,
    )
    iterator = iter(run)
    plain, calls = run.context.evaluate, []

    def counted(*args):
        calls.append(1)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run.context, "evaluate", counted)
        assert next(iterator) == 0
    after_one, last = run.result(), max(1, round(part * len(calls)))
    calls.clear()

    def interrupted(*args):
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run.context, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(iterator)
    assert run.done == 1
    assert run.result() == after_one
    assert after_one["partial"] and after_one["n_chunks"] == 1 and after_one["n_chunks_asked"] == CHUNKS
    assert after_one["n_scored"] == n_scored_per_chunk(N_CTX)
    assert after_one["fake_quant"]["norms"][0]["rows_seen"] == N_CTX - 1
    assert list(run) == [1, 2]
    assert run.result() == whole.result()


def test_interrupted_before_the_first_chunk_ends(tiny, tokens, executor, monkeypatch):
    run = Perplexity(tiny, tokens, n_ctx=N_CTX, fake_quant=rules(tiny), executor=executor)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_evaluation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iter(run))
    result = run.result()
    assert result["partial"] and result["n_chunks"] == result["n_scored"] == 0 and result["chunks"] == []
    assert math.isnan(result["ppl"])
    assert result["fake_quant"]["rows_seen"] == 0


def test_the_keys_of_the_result(tiny, tokens, executor):
    result = finished(tiny, tokens, executor, fake_quant=rules(tiny), control=True).result()
    assert {"model", "n_ctx", "n_chunks", "n_scored", "ppl", "ppl_se", "chunks"} <= result.keys()
    assert all({"nll", "ppl_cumulative"} <= chunk.keys() for chunk in result["chunks"])
    assert all(
        {
            "kind",
            "layer",
            "point",
            "format",
            "rows_seen",
            "rows_quantised",
            "elements",
            "max_abs_error",
            "mean_abs_error",
            "mean_error",
            "sqnr_db",
        }
        <= site.keys()
        for site in result["fake_quant"]["sites"]
    )
    assert {
        "ppl_base",
        "ppl_quant",
        "ln_ppl_ratio",
        "ln_ppl_ratio_se",
        "mean_kld",
        "kld_se",
        "median_kld",
        "max_kld",
        "same_top",
    } <= result["comparison"].keys()
    assert json.loads(json.dumps(result))["comparison"]["mean_kld"] == result["comparison"]["mean_kld"]


class TestRealModel:
    """llama.cpp gives 24.35339 and 27.91020 for the F32 weights of this file, F32 KV cache and no
    flash attention, on the same tokens."""

    def test_perplexity_and_what_rounding_changes(self, smollm2, executor):
        text = SAMPLE_TEXT.read_text(encoding="utf-8")
        tokens = smollm2.tokenizer.encode(text)
        assert len(tokens) == 9230
        first = {"n_ctx": 512, "chunks": 2, "chunk_order": "first"}
        run = finished(smollm2, tokens, executor, **first, fake_quant=rules(smollm2))
        base = [paired.nll_base for paired in run.paired]
        assert math.exp(base[0].mean()) == pytest.approx(24.35339, abs=5e-4)
        assert math.exp(np.concatenate(base).mean()) == pytest.approx(27.91020, abs=5e-4)
        # single roundings flip with the order of the sums, so a rounded run has a wider margin
        comparison = run.result()["comparison"]
        assert comparison["mean_kld"] == pytest.approx(2.795e-5, rel=0.1)
        assert 1e-5 < comparison["median_kld"] < 3e-5
        assert comparison["same_top"] > 0.98
        assert comparison["ppl_quant"] != comparison["ppl_base"]

    def test_greedy_text(self, smollm2, executor):
        tokenizer = smollm2.tokenizer
        prompt = tokenizer.encode("Once upon a time, in a village by the sea,")
        context = Context(smollm2, 64, executor)
        tokens = list(generate(context, prompt, 16, Sampler()))
        assert tokens == [
            665,
            436,
            253,
            4197,
            3365,
            3261,
            3906,
            4075,
            30,
            2306,
            436,
            253,
            915,
            284,
            3506,
            14653,
        ]
        text = " there was a king named King Elara. She was a just and fair ruler"
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, tokens)) + decoder.finish() == text
