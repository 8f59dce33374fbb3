"""What a store holds of an estimate, as `measure.estimates` takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import NamedTuple

import numpy as np

from fq_kernels.formats.gain import GAIN

from ..measure.cells import Cell, CellChunk
from ..measure.estimates import Asked, Gains


def in_order(chunks: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """Of those that ended without a gap: a run goes from the first to the last."""
    return [chunks[c] for c in takewhile(lambda c: c in chunks, count())]


class Measured(NamedTuple):
    """Of an estimate's cells that were measured the mean KL of each chunk that ended, without a gap.

    gains  what a change of scale costs
    exact  by site and format
    pairs  by two sites and the format of both
    chosen
           sites and formats of `exact` that are no sample of all
    """

    gains: Gains
    exact: dict[tuple[str, str], np.ndarray]
    pairs: dict[tuple[str, str, str], np.ndarray]
    chosen: set[tuple[str, str]]


def measured(asked: Asked, cells: Sequence[Cell], left: Mapping[tuple[int, int], CellChunk]) -> Measured:
    classes = dict(zip(asked.sites, asked.classes, strict=True))
    found = Measured(Gains(asked.classes, {}), {}, {}, set())
    sampled: set[tuple[str, str]] = set()
    of_class: dict[int, np.ndarray] = {}
    for i, cell in enumerate(cells):
        klds = list(takewhile(lambda kld: kld is not None, (_mean_kld(left.get((i, c))) for c in count())))
        if not klds or not cell.rules:
            continue
        sites, _, specs = zip(*(rule.partition("=") for rule in cell.rules), strict=True)
        if len(sites) == 1 and specs[0] == GAIN:
            if (key := classes.get(sites[0])) is not None:
                of_class[key] = np.array(klds)
        elif len(sites) == 1:
            at = sites[0], specs[0]
            if at not in found.exact or len(klds) > len(found.exact[at]):
                found.exact[at] = np.array(klds)
            (found.chosen if cell.kind == "chosen" else sampled).add(at)
        elif len(sites) == 2 and specs[0] == specs[1]:
            found.pairs[sites[0], sites[1], specs[0]] = np.array(klds)
    return found._replace(gains=Gains(asked.classes, of_class), chosen=found.chosen - sampled)


def _mean_kld(left: CellChunk | None) -> float | None:
    return None if left is None else float(np.mean(left.paired.kld))
