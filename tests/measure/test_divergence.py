"""Greedy divergence: how long texts stay the same, and what is said of that."""

from __future__ import annotations

import numpy as np
import pytest
from changed_models import OVERFLOWS, overflowing

from fq import Context, FqError, NotFiniteError
from fq.measure.divergence import Divergence
from fq.measure.proportions import survival
from fq.run.greedy import greedy_text
from fq_kernels.rules import FakeQuant

COARSE = "ffn_norm[*].raw=mxfp4"


@pytest.fixture(scope="module")
def prompts(tiny):
    rng = np.random.default_rng(6)
    return [rng.integers(2, tiny.hparams.n_vocab, n).tolist() for n in rng.integers(1, 20, 12)]


def ran(model, executor, prompts, n, rule=None, stop=frozenset()):
    run = Divergence(prompts, n, Context(model, 64, executor), Context(model, 64, executor, rule), stop)
    assert list(run) == list(range(len(prompts)))
    return run


def test_figures(tiny, executor, prompts):
    run = ran(tiny, executor, prompts, 16, COARSE)
    data = run.result(lambda ids: ",".join(map(str, ids)))
    assert (data["n_prompts"], data["n_predict"], data["partial"]) == (12, 16, False)
    assert 0 < data["left"] < 12 or data["left"] == 12
    for prompt, one, entry in zip(prompts, run.left, data["prompts"], strict=True):
        assert one.text == greedy_text(Context(tiny, 64, executor), prompt, 16, frozenset())
        assert entry["same"] == one.same and entry["left"] == (one.other is not None)
        if one.other is not None:
            assert one.other != one.text[one.same] and entry["next"] == str(one.text[one.same])
            assert entry["next_rounded"] == str(one.other)
        else:
            assert one.same == 16 and entry["next"] is entry["next_rounded"] is None
    times = [one.same + 1 if one.other is not None else 16 for one in run.left]
    curve = survival(times, [one.other is not None for one in run.left])
    assert [(at["tokens"], at["share"], at["at_risk"]) for at in data["curve"]] == [
        (at.time, at.share, at.at_risk) for at in curve
    ]
    # at a time all are watched to, the share is that of texts that are still the same
    for at in data["curve"]:
        assert at["share"] == pytest.approx(sum(one.same >= at["tokens"] for one in run.left) / 12)


def test_without_a_rule_no_text_leaves(tiny, executor, prompts):
    data = ran(tiny, executor, prompts, 8).result(str)
    assert data["left"] == 0 and data["curve"] == [] and data["median"] is None


def test_a_text_that_ends_was_the_same_to_its_end(tiny, executor, prompts):
    text = greedy_text(Context(tiny, 64, executor), prompts[0], 8, frozenset())
    run = ran(tiny, executor, prompts[:1], 8, stop=frozenset({text[2]}))
    assert run.left[0].text == text[: text.index(text[2]) + 1] and run.left[0].other is None


def test_what_is_not_finite_leaves_at_once(tmp_path, executor, prompts):
    run = ran(overflowing(tmp_path / "m.gguf"), executor, prompts[:2], 4, OVERFLOWS)
    data = run.result(str)
    assert data["not_finite"] == [0, 1] and data["left"] == 2 and data["median"] == 1
    assert data["prompts"][0]["next_rounded"] is None


def test_a_baseline_that_is_not_finite_is_said_with_its_place(tmp_path, executor, prompts):
    model = overflowing(tmp_path / "m.gguf")
    rounded = Context(model, 64, executor, FakeQuant(model.values, [OVERFLOWS]))
    plain = Context(model, 64, executor)
    said = r"prompt 1: greedy text: the logits are not finite; the first node that is not is \S+ \(\w+\), at "
    with pytest.raises(NotFiniteError, match=said):
        list(Divergence(prompts[:2], 4, rounded, plain, frozenset()))


def test_what_does_not_fit(tiny, executor):
    contexts = Context(tiny, 16, executor), Context(tiny, 16, executor)
    Divergence([[1] * 9], 8, *contexts, frozenset())
    for prompts, n, words in (
        ([[1], [1] * 10], 8, "prompt 2: 10 tokens and 8 of text do not fit a context of 16"),
        ([[]], 8, "prompt 1 is empty"),
        ([[1]], 0, "at least, not 0"),
    ):
        with pytest.raises(FqError, match=words):
            Divergence(prompts, n, *contexts, frozenset())
