"""What a store holds of an estimate, as `measure.estimates` takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, takewhile

import numpy as np

from fq_kernels.formats.gain import GAIN

from ..measure.cells import Cell, CellChunk
from ..measure.estimates import Asked, Gains


def in_order(chunks: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """Of those that ended without a gap: a run goes from the first to the last."""
    return [chunks[c] for c in takewhile(lambda c: c in chunks, count())]


def measured(
    asked: Asked, cells: Sequence[Cell], left: Mapping[tuple[int, int], CellChunk]
) -> tuple[Gains, dict[tuple[str, str], np.ndarray]]:
    """Of an estimate's cells that were measured: what a change of scale costs, and the mean KL of each chunk
    by site and format. Of each cell those chunks that ended without a gap."""
    classes = dict(zip(asked.sites, asked.classes, strict=True))
    of_class: dict[int, np.ndarray] = {}
    exact: dict[tuple[str, str], np.ndarray] = {}
    for i, cell in enumerate(cells):
        klds = list(takewhile(lambda kld: kld is not None, (_mean_kld(left.get((i, c))) for c in count())))
        if not klds or len(cell.rules) != 1:
            continue
        site, _, spec = cell.rules[0].partition("=")
        if spec == GAIN and (key := classes.get(site)) is not None:
            of_class[key] = np.array(klds)
        elif spec != GAIN:
            exact[site, spec] = np.array(klds)
    return Gains(asked.classes, of_class), exact


def _mean_kld(left: CellChunk | None) -> float | None:
    return None if left is None else float(np.mean(left.paired.kld))
