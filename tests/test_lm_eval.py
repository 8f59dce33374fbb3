"""fq's model in lm-evaluation-harness: its log-likelihoods are ours, at the boundaries too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip(
    "lm_eval", reason="lm-eval is too large for the test extra: it has a step of its own in CI"
)

from changed_models import OVERFLOWS, overflowing
from command_line import HERE, environment
from lm_eval.api.instance import Instance

from fq import Context, FqError, NotFiniteError
from fq.lm_eval import FqLM
from fq.measure.statistics import score

RULE = "ffn_norm[*].raw=fp8_e4m3fn"


@pytest.fixture(scope="module")
def lm(tiny_path):
    return FqLM(model=str(tiny_path), fake_quant=RULE, threads=2)


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def log_p(lm, ids, first):
    """By one evaluation of its own."""
    logits = Context(lm.model, 128, lm.executor, RULE).eval(ids[:-1], slice(first - 1, None))
    targets = np.array(ids[first:])
    return -float(score(logits, targets, lm.executor).sum()), logits.argmax(axis=1).tolist() == ids[first:]


def test_loglikelihood(lm):
    pairs = [
        ("Hello world", " of the"),
        ("Hello world", " and"),
        ("It was", " in it"),
        ("", "Hello"),
        ("It ", "was"),
    ]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    encode = lm.model.tokenizer.encode
    for (context, continuation), answer in zip(pairs, found, strict=True):
        whole = encode(context + continuation)
        assert answer == log_p(lm, whole, len(encode(context.rstrip())))
    ids = encode("Hello world")
    likeliest = int(Context(lm.model, 128, lm.executor, RULE).eval(ids).argmax())
    (answer,) = lm._loglikelihood_tokens([(None, ids, [likeliest])], disable_tqdm=True)
    assert answer == (log_p(lm, [*ids, likeliest], len(ids))[0], True)


def test_the_boundaries_of_context_and_continuation(tiny_path):
    lm = FqLM(model=str(tiny_path), fake_quant=RULE, max_length=16)
    ids = [5 + i for i in range(40)]
    for n_context, n_continuation in ((15, 2), (16, 1), (30, 3), (1, 16), (5, 16)):
        context, continuation = ids[:n_context], ids[20 : 20 + n_continuation]
        (answer,) = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
        whole = [*context, *continuation][-17:]
        assert answer == log_p(lm, whole, len(whole) - n_continuation)
    assert lm._loglikelihood_tokens([(None, [3], [])], disable_tqdm=True) == [(0.0, True)]
    with pytest.raises(FqError, match="a continuation of 17 tokens; the context has 16"):
        lm._loglikelihood_tokens([(None, [3], ids[:17])], disable_tqdm=True)


def test_rolling(tiny_path):
    """Each token once, from BOS on; a window of the context's length at a time."""
    lm = FqLM(model=str(tiny_path), fake_quant=RULE, max_length=16)
    text = "Hello world of the and is it " * 6
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = lm.model.tokenizer.encode(text, add_special=False)
    n, bos = len(ids), lm.model.tokenizer.bos_id
    assert n > 32
    expected = [log_p(lm, [bos, *ids[:16]], 1)[0]]
    for begin in range(16, n, 16):
        end = min(begin + 16, n)
        expected.append(log_p(lm, ids[end - 17 : end], 17 - (end - begin))[0])
    assert found == pytest.approx(sum(expected), rel=1e-15)


def test_generated_text(lm):
    def text(until, prompt="Hello world", **options):
        request = instances("generate_until", (prompt, {"until": until, "max_gen_toks": 12, **options}))
        return lm.generate_until(request, disable_tqdm=True)[0]

    whole = text([])
    context = Context(lm.model, 128, lm.executor, RULE)
    logits, ids = context.eval(lm.model.tokenizer.encode("Hello world"), decoding=True), []
    for _ in range(12):
        ids.append(int(logits[-1].argmax()))
        logits = context.eval(ids[-1:], decoding=True)
    assert whole.strip() == lm.model.tokenizer.decode(ids).strip() and len(whole) > 6
    assert text(whole[4:6]) == whole[: whole.index(whole[4:6])]
    assert text([whole[5:7], whole[3:5]]) == whole[: min(whole.index(whole[5:7]), whole.index(whole[3:5]))]
    assert text([], do_sample=False, temperature=9.0) == whole
    assert text([], do_sample=False, temperature=9.0, top_k=-1, top_p=None) == whole
    assert text([], prompt="Hello world " * 200)  # cut at its beginning
    with pytest.raises(FqError, match="128 tokens to generate do not fit a context of 128"):
        text([], max_gen_toks=128)


def test_texts_that_are_drawn(tiny_path):
    """A text that is asked for again is another, and all are the same in another process."""
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 9.0, "top_k": None}

    def texts():
        lm = FqLM(model=str(tiny_path))
        requests = instances("generate_until", *[("Hello world", dict(options))] * 3)
        return lm.generate_until(requests, disable_tqdm=True)

    assert len(set(texts())) == 3 and texts() == texts()


