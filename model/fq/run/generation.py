"""Text generation: sampling and the token loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fq_kernels import default_fpu, exp

from ..errors import FqError, NotFiniteError
from .context import Context
from .finite import Evaluation, all_finite, first_not_finite, not_finite_text, rows_seen, rules_at


@dataclass(frozen=True)
class Sampler:
    """temp 0 is greedy; otherwise top_k, then top_p, then temperature, in llama.cpp's order.

    top_k 0 and top_p 1 switch those off. The same seed draws the same tokens.
    """

    temp: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temp >= 0 or self.temp == float("inf"):
            raise FqError(f"temperature must be >= 0, not {self.temp}")
        if self.top_k < 0:
            raise FqError(f"top-k must be >= 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise FqError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.seed < 0:
            raise FqError(f"seed must be >= 0, not {self.seed}")

    @cached_property
    def rng(self) -> np.random.Generator:
        """Made at first use: numpy.random is imported by that, and greedy sampling draws nothing."""
        return np.random.default_rng(self.seed)

    @default_fpu()
    def sample(self, logits: np.ndarray) -> int:
        """A token id, from logits float32 (n_vocab,), of which minus infinity is never drawn.

        Raises NotFiniteError where one is NaN or infinity, or all are minus infinity.
        """
        with np.errstate(invalid="ignore"):
            if not np.isfinite(logits.max()):
                raise NotFiniteError("the largest of the logits to sample from is not finite")
        if self.temp == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        values = logits[order].astype(np.float64)
        if self.top_p < 1:
            p = _softmax(values)
            keep = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1
            order, values = order[:keep], values[:keep]
        with np.errstate(over="ignore"):  # a tiny temperature: -inf, so probability 0
            p = _softmax((values - values[0]) / self.temp)
        return int(self.rng.choice(order, p=p))


def _softmax(values: np.ndarray) -> np.ndarray:
    p: np.ndarray = exp(values - values.max())
    p /= p.sum()
    return p


@dataclass
class Timings:
    """Milliseconds and token counts, as llama.cpp splits them: eval is all but the prompt."""

    load_ms: float = 0.0
    prompt_ms: float = 0.0
    prompt_n: int = 0
    eval_ms: float = 0.0
    eval_n: int = 0
    total_ms: float = 0.0


def generate(
    context: Context,
    prompt: Sequence[int],
    n: int,
    sampler: Sampler,
    *,
    stop: frozenset[int] | set[int] = frozenset(),
    batch: int = 512,
    timings: Timings | None = None,
) -> Iterator[int]:
    """Evaluate ``prompt``, then yield up to n tokens (-1: until the context is full).

    A token of ``stop`` ends the text and is not yielded. The last token yielded is never
    evaluated, so n tokens take n - 1 evaluations after the prompt. Raises FqError, at once,
    for an empty prompt or one that does not fit the context, and NotFiniteError in the course of it where
    the logits are not finite.
    """
    timings = timings or Timings()
    if not len(prompt):
        raise FqError("the prompt is empty")
    if context.n_past + len(prompt) > context.n_ctx:
        before = f" after {context.n_past} others" if context.n_past else ""
        raise FqError(f"the prompt has {len(prompt)} tokens{before}, the context {context.n_ctx}")
    if batch < 1:
        raise FqError(f"batch size must be at least 1, not {batch}")
    return _tokens(context, prompt, n, sampler, stop, batch, timings)


def _tokens(
    context: Context,
    prompt: Sequence[int],
    n: int,
    sampler: Sampler,
    stop: frozenset[int] | set[int],
    batch: int,
    timings: Timings,
) -> Iterator[int]:
    start = time.perf_counter()
    n_before, seen = context.n_past, rows_seen(context.fake_quant)
    made: list[Evaluation] = []
    for begin in range(0, len(prompt), batch):
        part = prompt[begin : begin + batch]
        last = begin + len(part) == len(prompt)
        made.append((part, None if last else slice(0, 0)))
        logits = context.eval(*made[-1], decoding=True)
    timings.prompt_ms = (time.perf_counter() - start) * 1e3
    timings.prompt_n = len(prompt)
    produced = 0
    while n < 0 or produced < n:
        if not all_finite(logits):
            who, where = f"after {context.n_past} tokens", {}
            if not n_before:  # else what came before is not known
                where = first_not_finite(
                    context.model,
                    made,
                    context.executor,
                    rules_at(context.fake_quant, seen),
                    context.activations,
                    decoding=True,
                )
            raise NotFiniteError(not_finite_text(who, where))
        token = sampler.sample(logits[-1])
        if token in stop:
            return
        produced += 1
        yield token
        if produced == n or context.n_past == context.n_ctx:
            return
        start = time.perf_counter()
        made.append(([token], None))
        logits = context.eval(*made[-1], decoding=True)
        timings.eval_ms += (time.perf_counter() - start) * 1e3
        timings.eval_n += 1
