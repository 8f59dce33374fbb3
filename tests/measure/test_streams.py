"""Several variants of the model against one baseline: as many separate measurements say the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fq import FqError, Perplexity, Stream, Streams
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.base_file import BaseFile, save_base
from fq.measure.statistics import is_exactly_zero
from fq.run.fork import Fork
from fq_kernels.rules import FakeQuant

N_CTX = 32
CHUNKS = 3
RULES = {"nearest": "ffn_norm=bf16", "rows": "ffn_norm=int4", "first": "ffn_norm=bf16:first-call"}


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))


def streams_of(model):
    return [
        *(Stream(name, FakeQuant(model.values, rule)) for name, rule in RULES.items()),
        Stream("control"),
        Stream("deployed", activations="ggml"),
    ]


def started(model, tokens, executor, **options):
    streams = streams_of(model)
    return Streams(
        model, tokens, streams, n_ctx=N_CTX, chunks=CHUNKS, executor=executor, **({"batch": 10} | options)
    )


def test_each_stream_is_what_it_is_alone(tiny, tokens, executor):
    run = started(tiny, tokens, executor)
    assert list(run) == list(range(CHUNKS))
    result = run.result()
    for found, (name, rule) in zip(result["streams"], RULES.items(), strict=False):
        alone = Perplexity(
            tiny, tokens, n_ctx=N_CTX, chunks=CHUNKS, batch=10, executor=executor,
            fake_quant=FakeQuant(tiny.values, rule),
        )  # fmt: skip
        assert list(alone) == list(range(CHUNKS))
        assert found["name"] == name
        assert found["comparison"] == alone.result()["comparison"]
        assert found["fake_quant"] == alone.result()["fake_quant"]
        assert result["ppl_base"] == run.ppl == found["comparison"]["ppl_base"]
    control = result["streams"][-2]
    assert is_exactly_zero(control["comparison"]) and "fake_quant" not in control
    assert json.loads(json.dumps(result))["ppl_base"] == result["ppl_base"]


def test_activations_are_the_streams_alone(smollm2, executor):
    tokens = smollm2.tokenizer.encode("It was a dark and stormy night, and the rain fell in torrents.")
    streams = [Stream("deployed", activations="ggml"), Stream("control")]
    run = Streams(smollm2, tokens, streams, n_ctx=16, chunks=1, executor=executor)
    assert list(run) == [0]
    deployed, control = (entry["comparison"] for entry in run.result()["streams"])
    assert deployed["mean_kld"] > 1e-4
    assert is_exactly_zero(control)


@pytest.mark.parametrize("evaluation", [0, 1, 3])
def test_interrupted_in_any_stream_and_resumed(tiny, tokens, executor, monkeypatch, evaluation):
    whole = started(tiny, tokens, executor)
    assert list(whole) == list(range(CHUNKS))
    run = started(tiny, tokens, executor)
    iterator = iter(run)
    assert next(iterator) == 0
    after_one = run.result()
    plain, calls = run.context.evaluate, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 4 * evaluation + 3:  # each of some nodes of one stream in one batch
            raise KeyboardInterrupt
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run.context, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(iterator)
    assert run.done == 1 and run.result() == after_one and after_one["partial"]
    assert list(run) == [1, 2]
    assert run.result() == whole.result()


def test_without_a_baseline_streams_are_scored_alone(tiny, tokens, executor):
    run = started(tiny, tokens, executor)
    alone = started(tiny, tokens, executor, baseline=None)
    assert list(run) == list(alone) == list(range(CHUNKS))
    for i in range(len(run.streams)):
        assert [x.tobytes() for x in alone.nll_of(i)] == [x.tobytes() for x in run.nll_of(i)]
        assert not alone.paired_of(i) and "comparison" not in alone.result()["streams"][i]


def test_the_baseline_may_have_rules(tiny, tokens, executor):
    run = started(tiny, tokens, executor, baseline=Stream("base", FakeQuant(tiny.values, RULES["nearest"])))
    assert list(run) == list(range(CHUNKS))
    nearest, rows, *_ = (entry["comparison"] for entry in run.result()["streams"])
    assert is_exactly_zero(nearest) and not is_exactly_zero(rows)


def test_an_interrupted_baselines_rows_are_in_no_counter(tiny, tokens, executor, monkeypatch):
    rules = FakeQuant(tiny.values, RULES["nearest"])
    run = started(tiny, tokens, executor, baseline=Stream("base", rules))
    plain, calls = run.context.evaluate, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(run.context, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iter(run))
    assert rules.as_dict()["rows_seen"] == 0


def test_unknown_activations(tiny, tokens, executor):
    with pytest.raises(FqError, match="odd activations must be exact or ggml, not 'q8'"):
        Streams(tiny, tokens, [Stream("odd", activations="q8")], n_ctx=N_CTX, executor=executor)


ALONE = {
    "no baseline": {"baseline": False, "fake_quant": "ffn_norm=bf16"},
    "a baseline with other activations": {"activations": "ggml", "baseline_activations": "exact"},
    "a baseline with rules": {"base_fake_quant": "k=int8", "fake_quant": "*=bf16", "realisations": 2},
    "a baseline in a file": {"base_file": None, "fake_quant": "ffn_norm=bf16", "control": True},
}


@pytest.mark.parametrize("how", ALONE)
def test_logits_that_do_not_fit_are_cut(tiny, tokens, executor, monkeypatch, tmp_path, how):
    """Where streams share nothing with the baseline, too; nothing else of it changes."""
    options = {"n_ctx": N_CTX, "chunks": CHUNKS, "chunk_order": "first", "executor": executor} | ALONE[how]
    if "base_file" in options:
        indices = tokens[: CHUNKS * N_CTX]
        with save_base(tmp_path / "base", N_CTX, tiny.hparams.n_vocab, np.array(indices), executor) as writer:
            alone = Perplexity(
                tiny, tokens, **options | {"base_file": None, "fake_quant": None, "control": False}
            )
            alone.on_logits = writer.add
            assert len(list(alone)) == CHUNKS
        options["base_file"] = BaseFile(tmp_path / "base")
        tokens = options["base_file"].tokens

    def result():
        rules = {
            k: FakeQuant(tiny.values, options[k]) for k in ("fake_quant", "base_fake_quant") if k in options
        }
        run = Perplexity(tiny, tokens, **options | rules)
        steps, ended = run.steps, []
        run.on_step = lambda: ended.append(1)
        assert len(list(run)) == CHUNKS and len(ended) == steps
        return run.result()

    whole, most = result(), []
    made = Fork.logits_of

    def logits_of(*args):
        logits = made(*args)
        most.append(len(logits))
        return logits

    monkeypatch.setattr(Fork, "logits_of", logits_of)
    monkeypatch.setattr("fq.run.fork.MAX_LOGITS", 4 * 4 * tiny.hparams.n_vocab)
    monkeypatch.setattr("fq.run.fork.MIN_BLOCK_ROWS", 1)
    assert json.dumps(result()) == json.dumps(whole)
    assert 0 < max(most) <= 4
