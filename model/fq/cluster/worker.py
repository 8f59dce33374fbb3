"""What a worker runs of a sweep, in a process of its own on any machine.

It gets the job once: the text as token ids, the cells, and by what digest to know the model, which it opens
from a folder of its own. A task is a chunk and some cells; what they left goes back. Nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fq_kernels import CONTRACT, Executor, isa

from .. import machine
from ..errors import FqError
from ..gguf import cache
from ..measure.cells import Cell, CellChunk
from ..measure.chunks import Settings
from ..measure.statistics import Paired
from ..measure.sweep import Sweep
from ..provenance import sha256_of
from ..run.model import Model


class UnknownJobError(Exception):
    """A worker that was started anew, and has to be told."""


@dataclass(frozen=True)
class ModelFiles:
    """How a worker knows a model.

    paths   of its parts, where the sweep was begun
    sha256  of all parts, one after the other; n_bytes: how many
    """

    paths: tuple[str, ...]
    sha256: str
    n_bytes: int


@dataclass(frozen=True)
class Job:
    """A sweep as a worker is told of it.

    key           no two jobs of a cluster have the same
    model         and base_model, whose the baseline is where that is another file
    model_folder  where workers look for them, besides; None: nowhere else
    tokens        of the chunks that are run, one after the other, int32
    settings      with which these are the text's first
    threads       of each worker, and memory_limit, as of `Sweep`; None: what the worker has
    """

    key: str
    model: ModelFiles
    base_model: ModelFiles | None
    model_folder: str | None
    tokens: np.ndarray
    cells: tuple[Cell, ...]
    baseline: tuple[str, ...]
    settings: Settings
    threads: int | None
    memory_limit: int | None


@dataclass(frozen=True)
class Left:
    """What some cells left of a chunk, in few arrays.

    cells       their numbers
    base        of all: nll and largest probability of the baseline, float64 (2, tokens)
    figures     nll, kld and dp, float64 (cells, 3, tokens)
    same_top    bool (cells, tokens)
    counts      of each cell
    not_finite  by cell: where its logits were first not finite
    """

    chunk: int
    cells: tuple[int, ...]
    base: np.ndarray
    figures: np.ndarray
    same_top: np.ndarray
    counts: list[np.ndarray]
    not_finite: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, chunk: int, found: dict[int, CellChunk], not_finite: dict[int, dict[str, Any]]) -> Left:
        pairs = [left.paired for left in found.values()]
        return cls(
            chunk,
            tuple(found),
            np.stack([pairs[0].nll_base, pairs[0].p_top_base]),
            np.stack([[p.nll, p.kld, p.dp] for p in pairs]),
            np.stack([p.same_top for p in pairs]),
            [left.counts for left in found.values()],
            not_finite,
        )

    def __iter__(self) -> Iterator[tuple[int, CellChunk]]:
        """Cell, and what it left."""
        nll_base, p_top = self.base
        for i, figures, same_top, counts in zip(
            self.cells, self.figures, self.same_top, self.counts, strict=True
        ):
            nll, kld, dp = figures
            yield i, CellChunk(Paired(nll_base, nll, kld, dp, same_top, p_top), counts)


@dataclass
class _Open:
    """A job, the model found, and the sweep of the cells that were run last."""

    job: Job
    model: Model
    base_model: Model | None
    executor: Executor
    cells: tuple[int, ...] = ()
    sweep: Sweep | None = field(default=None)


_jobs: dict[str, _Open] = {}
_digests: dict[tuple[str, int, int], str] = {}
_one_at_a_time = threading.Lock()  # a worker may have threads for several tasks, and fq has its own


def describe(job: Job | None = None) -> dict[str, Any]:
    """A worker and its machine; with a job also where its models are, or what the worker ``lacks``."""
    about: dict[str, Any] = {
        "contract": CONTRACT,
        "isa": isa(),
        "threads": _threads(),
        "versions": machine.versions(),
        "machine": machine.describe(),
    }
    if job is not None:
        try:
            about["model"] = str(find_model(job.model, job.model_folder))
            if job.base_model is not None:
                about["base_model"] = str(find_model(job.base_model, job.model_folder))
        except FqError as e:
            about["lacks"] = str(e)
    return about


def _threads() -> int:
    """Those that Dask would run tasks on: ours, as they run one at a time."""
    with contextlib.suppress(ImportError, ValueError):
        from distributed import get_worker

        return int(get_worker().state.nthreads)
    return machine.default_threads()


def _memory() -> int | None:
    free = machine.available_memory()
    return None if free is None else free // 2


def begin(job: Job) -> dict[str, Any]:
    """Get ready for a job's tasks: what `describe` says, and ``lacks`` where there is no such model."""
    with _one_at_a_time:
        about = describe(job)
        if "lacks" not in about:
            if job.key not in _jobs:
                _jobs.clear()  # one job's models in memory
                threads = about["threads"] if job.threads is None else job.threads
                base = Model(Path(about["base_model"])) if "base_model" in about else None
                _jobs[job.key] = _Open(job, Model(Path(about["model"])), base, Executor(threads))
            about["threads"] = _jobs[job.key].executor.threads
        return about


