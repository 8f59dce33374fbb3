"""The chunks of a text, and what each gives: a baseline's logits compared with those of variants."""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fq_kernels import Executor
from fq_kernels.rules import FakeQuant, Value

from ..errors import FqError, NotFiniteError
from ..run.activations import ACTIVATIONS
from ..run.finite import all_finite, first_not_finite, in_batches, not_finite_text
from ..run.model import Model
from .statistics import Paired, Reference, compare, compare_log_p

ORDERS = ("random", "first")
SCORED = ("second-half", "all")
WORDS_BEFORE = 6  # tokens that are shown before one


@dataclass(frozen=True)
class Settings:
    """On what a measurement is made, and how the model is run for it.

    n_ctx        tokens per chunk
    scored       which positions of a chunk: "second-half", as llama-perplexity, or "all", from the first on
    chunks       how many chunks, -1 for all that the text has
    chunk_order, chunk_seed
                 which of the text's, and in which order: `Chunks`
    batch        tokens per evaluation, but of a chunk where a scale is over a tensor
    activations  "exact" or "ggml" (see Context)

    Raises FqError for what fits no model and no text.
    """

    n_ctx: int = 512
    chunks: int = -1
    chunk_order: str = "random"
    chunk_seed: int | None = None
    batch: int = 512
    activations: str = "exact"
    scored: str = "second-half"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise FqError(f"batch size must be at least 1, not {self.batch}")
        check_activations(self.activations)
        if self.n_ctx < 3:
            raise FqError(f"a context of {self.n_ctx} tokens has nothing to score; take at least 3")
        if self.scored not in SCORED:
            raise FqError(f"scored must be {' or '.join(SCORED)}, not {self.scored!r}")
        if self.chunks == 0 or self.chunks < -1:
            raise FqError(f"chunks must be positive, or -1 for all, not {self.chunks}")
        if self.chunk_order not in ORDERS:
            raise FqError(f"the order of chunks must be {' or '.join(ORDERS)}, not {self.chunk_order!r}")
        if self.chunk_order == "random":
            if not 0 <= self.seed < 1 << 64:
                raise FqError("the seed of the chunks' order must be from 0 to 2**64 - 1")
        elif self.chunk_seed is not None:
            raise FqError(f"a seed of the chunks' order is for random order, not for {self.chunk_order}")

    @classmethod
    def of_run(cls, about: Mapping[str, Any]) -> Settings:
        """Of what a store keeps: `Chunks.about_run`."""
        return cls(
            n_ctx=about["n_ctx"],
            chunks=about["n_chunks_asked"],
            chunk_order=about["chunk_order"],
            chunk_seed=about["chunk_seed"],
            batch=about["batch"],
            activations=about["activations"],
            scored=about.get("scored", SCORED[0]),
        )

    @property
    def seed(self) -> int:
        """Of the random order."""
        return operator.index(self.chunk_seed or 0)

    @property
    def first_scored(self) -> int:
        return first_scored(self.n_ctx, self.scored)

    @property
    def n_scored(self) -> int:
        """Of a chunk."""
        return n_scored_per_chunk(self.n_ctx, self.scored)

    @classmethod
    def changed(cls, settings: Settings | None, changes: Mapping[str, Any]) -> Settings:
        """The settings, or the default ones, but for some. Raises TypeError for one that there is not."""
        return replace(settings or cls(), **changes)


def batch_of(settings: Settings, rules: Iterable[FakeQuant | None]) -> int:
    """Tokens per evaluation: all of a chunk where a scale is over a tensor, which is the chunk's."""
    whole = any(each.whole_tensor for each in rules if each is not None)
    return settings.n_ctx if whole else settings.batch


def check_activations(name: str, whose: str = "") -> None:
    if name not in ACTIVATIONS:
        raise FqError(f"{whose}activations must be {' or '.join(ACTIVATIONS)}, not {name!r}")


def first_scored(n_ctx: int, scored: str = SCORED[0]) -> int:
    """The first position of a chunk whose prediction is scored."""
    return 0 if scored == "all" else n_ctx // 2


def n_scored_per_chunk(n_ctx: int, scored: str = SCORED[0]) -> int:
    return n_ctx - 1 - first_scored(n_ctx, scored)


def chunk_order(n: int, seed: int) -> list[int]:
    """The numbers below n in a random order that is the same on every machine and in every version.

    By the SHA-256 of "seed:number": no library's generator has a say in it.
    """
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


