"""Who runs what: a job's tasks on workers that come, go, hang and are refused.

A worker has a task or two at a time. A task whose worker is gone is given to another; one that takes far
longer than the others is given to another too, and whichever ends first counts: bits are the same. So with
a worker nothing is lost but its running task.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, Protocol

from fq_kernels import CONTRACT

from ..errors import FqError, NotFiniteError
from . import worker
from .worker import Job, Left, UnknownJobError

AHEAD = 2  # tasks of a worker, so that none waits for its next
LOOK_SECONDS = 1.0  # between two looks at who is there
ALONE_SECONDS = 5.0  # after which it is said that there are no workers
LATE_SECONDS, LATE = 60.0, 5.0  # at least, and times the median, after which a task is given to another too
TRIES = 5  # of a task that fails
FAILURES = 3  # one after another, after which a worker is refused, where there are others
TASKS_EACH = 3  # of a worker, at least, so that all end at about the same time
LEAST_CELLS = 8  # of a task: its chunk's baseline is evaluated again for each


class Task(NamedTuple):
    chunk: int
    cells: tuple[int, ...]


class BaselineLostError(Exception):
    """The logits of a chunk's baseline are not finite, which a task was the first to see."""

    def __init__(self, task: Task) -> None:
        super().__init__(f"chunk {task.chunk + 1}")
        self.task = task


class LostError(Exception):
    """A worker, or the connection to it, is lost, whatever it was that it did."""


class Handle(Protocol):
    """Of what a worker was given."""

    def cancel(self) -> None: ...


class Pool(Protocol):
    """The workers of a cluster.

    n_here  how many they are where all are processes on this machine, which share its memory; None elsewhere
    """

    n_here: int | None

    def workers(self) -> dict[str, str]:
        """Address and name of each that is there."""

    def start(
        self, address: str, done: Callable[[Any, BaseException | None], None], function: Any, *args: Any
    ) -> Handle:
        """Run a function there; ``done`` is called with its result, or what it raised, by any thread."""


