"""After how many tokens the rounded model's greedy text leaves the baseline's, as a survival curve.

Users of serving engines compare such texts. It is a blunt instrument: one token whose two likeliest are close
sends a text elsewhere, however small a change is, and the baseline's own hesitations say most of when. The KL
divergence says more of the same with fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fq_kernels import default_fpu

from ..errors import FqError, NotFiniteError
from ..run.context import Context
from ..run.greedy import agreeing, greedy_text
from .proportions import median_survival, survival


@dataclass(frozen=True)
class Left:
    """Of a prompt.

    text   of the baseline, in tokens
    same   how many of its first tokens the rounded model's text has
    other  what that has next; None: it has all of them
    """

    text: list[int]
    same: int
    other: int | None


class Divergence:
    """Iterate over it to run it; yields each prompt's position as it ends.

    prompts            in tokens, BOS among them where the vocabulary has one
    n                  tokens of text; one that ends generation is the last
    baseline, rounded  contexts, the baseline's without rules

    A text that is the same to its end is one that left after more tokens than were looked at. ``not_finite``
    has the positions of prompts at which the rounded model's logits are not finite, which left at once.
    Raises FqError for a prompt that does not fit, and NotFiniteError where the baseline is not finite.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        baseline: Context,
        rounded: Context,
        stop: frozenset[int],
    ) -> None:
        if n < 1:
            raise FqError(f"a text must have 1 token at least, not {n}")
        n_ctx = min(baseline.n_ctx, rounded.n_ctx)
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise FqError(f"prompt {i + 1} is empty")
            if len(prompt) + n - 1 > n_ctx:
                raise FqError(
                    f"prompt {i + 1}: {len(prompt)} tokens and {n} of text do not fit a context of {n_ctx}"
                )
        self.prompts, self.n, self._stop = prompts, n, stop
        self._baseline, self._rounded = baseline, rounded
        self.left: list[Left] = []
        self.not_finite: list[int] = []
        self.on_step: Callable[[], Any] = lambda: None

    @property
    def done(self) -> int:
        return len(self.left)

    @property
    def steps(self) -> int:
        """What is left, in prompts."""
        return len(self.prompts) - self.done

    def __iter__(self) -> Iterator[int]:
        for position in range(self.done, len(self.prompts)):
            prompt = self.prompts[position]
            try:
                text = greedy_text(self._baseline, prompt, self.n, self._stop)
            except NotFiniteError as e:
                raise NotFiniteError(f"prompt {position + 1}: {e}") from None
            try:
                same, other = agreeing(self._rounded, prompt, text)
            except NotFiniteError:
                self.not_finite.append(position)
                same, other = 0, -1
            self.left.append(Left(text, same, other))
            self.on_step()
            yield position

    @default_fpu()
    def result(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The figures of the prompts that ended, as written to JSON.

        ``curve``: the share of texts whose first ``tokens`` are the same, where that changes. ``median`` is
        the number of the first other token of half of the texts, null where fewer left.
        """
        times = [one.same + (one.other is not None) for one in self.left]
        ended = [one.other is not None for one in self.left]
        curve = survival(times, ended)
        median, ends = median_survival(curve)
        return {
            "n_prompts": self.done,
            "n_prompts_asked": len(self.prompts),
            "partial": self.done < len(self.prompts),
            "n_predict": self.n,
            "left": sum(ended),
            "median": median,
            "median_ci95": ends,
            "curve": [
                {"tokens": at.time, "share": at.share, "share_ci95": at.interval, "at_risk": at.at_risk}
                for at in curve
            ],
            "not_finite": self.not_finite,
            "prompts": [
                {
                    "n_prompt": len(prompt),
                    "n_text": len(one.text),
                    "same": one.same,
                    "left": one.other is not None,
                    "text": decode(one.text),
                    "next": decode([one.text[one.same]]) if one.other is not None else None,
                    "next_rounded": decode([one.other]) if one.other is not None and one.other >= 0 else None,
                }
                for prompt, one in zip(self.prompts, self.left, strict=False)
            ],
        }
