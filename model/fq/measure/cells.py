"""The cells of a sweep: what each is, and what it leaves of a chunk."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import NormUnit, get_format
from fq_kernels.rules import FakeQuant, Place, RowStat, Rule, UnitRule
from fq_kernels.units.profiles import find_profile

from ..errors import FqError
from ..run.model import Model
from .realisations import fallen_anew, has_none
from .statistics import Paired

DEFAULT_SITES = "ffn_norm[*].raw"
PROFILES_GROUP, UNITS_GROUP = "profiles", "units"
EACH_NORM = "unit", "steps"  # what a norm alone may have
MAX_UNITS = 4096  # that one text may stand for
CONTROL, REALISATION, AS_IT_IS = "control", "realisation", "as it is"
# of kinds whose cells are ranked among those of their group
RANKED = ("single", "step", "norm", "unit", "profile")
WITHOUT_RULES = (CONTROL, AS_IT_IS)
CELL_KINDS = (
    *RANKED,
    *("together", "without", "cumulative", REALISATION, "gain", "pair", "chosen"),
    *WITHOUT_RULES,
)


@dataclass(frozen=True)
class Cell:
    """One variant of the model.

    name   what it is called in tables: its rule
    kind   "single": one site; "together": all sites of its group; "cumulative": those up to a
           site; "control": the baseline a second time
           "as it is": the model without rules, beside another file
           "realisation": another cell's rounding fallen anew
           "step": one step of a unit; "without": all of its steps but one; "norm": a unit in one norm;
           "unit": a unit among others
           "profile": an engine's norms and residual
           "gain": a site times 1 + 2^-7
           "pair": two sites of an estimate; "chosen": one site of it, for what it is, and no sample of all
    group  the SITES=FORMAT or unit rule that it comes from; a realisation has none
    rules  as text
    of     name of the cell whose realisation it is
    """

    name: str
    kind: str
    group: str = ""
    rules: tuple[str, ...] = ()
    of: str = ""


def label_of(entry: Mapping[str, Any]) -> str:
    """A cell's name among those of its group, from an entry of `figures`."""
    kind, name = entry["kind"], entry["name"]
    if kind == "together":
        return "all together"
    if kind == "without":
        return str(name.removeprefix(f"{entry['group']} "))
    if kind in ("profile", "unit"):
        return str(name)
    return str(name.partition("=")[2 if kind == "step" else 0])


def by_norm(data: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Entries of `figures` that have a unit in one norm alone: by the unit, then by the norm."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in data["cells"]:
        if entry["kind"] == "norm":
            norm, _, unit = entry["name"].partition("=")
            found.setdefault(unit, {})[norm] = entry
    return found


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


def unit_cells(
    model: Model, units: Sequence[str], *, whole: bool = False, each_norm: str | None = None, seed: int = 0
) -> list[Cell]:
    """For each of ``units``, written as a unit rule: every step alone, all but each, and all of them.

    What stands as ``{a|b}`` in one makes a unit of each. An accumulator and its order are one step. With
    ``whole`` there is only each unit itself, all in one group. With ``each_norm`` "unit" also the whole
    unit in each norm alone, as a group of its own; with "steps" each of its steps, too. Raises FqError for
    a unit that cannot be read, is given twice or matches no norm.
    """
    if each_norm not in (None, *EACH_NORM):
        raise FqError(f"each norm has its {' or its '.join(EACH_NORM)}, not {each_norm!r}")
    cells: list[Cell] = []
    for text in chain.from_iterable(map(_alternatives, units)):
        try:
            rule = UnitRule.parse(text, seed=seed)
            norms = list(FakeQuant(model.values, rule).units)
        except ValueError as e:
            raise FqError(str(e)) from None
        group, together = str(rule), (str(rule),)
        if any(cell.rules == together and cell.kind in ("unit", "together") for cell in cells):
            raise FqError(f"{group} is asked for twice")
        sites = group.partition("=")[0]
        parts = _steps_of(rule.unit)
        if not parts:
            raise FqError(f"{group or text}: a unit without steps is ggml's")
        if len(parts) > 1 and not whole:
            alone = {step: f"{sites}={NormUnit(**steps)}" for step, steps in parts.items()}
            cells += [Cell(name, "step", group, (name,)) for name in alone.values()]
            for step in parts:
                rest = NormUnit(**{k: v for k, v in rule.unit.steps.items() if k not in parts[step]})
                cells.append(Cell(f"{group} without {step}", "without", group, (f"{sites}={rest}",)))
        whole_one = ("unit", UNITS_GROUP) if whole else ("together", group)
        cells.append(Cell(group, *whole_one, together))
        if each_norm and len(norms) > 1:
            several = len(parts) > 1 and each_norm == "steps"
            for unit in [rule.unit, *(NormUnit(**steps) for steps in parts.values() if several)]:
                cells += _by_norm(sites, unit, norms)
    return list(dict.fromkeys(cells))  # units may share a step, or its norms


def _by_norm(sites: str, unit: NormUnit, norms: Sequence[Place]) -> list[Cell]:
    """It in each norm alone, and in all of them."""
    whole = f"{sites}={unit}"
    of_norms = f"{whole}, each norm"
    cells = [Cell(f"{norm}={unit}", "norm", of_norms, (f"{norm}={unit}",)) for norm in norms]
    return [*cells, Cell(f"{whole}, all norms", "together", of_norms, (whole,))]


def _alternatives(text: str) -> list[str]:
    """``acc={bf16|f32};out={bf16|f16}`` -> the four units that it says."""
    parts = re.split(r"\{([^{}]*)\}", text)
    found = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    if math.prod(map(len, found)) > MAX_UNITS:
        raise FqError(f"{text}: more than {MAX_UNITS} units")
    return list(map("".join, product(*found)))


def _steps_of(unit: NormUnit) -> dict[str, dict[str, str]]:
    """Its steps, each with what cannot be without it."""
    steps = unit.steps
    with_acc: dict[str, str] = {key: steps[key] for key in steps if key in ("acc", "order")}
    return {
        step: with_acc if step == "acc" else {step: value} for step, value in steps.items() if step != "order"
    }


def profile_cells(model: Model, specs: Sequence[str]) -> list[Cell]:
    """A cell for each profile. Raises FqError for one that there is not, or that is given twice."""
    cells = []
    for spec in specs:
        rules = tuple(model.profile_rules(spec))
        name, _, dtype = find_profile(spec)
        cells.append(Cell(f"{name}:{dtype}", "profile", PROFILES_GROUP, rules))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise FqError(f"a profile is asked for twice: {', '.join(names)}")
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
