"""Timing in alternation, so that what disturbs the machine disturbs everything compared."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter_ns

import numpy as np


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contestant:
    """``call`` is timed; ``before`` and ``after`` enclose each of its turns and are not."""

    call: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


def _timed(call: Callable[[], object], calls: int) -> float:
    begin = perf_counter_ns()
    for _ in repeat(None, calls):
        call()
    return (perf_counter_ns() - begin) * 1e-9


def _turn(contestant: Contestant, calls: int) -> float:
    contestant.before()
    try:
        if calls > 1:
            # wakes the threads that are to share the work and puts the data into their caches,
            # for which they must be awake; where one call fills the turn, the first is like any
            # other and would only cost time
            _timed(contestant.call, 1 + calls // 5)
        return _timed(contestant.call, calls) / calls
    finally:
        contestant.after()


def _calls_per_turn(contestant: Contestant, turn: float) -> int:
    contestant.before()
    try:
        calls = 1
        while True:
            spent = min(_timed(contestant.call, calls) for _ in range(2))
            if spent >= turn / 2:
                return max(1, round(calls * turn / spent))
            calls *= 2
    finally:
        contestant.after()


def alternate(
    contestants: Mapping[str, Contestant], rounds: int, *, turn: float = 1e-3, warm_up: int = 2
) -> dict[str, np.ndarray]:
    """Seconds per call of each contestant, one value a round: A B C A B C ...

    A turn repeats the call for about ``turn`` seconds, but at least once. ``warm_up`` rounds more
    than ``rounds`` are run and dropped.
    """
    calls = {name: _calls_per_turn(c, turn) for name, c in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into one contestant's turn
    try:
        for _ in range(warm_up + rounds):
            for name, contestant in contestants.items():
                seconds[name].append(_turn(contestant, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(values[warm_up:]) for name, values in seconds.items()}


def _threads_of_this_process() -> set[int]:
    return {int(tid) for tid in os.listdir("/proc/self/task")}


@contextmanager
def own_processors(start_threads: Callable[[], object]) -> Iterator[None]:
    """Inside the block the calling thread has one processor and the threads that
    ``start_threads`` starts have the others.

    Left alone, the scheduler often puts a worker that wakes up for a millisecond beside its
    caller, and the two take turns: what is timed is that, by chance.
    """
    processors = sorted(os.sched_getaffinity(0))
    before = _threads_of_this_process()
    start_threads()
    workers = sorted(_threads_of_this_process() - before)
    if len(processors) < 2:
        yield
        return
    for i, tid in enumerate(workers):
        os.sched_setaffinity(tid, {processors[1 + i % (len(processors) - 1)]})
    os.sched_setaffinity(0, {processors[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, processors)


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)
