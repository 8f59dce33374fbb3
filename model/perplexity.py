"""Perplexity by llama.cpp's definition, with the baseline, the rules and the control side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import Executor
from fq_kernels.rules import FakeQuant

from .activations import ACTIVATIONS
from .errors import FqError
from .runner import Context, Model
from .statistics import Paired, compare, is_exactly_zero, ppl_se, score, summarise
from .trace import Trace

DEFAULT_BATCH = 512


def first_scored(n_ctx: int) -> int:
    """The first position of a chunk whose prediction is scored."""
    return n_ctx // 2


def n_scored_per_chunk(n_ctx: int) -> int:
    return n_ctx - 1 - first_scored(n_ctx)


class _Chunk(NamedTuple):
    """A chunk's figures: nll of the stream asked for, and the comparisons that were asked for."""

    nll: np.ndarray
    paired: Paired | None
    control: Paired | None


class Perplexity:
    """One measurement; iterate over it to run it, chunk by chunk.

    model, tokens  the whole text, tokenised once
    n_ctx          tokens per chunk; the second half of each chunk is scored
    chunks         how many chunks, -1 for all that the text has
    fake_quant     the rules of the quantised stream; None: the baseline alone
    baseline       with rules, also run the model without them and compare
    control        also run the baseline a second time; every difference must be exactly 0
    batch          tokens per evaluation
    trace          gets the kernel calls, labelled with stream and chunk (from 0)
    activations    "exact" or "ggml" (see Context)
    baseline_activations
                   the baseline's, where they differ: then the stream is compared with it, with
                   or without rules

    ``for chunk in run: ...`` yields each chunk's index as it ends; ``run.result()`` gives the
    figures of the chunks that ended so far, so an interrupted run loses at most one chunk.
    Raises FqError for a text that is too short or a context that does not fit.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        *,
        n_ctx: int = 512,
        chunks: int = -1,
        fake_quant: FakeQuant | None = None,
        baseline: bool = True,
        control: bool = False,
        executor: Executor,
        batch: int = DEFAULT_BATCH,
        trace: Trace | None = None,
        activations: str = "exact",
        baseline_activations: str | None = None,
    ) -> None:
        ids = np.asarray(tokens, np.int64)
        if n_ctx < 3:
            raise FqError(f"a context of {n_ctx} tokens has nothing to score; take at least 3")
        if batch < 1:
            raise FqError(f"batch size must be at least 1, not {batch}")
        if n_ctx > model.hparams.n_ctx_train:
            raise FqError(f"context of {n_ctx} tokens: the model allows at most {model.hparams.n_ctx_train}")
        if len(ids) < n_ctx:
            raise FqError(f"the text has {len(ids)} tokens; one chunk needs {n_ctx}")
        if chunks == 0 or chunks < -1:
            raise FqError(f"chunks must be positive, or -1 for all, not {chunks}")
        self.model, self.tokens, self.n_ctx, self.batch = model, ids, n_ctx, batch
        self.n_chunks_text = len(ids) // n_ctx
        self.n_chunks = self.n_chunks_text if chunks == -1 else min(chunks, self.n_chunks_text)
        self.fake_quant = fake_quant
        self.activations = activations
        self.baseline_activations = baseline_activations or activations
        # whether there is a stream beside the baseline
        self.with_stream = fake_quant is not None or self.baseline_activations != activations
        self.with_baseline = not self.with_stream or baseline
        self.with_control = control
        if control and not self.with_baseline:
            raise FqError("the control is a second baseline: it needs the baseline")
        self.executor = executor
        self.context = Context(model, n_ctx, executor, activations=activations)
        if self.baseline_activations not in ACTIVATIONS:
            raise FqError(
                f"baseline activations must be {' or '.join(ACTIVATIONS)}, not {baseline_activations!r}"
            )
        self.trace = trace
        self._no_rules = FakeQuant(model.norms)
        self._chunks: list[_Chunk] = []

    @property
    def done(self) -> int:
        """Chunks that ended."""
        return len(self._chunks)

    @property
    def nll(self) -> list[np.ndarray]:
        """Of the stream asked for, per chunk."""
        return [chunk.nll for chunk in self._chunks]

    @property
    def paired(self) -> list[Paired]:
        return [chunk.paired for chunk in self._chunks if chunk.paired is not None]

    @property
    def control_paired(self) -> list[Paired]:
        return [chunk.control for chunk in self._chunks if chunk.control is not None]

    def __iter__(self) -> Iterator[int]:
        while self.done < self.n_chunks:
            index = self.done
            counters = copy.deepcopy(self.fake_quant.counters) if self.fake_quant else None
            try:
                # one append keeps all of a chunk's figures, or none, whenever Ctrl-C comes
                self._chunks.append(self._run_chunk(index))
            except BaseException:
                if self.done == index and self.fake_quant and counters is not None:
                    # the unfinished chunk's rows are in no figure
                    self.fake_quant.counters = counters
                raise
            yield index

    def _run_chunk(self, index: int) -> _Chunk:
        ids = self.tokens[index * self.n_ctx : (index + 1) * self.n_ctx].copy()
        targets = ids[first_scored(self.n_ctx) + 1 :].copy()
        tokenizer = self.model.tokenizer
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            ids[0] = tokenizer.bos_id
        paired = control = None
        self._trace_as("baseline", index)
        base = self._logits(ids, self._no_rules, self.baseline_activations) if self.with_baseline else None
        if not self.with_stream:
            assert base is not None
            nll = score(base, targets, self.executor)
        else:
            self._trace_as("quantised", index)
            logits = self._logits(ids, self.fake_quant or self._no_rules, self.activations)
            if base is None:
                nll = score(logits, targets, self.executor)
            else:
                paired = compare(base, logits, targets, self.executor)
                nll = paired.nll
            del logits
        if self.with_control:
            assert base is not None
            self._trace_as("control", index)
            again = self._logits(ids, self._no_rules, self.baseline_activations)
            control = compare(base, again, targets, self.executor)
        return _Chunk(nll, paired, control)

    def _trace_as(self, stream: str, chunk: int) -> None:
        self.context.trace = self.trace and self.trace.labelled(stream=stream, chunk=chunk)

    def _logits(self, ids: np.ndarray, fake_quant: FakeQuant, activations: str) -> np.ndarray:
        """Logits of the scored positions, float32 (n_scored, n_vocab)."""
        self.context.clear()
        self.context.rules = fake_quant
        self.context.activations = activations
        first, last = first_scored(self.n_ctx), self.n_ctx - 1
        parts = []
        for begin in range(0, last, self.batch):
            end = min(begin + self.batch, last)
            wanted = slice(max(first - begin, 0), max(end - begin, 0))
            part = self.context.eval(ids[begin:end], wanted)
            if len(part):
                parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def ppl(self) -> float:
        """Of the chunks so far, of the stream asked for."""
        return ppl_se(np.concatenate(self.nll))[0]

    def result(self) -> dict[str, Any]:
        """The figures of the chunks that ended, as written to JSON; chunks[].nll is a mean in nats."""
        cumulative, total, count = [], 0.0, 0
        for nll in self.nll:
            total += float(nll.sum())
            count += len(nll)
            cumulative.append(math.inf if total / count >= 700 else math.exp(total / count))
        chunks: list[dict[str, float]] = [
            {"nll": float(nll.mean()), "ppl_cumulative": ppl}
            for nll, ppl in zip(self.nll, cumulative, strict=True)
        ]
        ppl, se = ppl_se(np.concatenate(self.nll)) if self.nll else (math.nan, math.nan)
        for chunk, paired in zip(chunks, self.paired, strict=False):
            chunk["nll_base"] = float(paired.nll_base.mean())
            chunk["mean_kld"] = float(paired.kld.mean())
        result: dict[str, Any] = {
            "model": self.model.path,
            "n_tokens": len(self.tokens),
            "n_ctx": self.n_ctx,
            "n_chunks": self.done,
            "n_chunks_asked": self.n_chunks,
            "partial": self.done < self.n_chunks,
            "n_scored": count,
            "activations": self.activations,
            "ppl": ppl,
            "ppl_se": se,
            "chunks": chunks,
        }
        if self.fake_quant is not None:
            result["fake_quant"] = self.fake_quant.as_dict()
        if self.paired:
            result["baseline_activations"] = self.baseline_activations
            result["comparison"] = summarise(self.paired)
        if self.control_paired:
            control = summarise(self.control_paired)
            result["control"] = control | {"exactly_zero": is_exactly_zero(control)}
        return result
