"""The documents that --json writes: each command's as its schema says, and schemas that keep what they said.

`python tests/test_json_schema.py` writes data/json_keys.json anew; docs/json.md says when a version rises.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from json_documents import AS_TEXT, check
from jsonschema import Draft202012Validator

from fq.cli import main, whole_parser
from fq.commands.files import DOCUMENTS
from fq.commands.schema import SCHEMA, schema_of

DEFS = json.loads(SCHEMA.read_text(encoding="utf-8"))["$defs"]
KEPT = Path(__file__).parent / "data" / "json_keys.json"
QUICK = "-c 24 --chunks 2 -t 1"
RULE = "--fake-quant ffn_norm=bf16"
PRICES = "item,price\naccumulator_bits,1\nexact_roots,400\n"
ITEM = {"question": "Which?", "choices": ["this", "that"], "answer": 1}

# kind of document: a command that writes it; they run in this order, as some read what others have kept
WRITTEN = {
    "inspect": "inspect MODEL",
    "graph": "graph MODEL",
    "sites": "sites -m MODEL --fake-quant k=int8",
    "formats": "formats",
    "profiles": "profiles",
    "run": f"run -m MODEL -p Hello -n 3 --ignore-eos -t 1 {RULE} --trace trace",
    "trace": "trace trace",
    "perplexity": f"perplexity -m MODEL {QUICK} {RULE} --control --realisations 2 --who-pays",
    "tasks": f"tasks --multiple-choice -f items -m MODEL -t 1 {RULE}",
    "divergence": f"divergence -m MODEL --prompts 2 -n 4 -t 1 {RULE}",
    "ranges": f"ranges -m MODEL {QUICK} --sites ffn_norm.in",
    "calibrate": f"calibrate -m MODEL {QUICK} -o scales",
    "forecast": f"sweep -m MODEL {QUICK} --dry-run --store s.sqlite",
    "shard": f"sweep -m MODEL {QUICK} --shard 1/1 --store shard.sqlite",
    "results-merge": "results merge s.sqlite shard.sqlite",
    "sweep": f"sweep -m MODEL {QUICK} --norm-unit ffn_norm=acc=bf16;rsqrt=bf16 --store s.sqlite",
    "sweeps": "sweep -m MODEL -f text -c 24 -c 16 --chunks 2 -t 1 --sites * --format int4 --store s.sqlite",
    "sensitivity": f"sensitivity -m MODEL {QUICK} --sites ffn_norm.weighted --format bf16 --format int4 "
    "--verify 6 --store s.sqlite",
    "plan": "plan -m MODEL --budget-bits 12 --store s.sqlite",
    "pareto": "pareto 2 --prices prices --store s.sqlite",
    "results": "results --store s.sqlite",
    "compare": "results compare 3 4 --store s.sqlite",
    "rank": "results rank 3 4 --store s.sqlite",
    "compare-estimate": "results compare 1 5 --store s.sqlite",
    "results-check": "results check --store s.sqlite",
    "results-delete": "results delete 1 --store s.sqlite",
    "bench": "bench -m MODEL --prompt-tokens 4 -n 2 --rounds 2 -t 1",
    "replicate": "replicate -m MODEL --rounds 2 --chunks 1 -c 16 -t 1 -o page",
    "worker-check": "worker-check -m MODEL --scheduler local:1",
}


def test_each_command_that_has_json_is_tried():
    (commands,) = (a.choices for a in whole_parser()._actions if isinstance(a, argparse._SubParsersAction))
    having = {
        name: parser._option_string_actions["--json"]
        for name, parser in commands.items()
        if "--json" in parser._option_string_actions
    }
    assert {command.split()[0] for command in WRITTEN.values()} == set(having)
    assert set(AS_TEXT) == {name for name, option in having.items() if not option.metavar}


def test_documents(tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("items").write_text("\n".join([json.dumps(ITEM)] * 3))
    Path("prices").write_text(PRICES)
    Path("text").write_text("A text of some words that are said again. " * 30)
    for kind, command in WRITTEN.items():
        args = [str(tiny_path) if word == "MODEL" else word for word in command.split()]
        target = ["--json"] if args[0] in AS_TEXT else ["--json", kind]
        assert main([*args, *target]) == 0, f"{kind}: {capsys.readouterr().err}"
        out = capsys.readouterr().out
        document = check(out if args[0] in AS_TEXT else Path(kind).read_text(encoding="utf-8"))
        assert document["schema"] == f"fq/{kind}/{DOCUMENTS[kind]}"


def test_the_schema_command(capsys):
    assert main(["schema"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        [kind, str(version)] for kind, version in DOCUMENTS.items()
    ]
    for kind in DOCUMENTS:
        assert main(["schema", kind]) == 0
        schema = json.loads(capsys.readouterr().out)
        Draft202012Validator.check_schema(schema)
        assert schema == schema_of(kind) and "evaluations" not in schema.get("$defs", {})
    assert "group" in schema_of("sweep")["$defs"] and "group" not in schema_of("run")["$defs"]
    assert main(["schema", "swoop"]) == 2
    assert "there is no kind 'swoop'; there are bench, " in capsys.readouterr().err


# ---------------------------------------------------------------- the schemas themselves


def objects(schema, path):
    """(path, schema) of each that says which keys an object has, and (path, schema) of each key."""
    if isinstance(schema, list):
        for one in schema:
            yield from objects(one, path)
    if not isinstance(schema, dict):
        return
    if "properties" in schema:
        yield path, schema
    for key, value in schema.items():
        if key == "properties":
            for name, one in value.items():
                yield from objects(one, f"{path}.{name}")
        elif key not in ("required", "const"):
            yield from objects(value, path)


def test_every_key_is_described_and_no_other_may_be_there():
    assert set(WRITTEN) == set(DOCUMENTS)
    used = set(DOCUMENTS).union(*(schema_of(kind).get("$defs", {}) for kind in DOCUMENTS))
    assert used == set(DEFS), "parts that nothing refers to"
    parts = {part["$ref"] for one in DEFS.values() for part in one.get("allOf", ())}
    for name, schema in DEFS.items():
        for path, one in objects(schema, name):
            closed = one.get("additionalProperties") is False or one.get("unevaluatedProperties") is False
            assert closed or f"#/$defs/{path}" in parts, path
            assert set(one["required"]) <= set(one["properties"]), path
            for key, value in one["properties"].items():
                said = value if "$ref" not in value else DEFS[value["$ref"].rpartition("/")[2]] | value
                whole = said.get("description") or said.get("title")
                assert whole or "properties" in said or said == {"type": ["number", "null"]}, f"{path}.{key}"
        if name in DOCUMENTS:
            assert schema["properties"]["schema"]["const"] == f"fq/{name}/{DOCUMENTS[name]}"


def keys_of(schema, name):
    """Of each key below, by its path: what it is, and whether it is always there."""
    found = {}
    for path, one in objects(schema, name):
        for key, value in one["properties"].items():
            what = {k: v for k, v in value.items() if k in ("type", "$ref", "const")} or {"type": "several"}
            (what,) = what.values()
            what = "|".join(what) if isinstance(what, list) else what.removeprefix("#/$defs/")
            found[f"{path}.{key}"] = what + ("" if key in one["required"] else "?")
    return found


def now():
    keys = {key: what for name, schema in DEFS.items() for key, what in keys_of(schema, name).items()}
    return {"versions": DOCUMENTS, "keys": keys}


def broken(kept):
    """By kind with the version that it had, the keys that are lost or have become something else."""
    keys = now()["keys"]
    lost = {
        key
        for key, what in kept["keys"].items()
        # a key that is always there now was so for those who reckoned with its absence, too
        if key not in keys or keys[key] not in (what, what.removesuffix("?"))
        if not key.endswith(".schema")
    }
    parts = {key.partition(".")[0] for key in lost}
    return {
        kind: sorted(key for key in lost if key.partition(".")[0] in reached)
        for kind, version in kept["versions"].items()
        if parts & (reached := {kind, *schema_of(kind).get("$defs", {})}) and DOCUMENTS[kind] <= version
    }


def test_a_version_keeps_its_keys():
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert not broken(kept), "keys that were there: their kinds' versions must rise (DOCUMENTS, schema.json)"
    assert kept == now(), "as it must be: python tests/test_json_schema.py"


def test_what_a_version_must_rise_for(monkeypatch):
    kept = now()
    for change in ({}, {"share.words": "string"}, {"share.n?": "integer"}):
        assert not broken(kept | {"keys": {k: v for k, v in kept["keys"].items() if k not in change}})
    gone = kept | {"keys": kept["keys"] | {"share.n_tokens": "integer"}}
    assert broken(gone)["sweep"] == ["share.n_tokens"] and "run" not in broken(gone)
    other = kept | {"keys": kept["keys"] | {"run.text": "integer"}}
    assert broken(other) == {"run": ["run.text"]}
    sometimes = kept | {"keys": kept["keys"] | {"group.additivity": "number|null"}}
    assert "sweep" in broken(sometimes)
    monkeypatch.setitem(DOCUMENTS, "run", 2)
    assert not broken(other | {"versions": kept["versions"] | {"run": 1}})


if __name__ == "__main__":
    if KEPT.exists() and (found := broken(json.loads(KEPT.read_text(encoding="utf-8")))):
        sys.exit(f"not written: the versions of these must rise: {found}")
    KEPT.write_text(json.dumps(now(), indent=1) + "\n", encoding="utf-8")
