"""A sweep that the workers of a cluster run, and this process keeps."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..cluster.spread import ALONE_SECONDS, BaselineLostError, Pool, Spread, tasks_of
from ..cluster.worker import Job, ModelFiles
from ..errors import FqError
from ..measure.sweep import Sweep
from ..results.merge import together
from ..results.run import Run
from ..results.runs import OtherBitsError, Results
from ..run.model import Model
from .options import memory_limit_of
from .progress import note


def files_of(model: Model, digest: str) -> ModelFiles:
    """digest: the SHA-256 of its parts."""
    files = tuple(map(os.path.abspath, model.file.paths))
    return ModelFiles(files, digest, sum(map(os.path.getsize, files)))


def job_of(
    model: ModelFiles,
    folder: str | None,
    threads: int | None = None,
    memory_limit: int | None = None,
    sweep: Sweep | None = None,
    base_model: ModelFiles | None = None,
) -> Job:
    """sweep: None where workers are only asked whether they have the model."""
    about: dict[str, Any] = {"tokens": np.empty(0, np.int32), "cells": (), "baseline": (), "settings": None}
    if sweep is not None:
        text, n = sweep.text, sweep.text.n_ctx
        about = {
            "tokens": np.concatenate([text.tokens[i * n : (i + 1) * n] for i in text.indices]).astype(
                np.int32
            ),
            "cells": sweep.cells,
            "baseline": sweep.baseline,
            "settings": replace(sweep.settings, chunk_order="first", chunk_seed=None, chunks=text.n),
        }
    return Job(
        key=uuid.uuid4().hex,
        model=model,
        base_model=base_model,
        model_folder=folder,
        threads=threads,
        memory_limit=memory_limit,
        **about,
    )


def worker_limit(text: str | None, pool: Pool) -> int | None:
    """Of --memory-limit, bytes of each worker. By default those on this machine divide half of what is free;
    None: elsewhere each sees for itself."""
    if text is not None:
        return memory_limit_of(text)
    if pool.n_here is None or (free := memory_limit_of(None)) is None:
        return None
    return free // pool.n_here


def _n_workers(pool: Pool) -> int:
    """After some time for the first of them: tasks are cut for as many as there are."""
    end = time.monotonic() + ALONE_SECONDS
    while not (there := pool.workers()) and time.monotonic() < end:
        time.sleep(0.1)
    return max(len(there), 1)


class OnWorkers:
    """As a `Sweep` is run: what a task left is committed, and its cells and chunks are yielded.

    Of each worker that had a part in it the run says what it is.
    """

    def __init__(
        self, sweep: Sweep, pool: Pool, job: Job, store: Results, number: int, before: Run | None
    ) -> None:
        self.sweep, self.store, self.number = sweep, store, number
        self._of_run = [] if before is None else [before]
        to_do = [
            (chunk, [i for i in sweep.mine(chunk) if (i, chunk) not in sweep.finished])
            for chunk in range(sweep.text.n)
        ]
        self._spread = Spread(pool, job, tasks_of(to_do, _n_workers(pool)), note)
        self._seen: set[str] = set()

    @property
    def steps(self) -> int:
        return self._spread.steps

    @property
    def on_step(self) -> Callable[[], Any]:
        return self._spread.on_step

    @on_step.setter
    def on_step(self, function: Callable[[], Any]) -> None:
        self._spread.on_step = function

    @property
    def n_workers(self) -> int:
        return self._spread.n_workers

    def __iter__(self) -> Iterator[tuple[int, int]]:
        try:
            for left, about in self._spread:
                try:
                    with self.store.writing():
                        self._note(about)
                        for i, cell in left:
                            self.store.put(self.number, i, left.chunk, cell)
                except OtherBitsError as e:
                    raise FqError(
                        f"{e} has other bits on a worker with {about['machine'].get('processor')}, "
                        f"{about['isa']}, than in run {self.number}: one of them computes wrongly"
                    ) from None
                for i, where in left.not_finite.items():
                    index = self.sweep.text.indices[left.chunk]
                    self.sweep.not_finite.setdefault(i, where | {"chunk": index})
                for i, cell in left:
                    self.sweep.finished[i, left.chunk] = cell
                    yield i, left.chunk
        except BaselineLostError as e:
            yield from self.sweep.run(e.task.chunk, e.task.cells[:1])  # which says where
            raise FqError(f"a worker's baseline is not finite in {e}, and here it is") from None

    def _note(self, about: Mapping[str, Any]) -> None:
        """What a worker is, in the run that it has a part in, once."""
        if (key := repr(about)) in self._seen:
            return
        self._seen.add(key)
        run = self.store.get(self.number)
        if self._of_run:  # others may have noted theirs meanwhile
            self._of_run.append(run)
        numerics = run.numerics | {"isa": about["isa"], "threads": about["threads"]}
        mine = replace(run, numerics=numerics, versions=about["versions"], machine=about["machine"])
        self._of_run.append(mine)
        whole = replace(
            run,
            numerics=together(one.numerics for one in self._of_run),
            versions=together(one.versions for one in self._of_run),
            machine=together(one.machine for one in self._of_run),
        )
        self.store.replace(self.number, whole)