def test_how_a_text_is_drawn(lm):
    """As Hugging Face's options say it: alone, do_sample is a temperature of 1."""

    def temp(**options):
        return lm._sampler(options).temp

    assert temp() == temp(do_sample=False, temperature=2.0) == temp(do_sample=True, temperature=0.0) == 0
    assert temp(do_sample=True) == 1 and temp(temperature=0.5) == 0.5
    with pytest.raises(FqError, match="top-p must be"):
        lm._sampler({"do_sample": True, "top_p": 0.0})


def test_a_context_that_is_short(tiny_path):
    lm = FqLM(model=str(tiny_path), max_length=16)
    (found,) = lm.generate_until(instances("generate_until", ("Hello", {"until": []})), disable_tqdm=True)
    assert found


def test_what_is_not_finite_is_no_figure(tmp_path):
    model = overflowing(tmp_path / "m.gguf").path
    lm = FqLM(model=model, fake_quant=OVERFLOWS)
    with pytest.raises(NotFiniteError, match="the logits are not finite"):
        lm.loglikelihood(instances("loglikelihood", ("Hello", " world")), disable_tqdm=True)
    with pytest.raises(NotFiniteError, match="the logits are not finite"):
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("Hello world",)), disable_tqdm=True)


def test_the_cache_is_told_of_a_long_context_in_between(lm, monkeypatch):
    monkeypatch.setattr("fq.lm_eval.MAX_TOGETHER", 4)
    told, asked = [], []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *of: told.append(of))
    of = lm._likelihoods.of
    monkeypatch.setattr(lm._likelihoods, "of", lambda *some: (asked.append(len(told)), of(*some))[1])
    pairs = [("", f"Hello {i}") for i in range(10)]
    lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    assert asked == [0, 4, 8] and len(told) == 10


def test_tokens(lm):
    bos = lm.model.tokenizer.bos_id
    plain = lm.tok_encode("Hello", add_special_tokens=False)
    assert lm.tok_encode("Hello") == lm.tok_encode("Hello", add_special_tokens=True) == [bos, *plain]
    word = lm.model.tokenizer.decode([bos], skip_special=False)
    assert lm.tok_encode(f"{word}Hello").count(bos) == 1
    assert lm.prefix_token_id == bos and lm.eot_token_id == lm.model.tokenizer.eos_id


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fake_quant": "nosuch=bf16"}, "nosuch"),
        ({"threads": 0}, "threads"),
        ({"threads": "two"}, "threads must be a whole number"),
        ({"max_length": "abc"}, "max_length must be a whole number"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"max_length": True}, "max_length must be a whole number, not True"),
        ({"fake_quant": 5}, "fake_quant must be text, not 5"),
        ({"fake_quant": ["k=bf16", 5]}, "fake_quant must be text, not 5"),
        ({"norm_unit": 5}, "norm_unit must be text, not 5"),
        ({"profile": 5}, "profile must be text, not 5"),
        ({"max_length": 129}, "the model allows 1 to 128"),
        ({"model": "/nonexistent.gguf"}, "/nonexistent.gguf"),
    ],
)
def test_bad_arguments(tiny_path, arguments, words):
    with pytest.raises(FqError, match=words):
        FqLM(**{"model": str(tiny_path)} | arguments)


def test_rules_are_divided(tiny_path):
    lm = FqLM(model=str(tiny_path), fake_quant="l_out[*]=bf16; k=int8:group=32", norm_unit="*=acc=bf16")
    assert len(lm.fake_quant.rules) == 3


def test_lm_evals_own_command(tiny_path, tmp_path):
    """A local task of a few lines: nothing is fetched. Its log-likelihoods are fq's of the same items."""
    lines = [
        {"question": f"Hello world {i}", "choices": ["of the", "and", "is it"], "answer": i % 3}
        for i in range(9)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
        "doc_to_target: answer\ndoc_to_choice: choices\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fq.lm_eval", "run", "--model", "fq", "--tasks", "local"]
    command += ["--model_args", f"model={tiny_path},fake_quant={RULE}", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, env=environment(**offline), cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "out").rglob("samples_local_*.jsonl")
    logged = sorted(map(json.loads, log.read_text().splitlines()), key=lambda one: one["doc_id"])
    command = [sys.executable, "-m", "fq", "tasks", "--multiple-choice", "-f", str(tmp_path / "items.jsonl")]
    command += ["-m", str(tiny_path), "--fake-quant", RULE, "--json", "-"]
    ours = json.loads(
        subprocess.run(command, env=environment(), cwd=HERE, capture_output=True, check=True).stdout
    )
    for one, theirs in zip(ours["items"], logged, strict=True):
        assert one["rounded"]["ln_p"] == [float(pair[0]) for pair in theirs["filtered_resps"]]
        assert (one["rounded"]["acc"] in one["right"]) == bool(theirs["acc"])
    bad = [sys.executable, "-m", "fq.lm_eval", "run", "--model", "fq", "--tasks", "local", "--model_args"]
    bad += [f"model={tiny_path},fake_quant=nosuch=bf16", "--include_path", str(tmp_path)]
    done = subprocess.run(bad, env=environment(**offline), cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "fq: error: --fake-quant: " in done.stderr and "nosuch" in done.stderr
    assert os.path.exists(tmp_path / "hf")
