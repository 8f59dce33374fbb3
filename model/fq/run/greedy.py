"""Greedy text by the sums that figures are made of, and where another model's leaves it."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np

from ..errors import NotFiniteError
from .context import Context
from .finite import all_finite, first_not_finite, in_batches, not_finite_text, rules_at

ROWS = 128  # of logits at a time


def greedy_text(context: Context, prompt: Sequence[int], n: int, stop: Set[int]) -> list[int]:
    """Up to n tokens after the prompt; one of ``stop`` is the last.

    It is drafted token by token in the order of sums that is quick for one, and then looked at as a whole in
    the other, whose bits do not depend on how many tokens go at a time: from the first that would be another
    on it is drafted again. The context, of which it takes all, must have no rules that count rows.
    Raises NotFiniteError.
    """
    context.clear()
    text = [int(_likeliest(context, prompt, len(prompt) - 1)[0])]
    sure = len(prompt)  # tokens whose keys and values are of the order of figures
    agreed = 1  # of the text
    while True:
        while len(text) < n and text[-1] not in stop:
            logits = context.eval(text[-1:], decoding=True)
            _look(context, [*prompt, *text], logits)
            text.append(int(logits[-1].argmax()))
        if agreed == len(text):
            return text
        context.n_past = sure
        found = _likeliest(context, text[agreed - 1 : -1], 0, [*prompt, *text[: agreed - 1]])
        differ = np.flatnonzero(found != text[agreed:])
        if not len(differ):
            return text
        at = int(differ[0])
        text[agreed + at :] = [int(found[at])]
        agreed += at + 1
        context.n_past = sure = len(prompt) + agreed - 1


def agreeing(context: Context, prompt: Sequence[int], text: Sequence[int]) -> tuple[int, int | None]:
    """(how many of the text's first tokens greedy text of this context has too, the token that it has next).

    None: it has all of them. What it would write beyond the first other token has no part in that, so the
    text is run as a whole. Raises NotFiniteError.
    """
    context.clear()
    found = _likeliest(context, [*prompt, *text[:-1]], len(prompt) - 1)
    differ = np.flatnonzero(found != text)
    return (int(differ[0]), int(found[differ[0]])) if len(differ) else (len(text), None)


def _likeliest(context: Context, ids: Sequence[int], first: int, before: Sequence[int] = ()) -> np.ndarray:
    """After each token from ``first`` on, the token with the largest logit; ``before`` is there already."""
    found = []
    for part, wanted in in_batches(np.asarray(ids, np.int64), first, _batch(context, ids)):
        logits = context.eval(part, wanted)
        if len(logits):
            _look(context, [*before, *ids], logits)
            found.append(logits.argmax(axis=1))
    return np.concatenate(found)


def _batch(context: Context, ids: Sequence[int]) -> int:
    return len(ids) if context.fake_quant.whole_tensor else ROWS


def _look(context: Context, ids: Sequence[int], logits: np.ndarray) -> None:
    if all_finite(logits):
        return
    evaluations = in_batches(np.asarray(ids, np.int64), 0, _batch(context, ids))
    rules = rules_at(context.fake_quant, {})
    where = first_not_finite(context.model, evaluations, context.executor, rules, context.activations)
    raise NotFiniteError(not_finite_text("greedy text", where))
