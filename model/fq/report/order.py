"""Which of several cells cost more than which: `inference.Ordering`, with the cells themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from ..measure.inference import MOST_CHUNKS, Ordering

T = TypeVar("T")


class Order(Generic[T]):
    """Cells, the largest mean KL first, and what of their order is resolved.

    items, klds   the cells and the mean KL of each in each chunk
    known         whether any order could be told
    first, last   those that none costs more than, and that cost more than none
    second        those that of all but the first none costs more than
    """

    def __init__(self, items: Sequence[T], klds: Sequence[np.ndarray]) -> None:
        largest = sorted(range(len(items)), key=lambda i: -float(np.mean(klds[i])))
        self.items = [items[i] for i in largest]
        self._tests = Ordering([klds[i] for i in largest])
        self._place = {id(item): i for i, item in enumerate(self.items)}
        self.known = self._tests.known
        self._open = [pair for pair in self._tests.pairs if not self._tests.apart(*pair)]
        every = range(len(items))
        over = {i: [j for j in every if j != i and self._tests.costs_more(j, i)] for i in every}
        first = [i for i in every if not over[i]]
        second = [i for i in every if i not in first and set(over[i]) <= set(first)]
        last = [i for i in every if not any(i in others for others in over.values())]
        self.first, self.second, self.last = (
            [self.items[i] for i in places] if self.known else [] for places in (first, second, last)
        )

    @property
    def n_pairs(self) -> int:
        return len(self._tests.pairs)

    @property
    def n_resolved(self) -> int:
        return self.n_pairs - len(self._open)

    @property
    def open(self) -> list[tuple[T, T]]:
        """Pairs whose order is not resolved, the larger first."""
        return [(self.items[i], self.items[j]) for i, j in self._open]

    def rank(self, item: T) -> tuple[int, int] | None:
        """(best, worst) place; None where no order could be told, or the cell is not in it."""
        place = self._place.get(id(item))
        return None if place is None or not self.known else self._tests.rank(place)

    def chunks_for(self, one: T, other: T) -> str:
        """``about 23 chunks``, as many as would resolve the order of two; empty where nothing is known."""
        i, j = sorted((self._place[id(one)], self._place[id(other)]))
        if self._tests.tests[i, j] is None:
            return ""
        needed = self._tests.chunks_needed(i, j)
        return f"more than {MOST_CHUNKS:,} chunks" if needed is None else f"about {needed} chunks"

    def chunks_for_the_next(self) -> str:
        """The same of the pair that is next to be resolved."""
        tests = self._tests.tests
        open_ = [(abs(test.t), pair) for pair in self._open if (test := tests[pair]) is not None]
        if not open_:
            return ""
        i, j = max(open_)[1]
        return self.chunks_for(self.items[i], self.items[j])
