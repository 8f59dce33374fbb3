"""Kept sweeps of a store as one table per model: a row for each of their groups of sites.

Below it, with ``--over PART OTHER``, how many times each group with PART in its name costs what the one
does that has OTHER there, by the paired test over chunks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from fq import FqError
from fq.report.data import Entry, Group, between, groups_of, kl_text, kld, kld_interval, paired
from fq.report.layers import additivity_text
from fq.results.runs import Results, stored_figures

COLUMNS = ("all together", "over the sum of the single ones", "median layer", "largest layer", "first place")
FEW = 5  # layers that are named


def row_of(group: Group) -> list[str]:
    """Of a group with all its sites together."""
    assert group.together is not None
    largest = max(group.singles, key=kld)
    first = group.order.first
    named = group.text(first) if len(first) <= FEW else f"{len(first)} layers"
    return [
        f"`{group.name}`",
        _cost(group.together),
        additivity_text(group) if group.additivity is not None else "",
        kl_text(median(map(kld, group.singles)), 2),
        f"{group.text([largest])}: {_cost(largest)}",
        named or "not resolved",
    ]


def _cost(entry: Entry) -> str:
    return f"{kl_text(kld(entry))} ({between(kld_interval(entry))})"


def ratios(groups: Sequence[Group], one: str, other: str) -> list[str]:
    """Of groups named alike but for ``one`` in the place of ``other``."""
    by_name = {group.name: group for group in groups}
    found = []
    for name, group in by_name.items():
        beside = by_name.get(name.replace(one, other)) if one in name else None
        if beside is None or beside is group or not (group.together and beside.together):
            continue
        test = paired([group.together], [beside.together])
        if test is not None:
            ends = between(test.interval, lambda x: f"{x:.2g}")
            p = f"p = {test.p:.1e}"
            found.append(f"- `{name}` costs {test.ratio:.3g} times `{beside.name}` ({ends}; {p})")
    return found


def tables(runs: Sequence[dict[str, Any]], over: Sequence[tuple[str, str]] = ()) -> str:
    """Of the runs' `figures`, in their order."""
    models = list(dict.fromkeys(os.path.basename(run["model"]) for run in runs))
    parts = []
    for model in models:
        mine = [group for run in runs if os.path.basename(run["model"]) == model for group in groups_of(run)]
        lines = [f"| {' | '.join((model, *COLUMNS))} |", f"|{' --- |' * (1 + len(COLUMNS))}"]
        lines += [f"| {' | '.join(row_of(group))} |" for group in mine if group.together and group.singles]
        parts.append("\n".join(lines))
        parts += ["\n".join(said) for pair in over if (said := ratios(mine, *pair))]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sites_table", description=__doc__)
    parser.add_argument("--store", metavar="FILE", default="fq-results.sqlite")
    parser.add_argument("--over", nargs=2, action="append", metavar=("PART", "OTHER"), default=[])
    args = parser.parse_args(argv)
    try:
        with Results(args.store, must_exist=True) as store:
            print(tables([stored_figures(store, run["run"]) for run in store.list()], args.over))
    except FqError as e:
        print(f"bench.sites_table: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
