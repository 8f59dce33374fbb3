"""How far a command is: bars on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from ..measure.streams import Streams

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Measurement(Protocol[T_co]):
    """What is iterated over to run it. ``on_step`` is called for each of the ``steps`` that are left."""

    on_step: Callable[[], Any]

    @property
    def steps(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


def progress(run: Measurement[T], where: Callable[[T], str], line: Callable[[T], str | None]) -> Iterator[T]:
    """Run a measurement with a bar and an ETA on a terminal, and a `Log`'s lines elsewhere.

    where  what the bar says once an item has ended; line: the log's line of it, None for none
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # some terminals say 0
        form = "{desc} |{bar}| {percentage:.0f} %, {elapsed}, {remaining} left"
        with tqdm(
            total=run.steps,
            file=sys.stderr,
            leave=False,
            dynamic_ncols=sized,
            ncols=None if sized else 80,
            bar_format=form,
        ) as bar:
            run.on_step = bar.update
            for item in run:
                bar.set_description_str(where(item), refresh=False)
                yield item
        return
    log = Log(run.steps)
    run.on_step = log.step
    for item in run:
        yield item  # what is said to have ended, the caller has kept
        if (said := line(item)) is not None:
            log.line(said)


def by_chunk(run: Streams) -> Iterator[int]:
    """`progress` of streams over a text."""

    def where(_: int) -> str:
        return f"[{run.done}/{run.n_chunks}] PPL {run.ppl:.4f}"

    return progress(run, where, where)


class Log:
    """Progress on stderr as lines of a log, for where it is no terminal, with the time that is left.

    ``step`` says how far it is FIRST seconds after the beginning, so that nobody waits long for a word,
    and then EVERY so many seconds after the last line; ``line`` says at once what has ended.
    """

    FIRST, EVERY = 5.0, 30.0

    def __init__(self, steps: int, what: str = "") -> None:
        self.steps, self.done, self.what = steps, 0, what
        self._start = time.perf_counter()
        self._due = self._start + self.FIRST

    def step(self) -> None:
        self.at(self.done + 1)

    def at(self, done: int) -> None:
        self.done = done
        if time.perf_counter() >= self._due:
            self.line(f"{self.what} {100 * done / max(self.steps, 1):.0f} %".strip())

    def line(self, what: str) -> None:
        now = time.perf_counter()
        elapsed, self._due = now - self._start, now + self.EVERY
        left = elapsed / max(self.done, 1) * (self.steps - self.done)
        print(f"{what}  {elapsed:.1f} s, {left:.0f} s left", file=sys.stderr, flush=True)


def steps(what: str, iterable: Iterable[T], n: int, unit: str = "it") -> Iterator[T]:
    """The same, with a bar on a terminal and lines of a `Log` elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, total=n, desc=what, unit=unit, leave=False)
        return
    log = Log(n, what)
    for item in iterable:
        yield item
        log.step()


def note(text: str) -> None:
    """A line on stderr, above a progress bar if there is one."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(f"fq: {text}", file=sys.stderr)
    else:
        print(f"fq: {text}", file=sys.stderr, flush=True)
