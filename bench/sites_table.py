"""Kept sweeps of a store as one table per model: a row for each of their groups of sites."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from fq import FqError
from fq.report.data import Entry, Group, between, groups_of, kl_text, kld, kld_interval
from fq.results.runs import Results, stored_figures

COLUMNS = ("all together", "sum of the single ones", "median layer", "largest layer", "first place shared by")
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
        kl_text(group.sum_of_singles),
        kl_text(median(map(kld, group.singles)), 2),
        f"{group.text([largest])}: {_cost(largest)}",
        named or "not resolved",
    ]


def _cost(entry: Entry) -> str:
    return f"{kl_text(kld(entry))} ({between(kld_interval(entry))})"


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """Of the runs' `figures`, in their order."""
    models = list(dict.fromkeys(os.path.basename(run["model"]) for run in runs))
    parts = []
    for model in models:
        mine = [group for run in runs if os.path.basename(run["model"]) == model for group in groups_of(run)]
        lines = [f"| {' | '.join((model, *COLUMNS))} |", f"|{' --- |' * (1 + len(COLUMNS))}"]
        lines += [f"| {' | '.join(row_of(group))} |" for group in mine if group.together and group.singles]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sites_table", description=__doc__)
    parser.add_argument("--store", metavar="FILE", default="fq-results.sqlite")
    args = parser.parse_args(argv)
    try:
        with Results(args.store, must_exist=True) as store:
            print(tables([stored_figures(store, run["run"]) for run in store.list()]))
    except FqError as e:
        print(f"bench.sites_table: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
