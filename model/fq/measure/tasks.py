"""Which answer a model takes for the likeliest, item by item, and what rounding changes about that.

A score is the share of items whose likeliest answer is right. By what answers are compared:

    acc_token  the mean of ln p over an answer's tokens, from where the texts differ on, as llama-perplexity's
               --hellaswag and --multiple-choice have it; of --winogrande what follows the answer, without the
               text's last token
    acc        the sum of ln p over what is scored, as lm-evaluation-harness's acc
    acc_norm   that over its characters, as lm-evaluation-harness's acc_norm

The baseline and the rounded model answer the same items: what is sure about a change comes of the items that
one alone has right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fq_kernels import default_fpu

from ..errors import FqError, NotFiniteError
from ..run.finite import not_finite_text
from ..text.items import Item
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import TokenizerError
from .inference import mean_interval
from .likelihood import Continuation, Likelihoods, common_prefix
from .proportions import mcnemar_p, tango_interval, wilson_interval

SCORES = {
    "acc_token": "mean ln p of an answer's tokens, as llama-perplexity has it",
    "acc": "sum of ln p, as lm-evaluation-harness's acc",
    "acc_norm": "that by characters, as its acc_norm",
}
AFTER_CHOICE = 3  # tokens from where the texts differ on, above which the choice itself is not scored


@dataclass(frozen=True)
class Encoded:
    """An item in tokens.

    sequences  of each answer
    first      of each, from which place on ln p is wanted
    by_token   of each, the places (begin, end) of what acc_token takes
    begins     of each, where the sum of ln p begins
    """

    item: Item
    sequences: tuple[list[int], ...]
    first: tuple[int, ...]
    by_token: tuple[tuple[int, int], ...]
    begins: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(map(len, self.sequences))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """With BOS where the vocabulary has one, and no EOS: a text goes on."""
    ids = list(tokenizer.encode(text, add_special=False))
    return [tokenizer.bos_id, *ids] if tokenizer.add_bos and tokenizer.bos_id is not None else ids


def encoded(item: Item, tokenizer: Tokenizer) -> Encoded:
    """Raises FqError for an item of which nothing can be scored."""
    texts = [context + rest for context, rest in zip(item.contexts, item.rests, strict=True)]
    try:
        sequences = tuple(_ids(tokenizer, text) for text in texts)
    except TokenizerError as e:
        raise FqError(f"{item.where}: {e}") from None
    if min(map(len, sequences)) < 2:
        raise FqError(f"{item.where}: a text of one token has nothing to score")
    # of texts that one begins another, or that are alike, a token is scored all the same; the first never is
    prefix = min(common_prefix([np.array(one) for one in sequences]), *(len(one) - 1 for one in sequences))
    prefix = max(prefix, 1)
    given = [len(_ids(tokenizer, context.rstrip())) for context in item.contexts]
    begins = tuple(min(max(n, 1), len(one) - 1) for n, one in zip(given, sequences, strict=True))
    if item.follows:
        apart = all(len(one) - prefix > AFTER_CHOICE for one in sequences)
        by_token = []
        for one, context in zip(sequences, item.contexts, strict=True):
            start = min(len(_ids(tokenizer, context)), len(one) - 1) if apart else prefix
            by_token.append((start, len(one) - (1 if len(one) - start > 1 else 0)))
    else:
        by_token = [(prefix, len(one)) for one in sequences]
    first = tuple(min(start, begin) for (start, _), begin in zip(by_token, begins, strict=True))
    return Encoded(item, sequences, first, tuple(by_token), begins)


def chosen(one: Encoded, found: Sequence[Continuation]) -> dict[str, tuple[int, list[float]]]:
    """By score: the likeliest answer, the first of equals, or -1 where logits are not finite; and what all
    were compared by."""
    by_token, sums = [], []
    for part, (start, end), begin, first in zip(found, one.by_token, one.begins, one.first, strict=True):
        some = part.log_p[start - first : end - first]
        by_token.append(float(some.sum()) / len(some))
        sums.append(float(part.log_p[begin - first :].sum()))
    lengths = [max(len(rest.removeprefix(" ")), 1) for rest in one.item.rests]
    by_character = [total / n for total, n in zip(sums, lengths, strict=True)]
    values = {"acc_token": by_token, "acc": sums, "acc_norm": by_character}
    finite = all(part.finite for part in found)
    return {name: (int(np.argmax(some)) if finite else -1, some) for name, some in values.items()}


class Tasks:
    """Items answered by the baseline, and by the rounded model beside it; iterate over it to run it.

    ``for item in run`` yields each item's position as it ends. Raises FqError for an item that does not fit,
    and NotFiniteError where the baseline's logits are not finite; items at which the rounded model's are not
    are in ``not_finite``, and are answered wrongly.
    """

    def __init__(
        self, items: Sequence[Encoded], baseline: Likelihoods, rounded: Likelihoods | None = None
    ) -> None:
        n_ctx = baseline.context.n_ctx
        for one in items:
            if one.longest - 1 > n_ctx:
                raise FqError(f"{one.item.where}: {one.longest} tokens do not fit a context of {n_ctx}")
        self.items = items
        self._runs = [baseline] if rounded is None else [baseline, rounded]
        self._found: list[list[dict[str, tuple[int, list[float]]]]] = []
        self._right_so_far = 0  # of the baseline, by acc_token
        self.not_finite: list[int] = []
        self.on_step: Callable[[], Any] = lambda: None

    @property
    def done(self) -> int:
        return len(self._found)

    @property
    def steps(self) -> int:
        """What is left, in sequences."""
        return len(self._runs) * sum(len(one.sequences) for one in self.items[self.done :])

    def __iter__(self) -> Iterator[int]:
        for run in self._runs:
            run.on_step = lambda: self.on_step()
        for position in range(self.done, len(self.items)):
            one = self.items[position]
            answers = []
            for i, run in enumerate(self._runs):
                found = run.of(one.sequences, one.first)
                if not all(part.finite for part in found):
                    if not i:
                        where = run.first_not_finite(one.sequences)
                        raise NotFiniteError(not_finite_text(f"baseline, {one.item.where}", where))
                    self.not_finite.append(position)
                answers.append(chosen(one, found))
            self._found.append(answers)
            self._right_so_far += self._right(position, "acc_token", 0)
            yield position

    @property
    def share(self) -> float:
        """Of items so far, that the baseline has right, by acc_token."""
        return self._right_so_far / max(self.done, 1)

    def _right(self, position: int, score: str, run: int) -> bool:
        return self._found[position][run][score][0] in self.items[position].item.right

    @default_fpu()
    def result(self) -> dict[str, Any]:
        """The figures of the items that ended, as written to JSON.

        ``items`` has of each what was chosen by the baseline and, with a rule, the rounded model, with the
        sums of ln p that acc compares. ``ln_p_right`` is the mean change of the right answer's sum, over
        items that are finite: finer than which answer is the likeliest.
        """
        n, paired = self.done, len(self._runs) == 2
        chance = [len(one.item.right) / len(one.sequences) for one in self.items[:n]]
        result: dict[str, Any] = {
            "n_items": n,
            "n_items_asked": len(self.items),
            "partial": n < len(self.items),
            "chance": sum(chance) / n if n else None,
            "not_finite": [self.items[i].item.where for i in self.not_finite],
            "scores": {name: self._figures(name) for name in SCORES} if n else {},
            "ln_p_right": self._ln_p_right() if paired and n else None,
            "items": [],
        }
        for position in range(n):
            one = self.items[position]
            entry: dict[str, Any] = {"where": one.item.where, "right": sorted(one.item.right)}
            for name, answers in zip(("base", "rounded"), self._found[position], strict=False):
                picked = {score: choice for score, (choice, _) in answers.items()}
                entry[name] = picked | {"ln_p": answers["acc"][1]}
            result["items"].append(entry)
        return result

    def _figures(self, score: str) -> dict[str, Any]:
        n, base = self.done, [self._right(i, score, 0) for i in range(self.done)]
        figures: dict[str, Any] = {"base": sum(base) / n, "base_ci95": wilson_interval(sum(base), n)}
        if len(self._runs) == 2:
            rounded = [self._right(i, score, 1) for i in range(n)]
            lost = sum(b and not r for b, r in zip(base, rounded, strict=True))
            gained = sum(r and not b for b, r in zip(base, rounded, strict=True))
            figures |= {
                "rounded": sum(rounded) / n,
                "rounded_ci95": wilson_interval(sum(rounded), n),
                "difference": (gained - lost) / n,
                "difference_ci95": tango_interval(lost, gained, n),
                "lost": lost,
                "gained": gained,
                "p": mcnemar_p(lost, gained),
                "answers_changed": sum(b[score][0] != r[score][0] for b, r in self._found),
            }
        return figures

    def _ln_p_right(self) -> dict[str, Any]:
        changes = np.array(
            [
                float(np.mean([rounded["acc"][1][i] - base["acc"][1][i] for i in one.item.right]))
                for one, (base, rounded) in zip(self.items, self._found, strict=False)
            ]
        )
        changes = changes[np.isfinite(changes)]
        mean = float(changes.mean()) if len(changes) else None
        return {"mean": mean, "ci95": mean_interval(changes), "n_items": len(changes)}
