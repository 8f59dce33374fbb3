"""The cells of a sweep: what each is, and what it leaves of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fq_kernels import get_format
from fq_kernels.rules import FakeQuant, RowStat, Rule

from ..errors import FqError
from ..run.model import Model
from .realisations import fallen_anew, has_none
from .statistics import Paired

DEFAULT_SITES = "ffn_norm[*].raw"
CONTROL, REALISATION = "control", "realisation"
CELL_KINDS = ("single", "together", "cumulative", CONTROL, REALISATION)


@dataclass(frozen=True)
class Cell:
    """One variant of the model.

    name   what it is called in tables: its rule
    kind   "single": one site; "together": all sites of its group; "cumulative": those up to a
           site; "control": the baseline a second time
           "realisation": another cell's rounding fallen anew
    group  the SITES=FORMAT that it comes from; a realisation has none
    rules  as text
    of     name of the cell whose realisation it is
    """

    name: str
    kind: str
    group: str = ""
    rules: tuple[str, ...] = ()
    of: str = ""


def cells_of(
    model: Model,
    sites: Sequence[str] = (DEFAULT_SITES,),
    formats: Sequence[str] = ("bf16",),
    *,
    cumulative: bool = False,
    realisations: int = 1,
    seed: int = 0,
) -> list[Cell]:
    """The control, then for each of ``sites`` and each format: every site alone, and all together.

    With cumulative also those from the first site to each. With ``realisations`` each is there so
    often, with its rounding fallen anew; noise controls once. ``seed`` is that of stochastic rounding
    where a format names none; the cells name it. Raises FqError for sites or a format that cannot be
    read, that are given twice or that match nothing.
    """
    cells = [Cell(CONTROL, CONTROL)]
    for pattern in sites:
        for spec in formats:
            try:
                get_format(spec.partition(":")[0])  # its own error says more than a rule's
                rule = Rule.parse(f"{pattern}={spec}", seed=seed)
                matched = [counter.site for counter in FakeQuant(model.values, rule).matched]
            except ValueError as e:
                raise FqError(str(e)) from None
            group = str(rule)
            if any(cell.group == group for cell in cells):
                raise FqError(f"{group} is asked for twice")
            ending = group.partition("=")[2]
            singles = [f"{site}={ending}" for site in matched]
            cells += [Cell(single, "single", group, (single,)) for single in singles]
            if cumulative:
                cells += [
                    Cell(f"up to {singles[i]}", "cumulative", group, tuple(singles[: i + 1]))
                    for i in range(1, len(singles) - 1)
                ]
            if len(singles) > 1:
                cells.append(Cell(group, "together", group, (group,)))
            if realisations > 1 and not has_none([group]):
                cells += [
                    replace(
                        cell,
                        name=f"{cell.name} #{number + 1}",
                        kind=REALISATION,
                        group="",
                        rules=tuple(str(fallen_anew(text, number)) for text in cell.rules),
                        of=cell.name,
                    )
                    for cell in cells
                    if cell.group == group
                    for number in range(1, realisations)
                ]
    return cells


# What is counted of a site in a chunk: rows rounded, elements, and the totals of Counter.
COUNT_COLUMNS = ("rows_quantised", "elements", *(stat.name.lower() for stat in RowStat))


class CellChunk(NamedTuple):
    """What a cell left of a chunk: all that its figures are made from.

    counts is float64 (sites that a rule takes, COUNT_COLUMNS), in graph order; NaN is what an earlier
    version did not count.
    """

    paired: Paired
    counts: np.ndarray
