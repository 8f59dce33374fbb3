"""The values that pass a model's sites, over the chunks of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fq_kernels import Executor
from fq_kernels.rules import Observer, Site

from ..run.context import Context
from ..run.finite import in_batches
from ..run.model import Model
from .chunks import Chunks, Settings


class Observation:
    """The model without rules on each chunk, as a measurement evaluates it; iterate over it to run it.

    sites     as a rule names them
    see       (site, x, first): x (rows, n) float32, to be read at once; first says whether row 0, or as many
              rows as a token has, is the chunk's first token, which is BOS in most models

    ``for position in observation: ...`` yields each chunk's position in the run as it ends.
    Raises FqError as Chunks does, and ValueError for sites that there are not.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        sites: Sequence[str],
        see: Callable[[Site, np.ndarray, bool], None],
        *,
        executor: Executor,
        settings: Settings,
    ) -> None:
        self.model, self.settings = model, settings
        self.text = Chunks(model, tokens, settings)
        self.observer = Observer(model.values, sites, self._seen)
        self.context = Context(model, settings.n_ctx, executor, fake_quant=self.observer)
        self.context.activations = settings.activations
        self._see = see
        self._rows = {value.place: value.rows for value in model.values}
        self._at, self._tokens = 0, 0  # of the evaluation
        self.done = 0

    @property
    def sites(self) -> list[Site]:
        return self.observer.seen_sites

    def _seen(self, site: Site, x: np.ndarray) -> None:
        whole = len(x) == self._tokens * self._rows[site.place]
        self._see(site, x, self._at == 0 and whole)

    def __iter__(self) -> Iterator[int]:
        while self.done < self.text.n:
            ids, _ = self.text[self.done]
            self.context.clear()
            self._at = 0
            for part, wanted in in_batches(ids[:-1], self.settings.first_scored, self.settings.batch):
                self._tokens = len(part)
                self.context.eval(part, wanted)
                self._at += len(part)
            self.done += 1
            yield self.done - 1
