"""A sweep's figures from what its cells left. Needs neither the model nor the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from fq_kernels import default_fpu
from fq_kernels.rules import FakeQuant, Place, RowStat, Value

from ..errors import FqError
from . import realisations
from .cells import CONTROL, RANKED, Cell, CellChunk
from .chunks import SCORED, first_scored, n_scored_per_chunk
from .inference import Ordering, mean_interval, ratio_test
from .statistics import is_exactly_zero, ppl_interval, ppl_se, summarise

Finished = Mapping[tuple[int, int], CellChunk]


@default_fpu()
def figures(about: dict[str, Any], cells: Sequence[Cell], finished: Finished) -> dict[str, Any]:
    """Of the chunks that ended in every cell, as written to JSON.

    Each single cell, of a site, a step, a norm or a profile, that differs from the baseline has ``rank``
    [best, worst] within its group, 1 being the largest mean KL: what is ordered is told by
    `inference.Ordering` over these, and ``pairs`` says how many pairs there are, how many of them are
    ordered, and how many chunks the next one needs. A group's ``additivity`` is the mean KL of all its sites
    together over the sum of the single ones, its interval that of `inference.ratio_test`; there is none
    beside a baseline that is not the model without rules. All over the same chunks. A cell with realisations
    has what they say together of the perplexity (`realisations.summary`), ``resolved`` among all that have
    any. A unit without a step has ``in_company``: how much more the mean KL is with it.

    Cells that have yet to be brought up to the others, by an extension or a shard, are left out and named in
    ``behind``. A group's ``behind`` are those of them that are ranked in it: while there is one, nothing is
    said of its order, nor of the sum.

    ``not_finite_tokens`` of a cell counts the scored tokens whose logits are not finite, and
    ``not_finite`` has the first chunk of these, of the text; its mean KL is NaN, and it has no rank.
    """
    values = _values_of(about)
    about = {key: value for key, value in about.items() if key != "values"}
    ended: list[list[int]] = [[] for _ in cells]
    for i, c in sorted(finished):
        if i < len(cells) and c < about["n_chunks_asked"]:
            ended[i].append(c)
    # a run goes chunk by chunk, so that its own cells are never more than one apart; one with none is new
    most = len(max(ended, key=len))
    there = [i for i, own in enumerate(ended) if len(own) >= max(most - 1, min(most, 1))]
    chunks = sorted(set.intersection(*(set(ended[i]) for i in there)))
    behind = [cell for i, cell in enumerate(cells) if i not in there]
    scored = about.get("scored", SCORED[0])
    result = about | {
        "n_chunks": len(chunks),
        "partial": len(chunks) < about["n_chunks_asked"] or bool(behind),
        "behind": [cell.name for cell in behind],
        "n_scored": len(chunks) * n_scored_per_chunk(about["n_ctx"], scored),
        "chunks_of_text": [_of_text(about, c) for c in chunks],
    }
    if not chunks:
        return result | {"cells": [], "groups": []}
    baseline = [finished[there[0], c].paired.nll_base for c in chunks]
    nll_base = np.concatenate(baseline)
    result["ppl_base"], result["ppl_base_se"] = ppl_se(nll_base)
    result["ppl_base_ci95_chunks"] = ppl_interval(baseline)
    entries: list[dict[str, Any]] = []
    for i in there:
        cell, left = cells[i], [finished[i, c] for c in chunks]
        entry: dict[str, Any] = {"name": cell.name, "kind": cell.kind, "group": cell.group, "cell": i}
        entry |= {"rules": list(cell.rules), "of": cell.of}
        entry["comparison"] = summarise([one.paired for one in left], first_scored(about["n_ctx"], scored))
        lost = [int((~np.isfinite(one.paired.kld)).sum()) for one in left]
        entry["not_finite_tokens"] = sum(lost)
        entry["not_finite"] = None
        if any(lost):
            first = next(c for c, n in zip(chunks, lost, strict=True) if n)
            entry["not_finite"] = {"chunk": _of_text(about, first)}
        if cell.kind == CONTROL:
            entry["exactly_zero"] = is_exactly_zero(entry["comparison"])
        entry["sites"] = _sites(values, cell, [one.counts for one in left])
        entries.append(entry)
    _realisations(entries)
    # beside another baseline each cell has what the model itself costs in it, so that nothing adds up
    adds_up = not (about.get("base_model") or about.get("baseline"))
    names = dict.fromkeys(e["group"] for e in entries if e["group"])
    missing = {n: [c.name for c in behind if c.group == n and c.kind in RANKED] for n in names}
    groups = [_group(name, entries, missing[name], adds_up) for name in names]
    return result | {"cells": entries, "groups": groups}


def _of_text(about: Mapping[str, Any], chunk: int) -> int:
    """A chunk's place in the text, from its position in the run; version 0.1.0 had the text's in order."""
    indices = about.get("chunk_indices")
    return int(indices[chunk]) if indices else chunk


def _realisations(entries: Sequence[dict[str, Any]]) -> None:
    """Give each cell that has them what its realisations say of the perplexity.

    They are known by their rules: of two groups that share a site each has the cell, and its realisations.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    by_rules = {tuple(entry["rules"]): entry for entry in entries if entry["of"]}
    for entry in entries:
        if entry["of"] or not any(other["of"] == entry["name"] for other in by_rules.values()):
            continue
        rules, several = tuple(entry["rules"]), [entry]
        for number in count(1):
            other = by_rules.get(tuple(str(realisations.fallen_anew(text, number)) for text in rules))
            if other is None:
                break
            several.append(other)
        if len(several) > 1:
            ln_ratios = [one["comparison"]["chunks"]["ln_ppl_ratio"] for one in several]
            entry["realisations"] = found.setdefault(rules, realisations.summary(ln_ratios))
    realisations.adjust(list(found.values()))


