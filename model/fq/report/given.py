"""What other commands wrote as JSON, for a page to hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FqError

_OF_PLAN = {"run", "command", "plan", "front", "uniform", "binds", "validated"}
_OF_RANGES = {"model", "text", "n_ctx", "n_chunks", "sites", "outlier_times_median"}


def read_plan(path: str, run: int) -> dict[str, Any]:
    """As `fq plan --json` writes it. Raises FqError for what is something else, or of another run."""
    data = _read("--plan", path, _OF_PLAN, "fq plan")
    if data["run"] != run:
        raise FqError(f"--plan {path}: it is of run {data['run']}, not of {run}")
    _check(data, "--plan", path, _is_plan)
    return data


def read_ranges(path: str, model: str) -> dict[str, Any]:
    """As `fq ranges --json` writes them. Raises FqError for what is something else, or of another model."""
    data = _read("--ranges", path, _OF_RANGES, "fq ranges")
    _check(data, "--ranges", path, _is_ranges)
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


def _check(data: Mapping[str, Any], option: str, path: str, is_right: Any) -> None:
    try:
        right = is_right(data)
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise FqError(f"{option} {path}: some of its figures are not there")


def _is_plan(data: Mapping[str, Any]) -> bool:
    sites = data["plan"]["sites"]
    plans = [data["plan"], *data["front"], *data["uniform"], *(data["validated"] or {"cells": []})["cells"]]
    known = all(isinstance(one["cost"], (int, float)) for one in (*sites, *plans))
    return known and bool(sites) and all("mean_kld" in one for one in (*sites, *plans))


def _is_ranges(data: Mapping[str, Any]) -> bool:
    parts = [site[part] for site in data["sites"] for part in ("rest", "first")]
    exponents = all(int(exponent) or True for part in parts for exponent in part["exponents"])
    return bool(parts) and exponents and all("channels" in site for site in data["sites"])
