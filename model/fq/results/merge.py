"""Several stores of one experiment in one: shards of a sweep, or the same sweep run twice.

What is joined may come of different machines and versions: a chunk of a cell has the same bits wherever it
was run under one contract of numerics, and one that two stores hold with other bits is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import FqError
from ..measure.cells import Cell, CellChunk
from .run import OF_AN_EXPERIMENT, Run
from .runs import OtherBitsError, Results

AND = " | "  # between what machines do not share
SETTINGS = (*OF_AN_EXPERIMENT, "n_chunks_asked")
NUMERICS = "contract", "activations", "kv_cache"


class Merged(NamedTuple):
    """number  of the run in the store that all were joined in
    runs    of each store: the run that was taken
    added   and rows that were not there before it
    ended   rows that are there now
    """

    number: int
    runs: list[int]
    added: list[int]
    ended: int


def difference(one: Run, other: Run) -> str | None:
    """All that keeps two runs from being of one experiment; None where nothing does."""
    # a setting that differs is said once
    numerics = [key for key in NUMERICS if one.setting(key) == other.setting(key)]
    pairs: list[tuple[str, Any, Any]] = [
        ("the model's SHA-256", one.model_sha256, other.model_sha256),
        ("the text's SHA-256", one.text_sha256, other.text_sha256),
        *((key, one.setting(key), other.setting(key)) for key in SETTINGS),
        *((f"numerics: {key}", one.numerics.get(key), other.numerics.get(key)) for key in numerics),
        ("the SHA-256 of calibrations", _calibrations(one), _calibrations(other)),
    ]
    found = [f"{what}: {a} and {b}" for what, a, b in pairs if a != b]
    found += _cells_apart([_shown(cell) for cell in one.cells], [_shown(cell) for cell in other.cells])
    return "; ".join(found) or None


def _cells_apart(one: list[str], other: list[str]) -> list[str]:
    if one == other:
        return []
    found = []
    for which, mine, theirs in (("first", one, other), ("second", other, one)):
        if alone := list((Counter(mine) - Counter(theirs)).elements()):  # one may be there twice
            more = f", and {len(alone) - 1} more" if len(alone) > 1 else ""
            found.append(f"cells: the {which} alone has {alone[0]}{more}")
    return found or ["cells: in another order"]


def _calibrations(run: Run) -> list[str]:
    return [each["sha256"] for each in run.settings.get("calibrations", ())]


def _shown(cell: Cell) -> str:
    return f"{cell.name} ({cell.kind} of {cell.group or 'none'}: {', '.join(cell.rules) or 'no rule'})"


def joined(runs: Sequence[Run]) -> Run:
    """Of one experiment, in any order: what they do not share of machine and versions has all there is."""
    # paths and the batch may differ, which decide no bits
    settings = min((run.settings for run in runs), key=lambda s: json.dumps(s, sort_keys=True))
    return replace(
        runs[0],
        settings=settings,
        numerics=together(run.numerics for run in runs),
        versions=together(run.versions for run in runs),
        machine=together(run.machine for run in runs),
    )


def together(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What all say of each key, once: idempotent, and the same in any order."""
    found: dict[str, list[Any]] = {}
    for part in parts:
        for key, value in part.items():
            found.setdefault(key, []).append(value)
    return {
        key: values[0]
        if all(value == values[0] for value in values)
        else AND.join(sorted({one for value in values for one in str(value).split(AND)}))
        for key, values in found.items()
    }


def experiment(shards: Sequence[tuple[str, int | None]]) -> tuple[list[int], list[Run]]:
    """The number of each shard's run, and the run. Raises FqError where they are not of one experiment."""
    numbers, runs = [], []
    for path, wanted in shards:  # one after another: there may be more than may be open
        with Results(path, must_exist=True) as store:
            number = _newest_sweep(store) if wanted is None else wanted
            runs.append(_sweep(store, number))
            numbers.append(number)
        if (found := difference(runs[0], runs[-1])) is not None:
            what = f"run {numbers[0]} of {shards[0][0]} and run {number} of {path}"
            raise FqError(f"{what} are not of one experiment: {found}")
    return numbers, runs


def merge(out: Results, shards: Sequence[tuple[str, int | None]]) -> Merged:
    """All of the shards' rows into one run of ``out``: the newest of the same experiment, or a new one.

    shards  stores' files, and the run of each; None: its newest sweep

    Whole or not at all, and the same in any order; what is there already is left as it is. Raises FqError
    for runs of different experiments, and for a chunk of a cell that is there with other bits.
    """
    numbers, runs = experiment(shards)
    with out.writing():
        there = _newest_like(out, runs[0])
        if there is None:
            number = out.insert(joined(runs))
        else:
            number = there
            whole = joined([out.get(number), *runs])
            out.replace(number, whole, identity=whole.identity)
        added = []
        for (path, _), of_it in zip(shards, numbers, strict=True):
            with Results(path, must_exist=True) as store:
                added.append(_add(out, number, store, of_it))
        ended = out.list(number)[0]["ended"]
    return Merged(number, numbers, added, ended)


def _newest_sweep(store: Results) -> int:
    for number in store.sound():
        if store.get(number).asked is None:
            return number
    raise FqError(f"{store.path}: there is no sweep in it that can be read")


def _sweep(store: Results, number: int) -> Run:
    run = store.get(number)
    if run.asked is not None:
        raise FqError(f"{store.path}: run {number} is an estimate; sweeps are merged")
    return run


def _newest_like(out: Results, run: Run) -> int | None:
    for there in out.sound():
        other = out.get(there)
        if other.asked is None and difference(other, run) is None:
            return there
    return None


def _add(out: Results, number: int, store: Results, of_it: int) -> int:
    added, known = 0, None
    for cell, chunk, left in store.rows(of_it):
        try:
            new = out.put(number, cell, chunk, left)
            if not new:
                # once a row was to be put its columns are known, and nobody else writes any
                known = known or out.known(number)
                ((_, _, there),) = out.rows(number, (cell, chunk), known)
                if not _same(there, left):
                    raise OtherBitsError(f"cell {cell}, chunk {chunk + 1}")
        except OtherBitsError as e:
            raise FqError(
                f"{store.path}: run {of_it}: {e} has other bits than run {number} of {out.path} got from "
                "another store: one of them was not run as it says"
            ) from None
        added += new
    return added


def _same(one: CellChunk, other: CellChunk) -> bool:
    """To the last bit, but for what a version did not keep yet."""
    a, b = one.paired, other.paired
    exact = ("nll_base", "nll", "kld", "dp", "same_top")
    return (
        all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in exact)
        and _same_where_kept(a.p_top_base, b.p_top_base)
        and one.counts.shape == other.counts.shape
        and _same_where_kept(one.counts, other.counts)
    )


def _same_where_kept(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.isnan(a) | np.isnan(b) | (a == b)).all())
