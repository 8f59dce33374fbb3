"""Memory of an evaluation's values: used again, as fresh pages cost more than the arithmetic."""

from __future__ import annotations

import numpy as np


class Buffers:
    """Float32 arrays of two axes that nobody uses any more, by shape."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = {}

    def take(self, rows: int, n: int) -> np.ndarray:
        """Uninitialised (rows, n), C-contiguous; it may be a part of one with a few rows more."""
        if free := self._free.get((rows, n)):
            return free.pop()
        for more in (r for r, width in self._free if width == n and rows < r <= rows + rows // 8):
            if free := self._free[more, n]:
                return free.pop()[:rows]
        return np.empty((rows, n), np.float32)

    def copy(self, value: np.ndarray) -> np.ndarray:
        """A value of two or three axes, in memory of its own."""
        copy = self.take(len(value), value[:1].size).reshape(value.shape)
        copy[:] = value
        return copy

    def give(self, array: np.ndarray) -> None:
        """Take back what `take` has given."""
        owner = array if array.base is None else array.base
        self._free.setdefault(owner.shape, []).append(owner)

    def clear(self) -> None:
        self._free.clear()
