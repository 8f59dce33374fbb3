"""What other commands wrote as JSON, for a page to hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FqError

SCHEMA = Path(__file__).parents[1] / "data" / "schema.json"
_TYPES: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}
_OF_PLAN = {"run", "command", "plan", "front", "uniform", "binds", "validated"}
_OF_A_SITE = {"site", "kind", "layer", "point", "channels"}
_OF_RANGES = {"model", "text", "n_ctx", "n_chunks", "sites", "outlier_times_median"}


def read_plan(path: str, run: int) -> dict[str, Any]:
    """As `fq plan --json` writes it. Raises FqError for what is something else, or of another run."""
    data = _read("--plan", path, _OF_PLAN, "fq plan")
    if data["run"] != run:
        raise FqError(f"--plan {path}: it is of run {data['run']}, not of {run}")
    _check(data, "--plan", path, "plan", _is_plan)
    return data


def read_ranges(path: str, model: str) -> dict[str, Any]:
    """As `fq ranges --json` writes them. Raises FqError for what is something else, or of another model."""
    data = _read("--ranges", path, _OF_RANGES, "fq ranges")
    _check(data, "--ranges", path, "ranges", _is_ranges)
    of, mine = (os.path.basename(name) for name in (str(data["model"]), model))
    if of != mine:
        raise FqError(f"--ranges {path}: it is of {of}, not of {mine}")
    for site in data["sites"]:
        for part in ("rest", "first"):  # a name in JSON is text
            found = site[part]["exponents"].items()
            site[part]["exponents"] = {int(exponent): count for exponent, count in found}
    return data


def _read(option: str, path: str, keys: set[str], command: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as e:
        raise FqError(f"{option} {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise FqError(f"{option} {path}: is no JSON: {e}") from None
    if not isinstance(data, dict) or not keys <= data.keys():
        raise FqError(f"{option} {path}: is not what {command} --json writes")
    return data


def _check(data: Mapping[str, Any], option: str, path: str, kind: str, is_right: Any) -> None:
    try:
        defs = json.loads(SCHEMA.read_text("utf-8"))["$defs"]
        right = _typed(data, defs[kind], defs) and is_right(data)
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise FqError(f"{option} {path}: some of its figures are not there")


def _typed(value: Any, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> bool:
    """Whether all that is there has the type that fq's schema gives it; it need not be all that there is."""
    if ref := schema.get("$ref"):
        return _typed(value, defs[ref.rpartition("/")[2]], defs)
    if some := schema.get("anyOf"):
        return any(_typed(value, one, defs) for one in some)
    kinds = schema.get("type", list(_TYPES))
    if type(value) not in {
        of for kind in ([kinds] if isinstance(kinds, str) else kinds) for of in _TYPES[kind]
    }:
        return False
    if isinstance(value, list):
        return all(_typed(one, schema.get("items", {}), defs) for one in value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        patterns = schema.get("patternProperties", {})
        other = others if isinstance(others, dict) else next(iter(patterns.values()), {})
        return all(_typed(one, known.get(key, other), defs) for key, one in value.items())
    return True


def _is_plan(data: Mapping[str, Any]) -> bool:
    sites = data["plan"]["sites"]
    plans = [data["plan"], *data["front"], *data["uniform"], *(data["validated"] or {"cells": []})["cells"]]
    known = all(isinstance(one["cost"], (int, float)) for one in (*sites, *plans))
    return known and bool(sites) and all("mean_kld" in one for one in (*sites, *plans))


def _is_ranges(data: Mapping[str, Any]) -> bool:
    """With exponents that floats have."""
    parts = [site[part] for site in data["sites"] for part in ("rest", "first")]
    known = all(-1100 < int(exponent) < 1100 for part in parts for exponent in part["exponents"])
    known = known and all(part["values"] > 0 for part in parts if part["exponents"])
    known = known and all({"largest", "percentiles"} <= part.keys() for part in parts)
    return bool(parts) and known and all(_OF_A_SITE <= site.keys() for site in data["sites"])
