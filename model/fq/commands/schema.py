"""fq schema."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FqError
from ..words import table
from .files import DOCUMENTS

SCHEMA = Path(__file__).parents[1] / "data" / "schema.json"
_HERE = "#/$defs/"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind", metavar="KIND", nargs="?", help="print the JSON Schema of this kind (default: list all)"
    )


def main(args: argparse.Namespace) -> int:
    if args.kind is None:
        of = _whole()["$defs"]
        rows = [[kind, str(version), of[kind]["title"]] for kind, version in DOCUMENTS.items()]
        print(table([["kind", "version", "what it is"], *rows], {1}))
    else:
        print(json.dumps(schema_of(args.kind), indent=2, ensure_ascii=False))
    return 0


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a kind of document, with all that it refers to.

    Raises FqError for a kind that there is not.
    """
    if kind not in DOCUMENTS:
        raise FqError(f"there is no kind {kind!r}; there are {', '.join(DOCUMENTS)}")
    whole = _whole()
    defs: dict[str, Any] = whole["$defs"]
    used, new = set[str](), {kind}
    while new:
        used |= new
        new = {name for one in new for name in _named(defs[one])} - used
    parts = {name: part for name, part in defs.items() if name in used - {kind}}
    return {"$schema": whole["$schema"], **defs[kind]} | ({"$defs": parts} if parts else {})


@cache
def _whole() -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return whole


def _named(schema: Any) -> Iterator[str]:
    """Of the parts that a schema refers to."""
    if isinstance(schema, dict):
        if isinstance(ref := schema.get("$ref"), str):
            yield ref.removeprefix(_HERE)
        for value in schema.values():
            yield from _named(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _named(value)