def tasks_of(to_do: Sequence[tuple[int, Sequence[int]]], n_workers: int) -> list[Task]:
    """to_do: chunks, and of each the cells that are yet to be run. Few tasks, but enough for all workers."""
    chunks = [(chunk, cells) for chunk, cells in to_do if cells]
    tasks = []
    for chunk, cells in chunks:
        wanted = -(-TASKS_EACH * n_workers // len(chunks))
        parts = max(min(wanted, len(cells) // LEAST_CELLS), 1)
        ends = [len(cells) * k // parts for k in range(parts + 1)]
        tasks += [Task(chunk, tuple(cells[a:b])) for a, b in pairwise(ends)]
    return tasks


@dataclass
class _Given:
    """A task that a worker has."""

    task: Task
    since: float
    handle: Handle


@dataclass
class _Worker:
    """given: by number. about: what it said of itself; None until it has. failures: one after another."""

    name: str
    about: dict[str, Any] | None = None
    given: dict[int, _Given] = field(default_factory=dict)
    failures: int = 0


class Spread:
    """A job's tasks; iterate over it to run them: what each left is yielded, and what its worker says it is.

    say      told of workers that come, go or are refused
    refused  by name of a worker, why

    Raises FqError where all workers are refused, or a task fails again and again, and BaselineLostError.
    """

    def __init__(self, pool: Pool, job: Job, tasks: Sequence[Task], say: Callable[[str], None]) -> None:
        self.pool, self.job, self.say = pool, job, say
        self.refused: dict[str, str] = {}
        self.on_step: Callable[[], Any] = lambda: None
        self._waiting = deque(tasks)
        self._left = set(tasks)
        self._failed: dict[Task, list[str]] = {}  # at which addresses
        self._workers: dict[str, _Worker] = {}
        self._said: dict[str, dict[str, Any]] = {}  # by address, of those that are gone too
        self._events: queue.SimpleQueue[tuple[str, int, Any, BaseException | None]] = queue.SimpleQueue()
        self._numbers = iter(range(1 << 62))
        self._asked: dict[int, Task | None] = {}  # None: to begin
        self._seconds: list[float] = []

    @property
    def steps(self) -> int:
        return sum(len(task.cells) for task in self._left)

    @property
    def n_workers(self) -> int:
        """That are ready."""
        return sum(each.about is not None for each in self._workers.values())

    def __iter__(self) -> Iterator[tuple[Left, dict[str, Any]]]:
        look, alone = 0.0, time.monotonic() + ALONE_SECONDS
        try:
            while self._left:
                now = time.monotonic()
                if now >= look:
                    self._look()
                    look = now + LOOK_SECONDS
                    if any(each.name not in self.refused for each in self._workers.values()):
                        alone = now + ALONE_SECONDS
                    elif now >= alone:
                        self.say("there are no workers: waiting")
                        alone = float("inf")
                self._give(now)
                try:
                    event = self._events.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    continue
                if (found := self._ended(*event)) is not None:
                    for _ in found[0].cells:
                        self.on_step()
                    yield found
        finally:
            for each in self._workers.values():
                for given in each.given.values():
                    given.handle.cancel()

    def _look(self) -> None:
        """At who has come, and who has gone."""
        there = self.pool.workers()
        for address in [address for address in self._workers if address not in there]:
            self._lose(address, f"worker {self._workers[address].name} is gone")
        for address, name in there.items():
            if address not in self._workers:
                self._workers[address] = _Worker(name)
                self._begin(address)
        if all(each.name in self.refused for each in self._workers.values()):
            for address, each in self._workers.items():
                if each.failures >= FAILURES:  # the others are gone
                    each.failures = 0
                    del self.refused[each.name]
                    self._begin(address)

    def _lose(self, address: str, what: str) -> None:
        """A worker that may come back: what it has is given to others."""
        gone = self._workers.pop(address)
        if gone.name not in self.refused:
            self.say(what)
        for given in gone.given.values():
            given.handle.cancel()
        self._again([given.task for given in gone.given.values()])

    def _begin(self, address: str) -> None:
        self._workers[address].about = None
        self._start(address, None, worker.begin, self.job)

    def _start(self, address: str, task: Task | None, function: Any, *args: Any) -> None:
        number = next(self._numbers)

        def done(result: Any, error: BaseException | None) -> None:
            self._events.put((address, number, result, error))

        self._asked[number] = task
        handle = self.pool.start(address, done, function, *args)
        if task is not None:
            self._workers[address].given[number] = _Given(task, time.monotonic(), handle)

    def _again(self, tasks: Iterable[Task]) -> None:
        """First of all, as all else may wait for them; but not what another has too."""
        has = {given.task for each in self._workers.values() for given in each.given.values()}
        for task in tasks:
            if task in self._left and task not in has and task not in self._waiting:
                self._waiting.appendleft(task)

    def _give(self, now: float) -> None:
        ready = [(a, each) for a, each in self._workers.items() if each.about is not None]
        for ahead in range(AHEAD):  # one each, before any has two
            for address, each in ready:
                if len(each.given) != ahead:
                    continue
                task = self._next(address) or self._late(now, address)
                if task is not None:
                    self._start(address, task, worker.run, self.job.key, task.chunk, task.cells)

    def _next(self, address: str) -> Task | None:
        """The first that waits, but for what has failed there and may not elsewhere."""
        ready = {a for a, each in self._workers.items() if each.about is not None}
        for k, task in enumerate(self._waiting):
            failed = self._failed.get(task, ())
            if address not in failed or ready <= set(failed):
                del self._waiting[k]
                return task
        return None

    def _late(self, now: float, address: str) -> Task | None:
        """A task that others alone have, and each of them for far too long."""
        if self._workers[address].given:
            return None
        limit = max(LATE_SECONDS, LATE * median(self._seconds)) if self._seconds else LATE_SECONDS * LATE
        ages: dict[Task, float] = {}
        for each in self._workers.values():
            for k, given in enumerate(each.given.values()):
                if given.task in self._left:
                    # one behind another may take as long once more
                    age = now - given.since - k * limit
                    ages[given.task] = min(ages.get(given.task, age), age)
        return next((task for task, age in ages.items() if age > limit), None)

    def _ended(
        self, address: str, number: int, result: Any, error: BaseException | None
    ) -> tuple[Left, dict[str, Any]] | None:
        task, each = self._asked.pop(number), self._workers.get(address)
        if isinstance(error, LostError):
            if each is not None and (task is None or number in each.given):
                self._lose(address, f"worker {each.name} is lost: {error}")
            return None
        if task is None:
            if each is not None:
                self._begun(address, each, result, error)
            return None
        given = None if each is None else each.given.pop(number, None)
        if isinstance(error, NotFiniteError):
            raise BaselineLostError(task)
        if error is None:
            # of a worker that was taken for gone, too, as where the connection to the scheduler was cut
            if task in self._left and (about := self._said.get(address)) is not None:
                self._left.discard(task)
                if given is not None and each is not None:
                    self._seconds.append(time.monotonic() - given.since)
                    each.failures = 0
                return result, about
        elif each is not None and given is not None:
            if isinstance(error, UnknownJobError):  # started anew, under the same address
                if each.about is not None:
                    self._begin(address)
                self._again([task])
            else:
                self._failure(address, each, task, error)
        return None

    def _begun(self, address: str, each: _Worker, result: Any, error: BaseException | None) -> None:
        if error is not None:
            why = f"{type(error).__name__}: {error}"
        elif result["contract"] != CONTRACT:
            why = f"its contract of numerics is {result['contract']}, not {CONTRACT}"
        elif "lacks" in result:
            why = result["lacks"]
        else:
            each.about = self._said[address] = result
            self.refused.pop(each.name, None)
            self.say(f"worker {each.name}: {result['isa']}, {result['threads']} threads")
            return
        self._refuse(each, why)
        if all(other.name in self.refused for other in self._workers.values()):
            raise FqError(f"no worker can run this: {each.name}: {why}")

    def _refuse(self, each: _Worker, why: str) -> None:
        each.about = None
        self.refused[each.name] = why
        self.say(f"worker {each.name} is refused: {why}")

    def _failure(self, address: str, each: _Worker, task: Task, error: BaseException) -> None:
        failed = self._failed.setdefault(task, [])
        failed.append(address)
        what = f"{type(error).__name__}: {error}"
        each.failures += 1
        self._again([task])
        if each.failures >= FAILURES and self.n_workers > 1:
            self._refuse(each, f"{each.failures} tasks failed there, the last by {what}")
            had, each.given = each.given, {}
            self._again([given.task for given in had.values()])
        elif len(failed) >= TRIES and (self.n_workers < 2 or len(set(failed)) > 1):
            which = f"cells {task.cells[0]} to {task.cells[-1]} of chunk {task.chunk + 1}"
            raise FqError(f"{which} failed {len(failed)} times, last on {each.name}: {what}")