def run(key: str, chunk: int, cells: Sequence[int]) -> Left:
    """A task. Raises UnknownJobError before `begin`, and NotFiniteError for a baseline that is lost.

    What is said of logits that are not finite counts chunks as they are run.
    """
    with _one_at_a_time:
        if key not in _jobs:
            raise UnknownJobError(key)
        at = _jobs[key]
        if at.sweep is None or at.cells != tuple(cells):
            at.cells = tuple(cells)
            at.sweep = Sweep(
                at.model,
                at.job.tokens,
                [at.job.cells[i] for i in cells],
                baseline=at.job.baseline,
                base_model=at.base_model,
                executor=at.executor,
                memory_limit=_memory() if at.job.memory_limit is None else at.job.memory_limit,
                settings=at.job.settings,
            )
        sweep = at.sweep
        for _ in sweep.run(chunk, range(len(cells))):
            pass
        found = {i: sweep.finished.pop((k, chunk)) for k, i in enumerate(cells)}
        lost = {cells[k]: where for k, where in sweep.not_finite.items()}
        sweep.not_finite.clear()
        return Left.of(chunk, found, lost)


def find_model(model: ModelFiles, beside: str | None) -> Path:
    """The first part of a model here, or in the folder ``beside``. Raises FqError where no file is that."""
    files = [Path(path) for path in model.paths]
    tried = []
    for folder in _folders(beside, files[0]):
        parts = [folder / file.name for file in files]
        if not all(part.is_file() for part in parts) or sum(map(_size, parts)) != model.n_bytes:
            continue
        if _sha256(parts) == model.sha256:
            return parts[0]
        tried.append(str(parts[0]))
    other = f"; {', '.join(tried)} has the size, but is another" if tried else ""
    where = beside or f"{files[0].parent}, or in fq's cache (--worker-model-dir names a folder)"
    raise FqError(f"no {files[0].name} with SHA-256 {model.sha256[:12]}… in {where}{other}")


def _folders(beside: str | None, first: Path) -> Iterator[Path]:
    if beside is not None:
        yield Path(beside)
    yield first.parent
    folder = Path(cache.cache_folder())
    yield folder
    if folder.is_dir():
        yield from (sub for sub in sorted(folder.iterdir()) if sub.is_dir())


def _size(path: Path) -> int:
    return path.stat().st_size


def _sha256(paths: Sequence[Path]) -> str:
    """Kept for as long as nothing about the files changes."""
    stats = [path.stat() for path in paths]
    key = os.fspath(paths[0].resolve()), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
    if key not in _digests:
        _digests[key] = sha256_of(*paths)
    return _digests[key]
