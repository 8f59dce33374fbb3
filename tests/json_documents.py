"""What --json writes, against its schema."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from jsonschema import Draft202012Validator

from fq.commands.schema import schema_of


@cache
def _validator(kind):
    return Draft202012Validator(schema_of(kind))


def check(text):
    """The document; fails where it is not as the schema that it names says."""
    document = json.loads(text)
    assert next(iter(document)) == "schema"
    fq, kind, _ = document["schema"].split("/")
    assert fq == "fq"
    errors = [f"{error.json_path}: {error.message[:300]}" for error in _validator(kind).iter_errors(document)]
    assert not errors, "\n".join([document["schema"], *errors])
    return document


def check_written(args, out, folder):
    """Of a command that has ended: what its --json has written to stdout or into a file."""
    args = [str(arg) for arg in args]
    if "--json" not in args:
        return
    target = (args[args.index("--json") + 1 :] or ["-"])[0]
    if args[0] in AS_TEXT or target == "-":
        check(out)
    elif (path := Path(folder, target)).is_file():
        check(path.read_text(encoding="utf-8"))


# whose --json takes no file
AS_TEXT = ("inspect", "graph", "sites", "formats", "profiles", "trace")
