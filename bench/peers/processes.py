"""The two programs as processes: workers that take turns, and command lines timed as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fq import FqError

SPAWN = Path(__file__).with_name("spawn.py")
# Of the other's turn: what a process may use of the processor while it is not its turn
IDLE_SHARE, IDLE_SECONDS = 0.005, 0.002
SETTLE_SECONDS, LOOK_SECONDS = 2.0, 0.01


class Worker:
    """A process that reads a command a line, a word and whole numbers, and answers ``ok`` and numbers.

    Its first line, when it is ready, is an answer too: ``greeting``. Raises FqError, with what
    the process says, when it ends or answers something else.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self.greeting = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, word: str, numbers: Iterable[int]) -> list[float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word} {' '.join(map(str, numbers))}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it ended comes with the answer
        return self._answer()

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        words = line.split()
        if words[:1] != ["ok"]:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise FqError(f"{self.name}: {line.strip() or (said or ['ended without a word'])[-1]}")
        return [float(word) for word in words[1:]]

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far."""
        # the clock's number as clock_getcpuclockid(3) makes it
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def settle(self) -> None:
        """Wait until it uses the processor no more: threads may look for work for a while after a turn."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            before = self.cpu_seconds()
            time.sleep(LOOK_SECONDS)
            if self.cpu_seconds() - before < IDLE_SHARE * LOOK_SECONDS:
                return
            if time.monotonic() > deadline:
                raise FqError(f"{self.name} goes on using the processor between its turns")


class Idle:
    """Raises FqError if ``worker`` was not idle while the ``with`` block ran."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __enter__(self) -> None:
        self.worker.settle()
        self._begin, self._cpu = time.monotonic(), self.worker.cpu_seconds()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        used, wall = self.worker.cpu_seconds() - self._cpu, time.monotonic() - self._begin
        if used > IDLE_SECONDS + IDLE_SHARE * wall:
            raise FqError(
                f"{self.worker.name} used the processor for {used:.3f} s of the {wall:.3f} s "
                "in which it was the other's turn"
            )


@dataclass(frozen=True)
class Whole:
    """A process from its start to its end."""

    seconds: float
    peak_bytes: int  # largest resident set, which counts the pages of mapped files that were touched
    output: str


def run_whole(name: str, command: Sequence[str]) -> Whole:
    """Raises FqError, with the last line of its stderr, for an exit status other than 0."""
    run = subprocess.run(
        [sys.executable, "-SE", os.fspath(SPAWN), *command],
        capture_output=True,
        check=False,
        encoding="utf-8",
        errors="replace",  # a token may be a part of a character
    )
    output, _, last = run.stdout.rpartition("\n")
    figures = json.loads(last) if run.returncode == 0 else {"status": run.returncode}
    if figures["status"] != 0:
        said = run.stderr.strip().splitlines()
        raise FqError(f"{name}: {said[-1] if said else 'exit status ' + str(figures['status'])}")
    return Whole(figures["seconds"], figures["peak_bytes"], output)
