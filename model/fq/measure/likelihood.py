"""How likely a model takes a sequence's tokens to be: what several begin with is run once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fq_kernels import Executor
from fq_kernels.rules import FakeQuant, Rules

from ..errors import FqError
from ..run.context import Context
from ..run.finite import all_finite, first_not_finite, in_batches, rules_at
from ..run.model import Model
from .statistics import score


@dataclass(frozen=True)
class Continuation:
    """Of a sequence from some token on.

    log_p   ln p of each token, float64
    greedy  whether each is the likeliest
    finite  whether the logits are
    """

    log_p: np.ndarray
    greedy: bool
    finite: bool


class Likelihoods:
    """Sequences of up to n_ctx tokens under one set of rules, each from an empty context.

    fake_quant   the rules, whose counters go on; None: none
    activations  "exact" or "ggml" (see Context)
    batch        tokens per evaluation; a sequence is one where a scale is over a tensor
    on_step      called for each sequence

    The figures depend on neither the batch nor what else is asked for at the same time, but for rules that
    go by how many rows came before: first-call and stochastic ones.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        executor: Executor,
        fake_quant: FakeQuant | Rules | None = None,
        *,
        activations: str = "exact",
        batch: int = 512,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        if batch < 1:
            raise FqError(f"batch size must be at least 1, not {batch}")
        self.context = Context(model, n_ctx, executor, fake_quant, activations=activations)
        self._whole = self.context.fake_quant.whole_tensor
        self._batch, self.on_step = batch, on_step

    def of(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> list[Continuation]:
        """Of each sequence the tokens from its place ``first`` on, which is at least 1.

        Raises FqError for a sequence that does not fit, or has no token there.
        """
        ids = [np.asarray(sequence, np.int64) for sequence in sequences]
        for one, at in zip(ids, first, strict=True):
            if not 1 <= at < len(one):
                raise FqError(f"a sequence of {len(one)} tokens has none to score from its {at}. on")
            if len(one) - 1 > self.context.n_ctx:
                raise FqError(
                    f"a sequence of {len(one)} tokens does not fit a context of {self.context.n_ctx}"
                )
        self.context.clear()
        shared = 0
        if not self._whole and len(ids) > 1:
            # up to the last token that all read, whose logits each makes for itself
            shared = max(min(common_prefix(ids), *first) - 1, 0)
            self._eval(ids[0][:shared], shared)
        found = []
        for one, at in zip(ids, first, strict=True):
            self.context.n_past = shared
            found.append(self._scored(self._eval(one[shared:-1], at - 1 - shared), one[at:]))
            self.on_step()
        return found

    def first_not_finite(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Of the first that has one: `run.finite.first_not_finite`."""
        context = self.context
        for sequence in sequences:
            ids = np.asarray(sequence[:-1], np.int64)
            evaluations = in_batches(ids, 0, len(ids) if self._whole else self._batch)
            rules = rules_at(context.fake_quant, {})
            if where := first_not_finite(
                context.model, evaluations, context.executor, rules, context.activations
            ):
                return where
        return {}

    def _eval(self, ids: np.ndarray, first: int) -> list[np.ndarray]:
        """Logits of the tokens from ``first`` on, of each batch."""
        batch = max(len(ids), 1) if self._whole else self._batch
        parts = [self.context.eval(part, wanted).copy() for part, wanted in in_batches(ids, first, batch)]
        return [part for part in parts if len(part)]

    def _scored(self, parts: list[np.ndarray], targets: np.ndarray) -> Continuation:
        log_p, greedy, finite, done = [], True, True, 0
        for logits in parts:
            some = targets[done : done + len(logits)]
            done += len(logits)
            log_p.append(-score(logits, some, self.context.executor))
            greedy &= bool((logits.argmax(axis=1) == some).all())
            finite &= all_finite(logits)
        return Continuation(np.concatenate(log_p), greedy, finite)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(map(len, sequences))
    table = np.array([one[:shortest] for one in sequences])
    differ = (table != table[0]).any(axis=0)
    return int(differ.argmax()) if differ.any() else shortest
