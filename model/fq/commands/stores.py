"""fq results merge, check and delete: what is done with whole stores and runs."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import FqError
from ..results.merge import experiment, merge
from ..results.runs import Results
from ..words import ascii_safe, table
from .files import FileName, check_outputs, write_json
from .options import store_files

Found = tuple[dict[str, Any], str]  # as JSON, as text


def main(args: argparse.Namespace) -> int:
    inputs: dict[str, FileName] = {}
    if args.run[0] == "merge":
        out, shards = args.run[1:2], map(_store_and_run, args.run[2:])
        for path in [*out, *(path for path, _ in shards)]:
            inputs |= store_files(f"the store {path}", path)
    check_outputs({"--json": args.json}, store_files("the store", args.store) | inputs)
    data, text = ACTIONS[args.run[0]](args, args.run[1:])
    if args.json != "-":
        print("\n".join(map(ascii_safe, text.split("\n"))))
    if args.json:
        write_json(f"results-{args.run[0]}", data, args.json)
    return 0


def run_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise FqError(f"RUN must be the number of a run, not {text!r}; fq results lists them")
    return int(text)


def _merge(args: argparse.Namespace, words: Sequence[str]) -> Found:
    if len(words) < 2:
        raise FqError(
            "merge needs a store to be made or added to, and others: fq results merge OUT STORE ..."
        )
    out, *wanted = words
    shards = [_store_and_run(word) for word in wanted]
    for path, _ in shards:
        if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
            raise FqError(f"{path}: is the store that the others are merged into")
    if not os.path.exists(out):
        experiment(shards)  # a store that they cannot be in is not made
    with Results(out) as whole:
        found = merge(whole, shards)
        (about,) = whole.list(found.number)
    rows = [["store", "run", "new rows"]]
    for (path, _), number, added in zip(shards, found.runs, found.added, strict=True):
        rows.append([path, str(number), str(added)])
    done = f"run {found.number} of {out}: {found.ended} of {about['of']} chunks of cells have ended"
    data = {"store": out, "run": found.number, "ended": found.ended, "of": about["of"]}
    data["shards"] = [
        {"store": path, "run": number, "added": added}
        for (path, _), number, added in zip(shards, found.runs, found.added, strict=True)
    ]
    return data, f"{table(rows, {1, 2})}\n{done}"


def _store_and_run(word: str) -> tuple[str, int | None]:
    """Of STORE or STORE:RUN; a name that there is has no number."""
    path, colon, number = word.rpartition(":")
    if os.path.exists(word) or not colon or not re.fullmatch(r"[0-9]{1,15}", number):
        return word, None
    return path, int(number)


def _check(args: argparse.Namespace, words: Sequence[str]) -> Found:
    """Of all runs, or some, every row is read. Raises FqError for the first that is damaged."""
    runs = []
    with Results(args.store, must_exist=True) as store:
        store.whole()
        for number in list(map(run_number, words)) or [about["run"] for about in store.list()]:
            rows = sum(1 for _ in store.rows(number))
            estimates = len(store.load_estimates(number))
            runs.append({"run": number, "rows": rows, "estimates": estimates})
    lines = [["run", "chunks of cells", "chunks of estimates"]]
    lines += [[str(value) for value in one.values()] for one in runs]
    return {"runs": runs}, f"{table(lines, {0, 1, 2})}\nall can be read"


def _delete(args: argparse.Namespace, words: Sequence[str]) -> Found:
    if not words:
        raise FqError("delete needs numbers of runs: fq results delete 3 4")
    numbers = list(dict.fromkeys(map(run_number, words)))
    with Results(args.store, must_exist=True) as store:
        for number in numbers:  # before any is gone
            if not store.has(number):
                raise FqError(f"{store.path}: there is no run {number}")
        for number in numbers:
            store.delete(number)
    said = f"deleted: {'run' if len(numbers) == 1 else 'runs'} {', '.join(map(str, numbers))}"
    return {"deleted": numbers}, said


ACTIONS: dict[str, Callable[[argparse.Namespace, Sequence[str]], Found]] = {
    "merge": _merge,
    "check": _check,
    "delete": _delete,
}