class Chunks:
    """The chunks of a text, tokenised once, that are evaluated, by their position in the run.

    settings name how long they are and how many, and their
    order    "random": the beginning of one permutation of all chunks of the text, so that a longer
             run contains the shorter; "first": the text's first, as llama-perplexity takes them
    seed     of the permutation, 0 if none is given; None where there is none
    n, n_text
             how many are evaluated, how many the text has
    indices  which of the text's each one is, from 0

    Raises FqError for a text that is too short, or a context that does not fit.
    """

    def __init__(self, model: Model, tokens: Sequence[int] | np.ndarray, settings: Settings) -> None:
        ids, n_ctx = np.asarray(tokens, np.int64), settings.n_ctx
        if n_ctx > model.hparams.n_ctx_train:
            raise FqError(f"context of {n_ctx} tokens: the model allows at most {model.hparams.n_ctx_train}")
        if len(ids) < n_ctx:
            raise FqError(f"the text has {len(ids)} tokens; one chunk needs {n_ctx}")
        self.model, self.tokens, self.settings, self.n_ctx = model, ids, settings, n_ctx
        self.n_text = len(ids) // n_ctx
        self.n = self.n_text if settings.chunks == -1 else min(settings.chunks, self.n_text)
        self.order = settings.chunk_order
        self.seed = settings.seed if self.order == "random" else None
        all_of_it = range(self.n_text) if self.seed is None else chunk_order(self.n_text, self.seed)
        self.indices = tuple(all_of_it[: self.n])

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of a chunk, BOS in the first one's place; the scored ones among them)."""
        index = self.indices[position]
        ids = self.tokens[index * self.n_ctx : (index + 1) * self.n_ctx].copy()
        targets = ids[self.settings.first_scored + 1 :].copy()
        tokenizer = self.model.tokenizer
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            ids[0] = tokenizer.bos_id
        return ids, targets

    def where_not_finite(
        self,
        position: int,
        rules: FakeQuant | None,
        executor: Executor,
        activations: str,
        model: Model | None = None,
    ) -> dict[str, Any]:
        """Where in a chunk the logits are first not finite, by an evaluation of its own.

        rules  as they stood before the chunk; their counters go on
        model  another than the text's, with its vocabulary
        """
        ids, _ = self[position]
        batch = batch_of(self.settings, [rules])
        evaluations = in_batches(ids[:-1], self.settings.first_scored, batch)
        where = first_not_finite(model or self.model, evaluations, executor, rules, activations)
        return {"chunk": self.indices[position]} | where

    def about(self) -> dict[str, Any]:
        """Which chunks, as written to JSON."""
        chosen = {"chunk_order": self.order, "chunk_seed": self.seed, "chunk_indices": list(self.indices)}
        return chosen | {"scored": self.settings.scored}

    def about_run(self) -> dict[str, Any]:
        """What is measured, on what, as a store keeps it."""
        rows = rows_of(self.model, self.settings)
        return {
            "model": self.model.path,
            "n_tokens": len(self.tokens),
            "n_ctx": self.n_ctx,
            "n_chunks_asked": self.n,
            **self.about(),
            "batch": self.settings.batch,
            "activations": self.settings.activations,
            "norms": [[*value.place, rows] for value, rows in rows if value.is_norm],
            "values": [[*v.place, rows, v.norm_n, v.duplicate] for v, rows in rows],
        }

    def words(self, position: int, place: int) -> tuple[str, str]:
        """(the text up to a token of a chunk, by its place from 1, some of it; the token after it)."""
        ids, _ = self[position]
        decode = partial(self.model.tokenizer.decode, skip_special=False)
        return decode(ids[max(place - WORDS_BEFORE, 0) : place].tolist()), decode([int(ids[place])])


def rows_of(model: Model, settings: Settings) -> list[tuple[Value, int]]:
    """Each value of a model, and its rows in a chunk."""
    n_tokens = settings.n_ctx - 1, settings.n_scored
    return [(v, node.n_tokens(*n_tokens) * v.rows) for node in model.graph.nodes for v in node.values]


def compared(
    evaluation: Generator[np.ndarray, None, None],
    targets: np.ndarray,
    n: int,
    executor: Executor,
    reference: Reference | None,
    baseline_lost: Callable[[], dict[str, Any]],
    log_p: Sequence[bool] = (),
) -> list[tuple[Paired, bool]]:
    """Each of n variants beside the baseline, and whether its logits are finite.

    evaluation     logits by blocks of rows: of each the baseline's, which hold until the next block, and
                   then each variant's
    reference      what keeps the baseline's part for many variants; None: it is computed for each
    baseline_lost  says where the baseline is not finite
    log_p          of each variant, whether what it is beside is a file's ln p; empty: none is

    Raises NotFiniteError if the baseline's logits are not finite.
    """
    parts: list[list[Paired]] = [[] for _ in range(n)]
    finite = [True] * n
    done = 0
    with contextlib.closing(evaluation):
        for base in evaluation:
            correct = targets[done : done + len(base)]
            done += len(base)
            if not all_finite(base):
                raise NotFiniteError(not_finite_text("baseline", baseline_lost()))
            if reference is not None:
                reference.set(base, correct)
            for i in range(n):
                logits = next(evaluation)
                finite[i] &= all_finite(logits)
                if reference is not None:
                    parts[i].append(reference.compare(logits))
                else:
                    by = compare_log_p if log_p and log_p[i] else compare
                    parts[i].append(by(base, logits, correct, executor))
                del logits  # before the next ones are made
    return [(Paired.concatenate(blocks), one) for blocks, one in zip(parts, finite, strict=True)]
