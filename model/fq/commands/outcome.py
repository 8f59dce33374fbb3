"""How a command's work ended, and what is the same for all then: a partial result, JSON, the exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import INTERRUPTED, NOT_FINITE, NotFiniteError
from .files import FileName, write_json


class Outcome:
    """Of work in a ``with`` block: it may end by Ctrl-C or at a baseline that is not finite.

    lost  set by the caller: figures that are not finite, of work that went on
    """

    def __init__(self) -> None:
        self.interrupted = self.lost = False
        self.failed: NotFiniteError | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
        except NotFiniteError as e:
            self.failed = e

    @property
    def partial(self) -> bool:
        return self.interrupted or self.failed is not None

    def say(self, done: str, more: str = "") -> None:
        """On stderr, where it was interrupted, that what follows is partial."""
        if self.interrupted:
            print(
                f"fq: interrupted{done and f' after {done}'}: this is a partial result{more}", file=sys.stderr
            )

    @property
    def status(self) -> int:
        """The exit status. Raises what ended the work."""
        if self.failed is not None:
            raise self.failed
        return INTERRUPTED if self.interrupted else NOT_FINITE if self.lost else 0


def print_figures(kind: str, text: str, data: Mapping[str, Any], json: FileName | None) -> None:
    """The text, and where they are asked for the figures as a document of the kind.

    A file is there before the text, whatever becomes of stdout; with "-" stdout is for JSON alone.
    """
    if json and json != "-":
        write_json(kind, data, json)
    print(text, file=sys.stderr if json == "-" else sys.stdout)
    if json == "-":
        write_json(kind, data, json)
