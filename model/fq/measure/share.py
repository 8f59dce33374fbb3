"""What one of several processes runs of a sweep."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import FqError

MOST = 1 << 20


class Share(NamedTuple):
    """The number-th of as many equal parts, from 1, of all chunks of cells.

    A chunk's cells follow one another, so that a part has whole chunks but for its first and its last: a
    chunk that is cut costs its baseline once more.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Of a text like 2/8. Raises FqError for another."""
        found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]) <= MOST:
            raise FqError(f"a shard is i/n, i from 1 to n, such as 2/8, not {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def cells(self, chunk: int, n_cells: int, n_chunks: int) -> range:
        """Those of a chunk that are in it."""
        total, before = n_cells * n_chunks, n_cells * chunk
        begin, end = (total * k // self.of - before for k in (self.number - 1, self.number))
        return range(min(max(begin, 0), n_cells), min(max(end, 0), n_cells))
