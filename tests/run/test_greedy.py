"""Greedy text by the sums of figures, token by token beside it; and where another model's leaves it."""

from __future__ import annotations

import pytest
from changed_models import OVERFLOWS, overflowing

from fq import Context, NotFiniteError
from fq.run.greedy import agreeing, greedy_text

PROMPT = [1, 17, 300, 42, 9]
N = 24


def one_by_one(model, executor, prompt, n, rule=None, stop=frozenset()):
    context = Context(model, 128, executor, rule)
    logits, text = context.eval(prompt), []
    while True:
        text.append(int(logits[-1].argmax()))
        if len(text) == n or text[-1] in stop:
            return text
        logits = context.eval(text[-1:])


def wrong_drafts(context, monkeypatch, every):
    """One in so many of a context's drafts has another token as its likeliest; the rest has its own bits."""
    evaluate, calls = context.eval, []

    def worse(tokens, outputs=None, *, decoding=False):
        logits = evaluate(tokens, outputs, decoding=decoding)
        if decoding:
            calls.append(tokens)
            if len(calls) % every == 0:
                logits[-1, (int(logits[-1].argmax()) + 1) % logits.shape[1]] = logits.max() + 1
        return logits

    monkeypatch.setattr(context, "eval", worse)
    return calls


@pytest.mark.parametrize("every", [10**9, 7, 2, 1])
@pytest.mark.parametrize("n", [1, 2, N])
def test_it_is_the_text_of_the_other_order_whatever_is_drafted(tiny, executor, monkeypatch, every, n):
    expected = one_by_one(tiny, executor, PROMPT, n)
    context = Context(tiny, 128, executor)
    calls = wrong_drafts(context, monkeypatch, every)
    for _ in range(2):
        assert greedy_text(context, PROMPT, n, frozenset()) == expected
    assert bool(calls) == (n > 1)


@pytest.mark.parametrize("every", [10**9, 3])
def test_it_ends_at_a_token_that_ends_it(tiny, executor, monkeypatch, every):
    text = one_by_one(tiny, executor, PROMPT, N)
    for at in (0, 1, 9):
        stop = frozenset({text[at]})
        context = Context(tiny, 128, executor)
        wrong_drafts(context, monkeypatch, every)
        assert greedy_text(context, PROMPT, N, stop) == text[: text.index(text[at]) + 1]


@pytest.mark.parametrize("rule", ["ffn_norm[*].raw=mxfp4", "l_out[*]=int4:tensor", "*[*].raw=fp8_e4m3fn"])
def test_where_another_leaves_it(tiny, executor, rule):
    """As greedy text under the rule says, but for a scale over a tensor, whose tensor is the whole text."""
    text = greedy_text(Context(tiny, 128, executor), PROMPT, N, frozenset())
    same, other = agreeing(Context(tiny, 128, executor, rule), PROMPT, text)
    if "tensor" in rule:
        logits = Context(tiny, 128, executor, rule).eval(PROMPT + text[:-1], slice(len(PROMPT) - 1, None))
        theirs = logits.argmax(axis=1).tolist()
    else:
        theirs = one_by_one(tiny, executor, PROMPT, N, rule)
    differ = [a != b for a, b in zip(text, theirs, strict=True)]
    assert any(differ), "the rule shows nothing"
    assert same == differ.index(True) and other == theirs[same]
    assert agreeing(Context(tiny, 128, executor), PROMPT, text) == (N, None)


@pytest.mark.parametrize(("rule", "parts"), [("l_out[*]=int8", [8, 8, 8, 4]), ("l_out[*]=int8:tensor", [28])])
def test_a_scale_over_a_tensor_is_the_whole_texts(tiny, executor, monkeypatch, rule, parts):
    monkeypatch.setattr("fq.run.greedy.ROWS", 8)
    context, seen = Context(tiny, 128, executor, rule), []
    evaluate = context.eval
    monkeypatch.setattr(context, "eval", lambda ids, *rest: (seen.append(len(ids)), evaluate(ids, *rest))[1])
    agreeing(context, PROMPT, list(range(2, 2 + N)))
    assert seen == parts


def test_what_is_not_finite(tmp_path, executor):
    context = Context(overflowing(tmp_path / "m.gguf"), 128, executor, OVERFLOWS)
    with pytest.raises(NotFiniteError, match="greedy text: the logits are not finite"):
        agreeing(context, PROMPT, [1, 2])