def add_nodes(data: dict[str, Any], not_finite: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """`figures` with what a run that has the model knows of the cells, by index, that are not finite."""
    for entry in data["cells"]:
        if entry["not_finite"] and entry["cell"] in not_finite:
            entry["not_finite"] = dict(not_finite[entry["cell"]])
    return data


def _values_of(about: Mapping[str, Any]) -> dict[Value, int]:
    """What could be rounded, in the order of the graph, and the rows of each in a chunk."""
    if "values" in about:
        return {
            Value(Place(kind, layer), norm_n=norm_n, duplicate=duplicate): rows
            for kind, layer, rows, norm_n, duplicate in about["values"]
        }
    # of an earlier version, which had llama's norms alone; all but the last are called norm-N
    return {Value(Place(kind, layer), norm_n=layer is not None): rows for kind, layer, rows in about["norms"]}


def _sites(values: Mapping[Value, int], cell: Cell, counts: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What the cell's rules did at each of their sites."""
    if not cell.rules:
        return []
    # a store may be another's: no file is opened because it names it
    rules = FakeQuant(values, cell.rules, matching_only=True)
    rows = {value.place: rows for value, rows in values.items()}
    if any(len(chunk) < len(rules.matched) for chunk in counts):
        raise FqError(f"{cell.name} has counts of fewer sites than its rules take")
    for j, counter in enumerate(rules.matched):
        mine = np.array([chunk[j] for chunk in counts])
        totals = mine[:, 2:].sum(axis=0)
        totals[RowStat.MAX_ABS_ERROR] = mine[:, 2 + RowStat.MAX_ABS_ERROR].max()
        counter.rows_seen = rows[counter.site.place] * len(counts)
        counter.rows_quantised, counter.elements = (int(n) for n in mine[:, :2].sum(axis=0))
        counter.totals = totals
    return [counter.as_dict() for counter in rules.matched]


def _group(name: str, entries: list[dict[str, Any]], behind: list[str], adds_up: bool) -> dict[str, Any]:
    mine = [entry for entry in entries if entry["group"] == name]
    single = [entry for entry in mine if entry["kind"] in RANKED and not behind]
    finite = [e for e in single if not e["not_finite_tokens"] and chunk_klds(e).any()]
    order = Ordering([chunk_klds(entry) for entry in finite])
    if order.known:
        for i, entry in enumerate(finite):
            entry["rank"] = list(order.rank(i))
    total = math.nan if behind else math.fsum(entry["comparison"]["mean_kld"] for entry in single)
    group: dict[str, Any] = {"name": name, "sum_of_single_klds": total, "behind": behind}
    group["pairs"] = {
        "n": len(order.pairs),
        "ordered": order.n_resolved,
        "chunks_for_the_next": order.chunks_for_the_next,
    }
    together = next((entry for entry in mine if entry["kind"] == "together"), None)
    for entry in mine:
        more = None if together is None else chunk_klds(together) - chunk_klds(entry)
        if entry["kind"] == "without" and more is not None and np.isfinite(more).all():
            entry["in_company"] = {
                "mean_kld": float(np.mean(more)),
                "mean_kld_ci95_chunks": mean_interval(more),
            }
        if entry["kind"] == "together":
            group["kld_together"] = entry["comparison"]["mean_kld"]
            ratio = group["kld_together"] / total if total and adds_up else math.nan
            group["additivity"] = ratio if math.isfinite(ratio) else None
            alone = np.sum([chunk_klds(e) for e in single], axis=0)
            test = ratio_test(chunk_klds(entry), alone) if single and adds_up else None
            group["additivity_ci95_chunks"] = None if test is None else test.interval
    return group


def chunk_klds(entry: dict[str, Any]) -> np.ndarray:
    """A cell's mean KL in each chunk."""
    return np.array(entry["comparison"]["chunks"]["mean_kld"])
