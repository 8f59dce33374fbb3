"""What a store's rows hold, checked as it is read: a damaged file ends in one error, not in figures.

Whatever passes here can be computed with and shown. All raise ValueError saying what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from fq_kernels import MAX_GRADS
from fq_kernels.rules.calibration import said_at

from ..measure.cells import CELL_KINDS, COUNT_COLUMNS, WITHOUT_RULES, Cell, CellChunk
from ..measure.chunks import ORDERS, SCORED
from ..measure.estimates import Asked
from ..measure.statistics import Paired

MAX_CHUNKS = 1 << 22  # of a run; a text of 1 GiB has fewer
MAX_DEPTH = 8  # of arrays and objects in one another
MAX_ESTIMATES = 1 << 27  # figures of a chunk
ESTIMATE_COLUMNS = {
    *("value_sq", "error_sq", "along", "blocks", "cross", "by_token", "neighbours", "by_element"),
    *("whole_by_token", "whole_by_element", "largest"),
}
_FORMAT = re.compile(r"[a-z][a-z0-9_]{0,63}(:\S{1,4096})?")  # there may be no such one any more
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SITE = re.compile(r"[a-z][a-z0-9_]{0,63}(\[[0-9]{1,9}\])?(\.(in|raw|weighted))?")

# what settings must hold, and of what types
_INTEGERS = {"n_tokens": 1, "n_ctx": 3, "n_chunks_asked": 1, "batch": 1}  # and the least
_TEXTS = ("model", "activations")
_TEXTS_OR_NONE = ("text", "command")
_CELL = {"name", "kind", "group", "rules"}  # and of later versions "of"
_ALWAYS = ("rows_quantised", "elements", "not_finite")  # of every version
_COUNTS = (*_ALWAYS, "changed", "out_of_range", "to_zero", "subnormal")  # whole numbers
_OF_SCALES = ("file", "sha256", "method", "per", "model.file", "text.name", "text.sha256")
LEAST_KLD = -1e-6  # of a token, by rounding; none is below 0, but an early version's sums could be
MAX_COLUMNS, MAX_NAMES_CHARS, MAX_COLUMN_SETS = 256, 1 << 15, 1024

T = TypeVar("T")


def digest(*parts: object) -> bytes:
    """Of the values of a row."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        found.update(f"{type(part).__name__} {len(data)} ".encode())
        found.update(data)
    return found.digest()


def check_digest(kept: object, *parts: object) -> None:
    """Of a row whose values are those that were written; None is of a version that did not keep it."""
    if kept is not None and kept != digest(*parts):
        raise ValueError("it is not what was written: its digest is another")


def json_of(what: str, text: object, kind: type[T]) -> T:
    """A JSON array or object, ``kind`` list or dict."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is not text")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is not JSON") from None
    if not isinstance(value, kind):
        raise ValueError(f"{what} is not a JSON {'object' if kind is dict else 'array'}")
    _check_depth(what, value, MAX_DEPTH)
    return value


def _check_depth(what: str, value: object, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"{what} is nested too deeply")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(what, item, left - 1)


def text_of(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text")
    return value


def _is_integer(value: object, least: int, most: int = 1 << 53) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def cells_of(text: object, *, may_be_none: bool = False) -> tuple[Cell, ...]:
    cells = []
    for about in json_of("cells", text, list):
        if not isinstance(about, dict) or not _CELL <= set(about) <= {*_CELL, "of"}:
            raise ValueError("a cell is not one of name, kind, group and rules")
        rules = about.pop("rules")
        if not isinstance(rules, list) or not all(isinstance(x, str) for x in (*rules, *about.values())):
            raise ValueError("a cell's name, kind, group and rules are not texts")
        if about["kind"] not in CELL_KINDS or bool(rules) == (about["kind"] in WITHOUT_RULES):
            raise ValueError(f"a cell with {len(rules)} rules is of kind {about['kind']!r}")
        "".join(about.values()).encode()  # a lone surrogate, which no file would take
        cells.append(Cell(**about, rules=tuple(rules)))
    if not cells and not may_be_none:
        raise ValueError("there are no cells")
    return tuple(cells)


def settings_of(text: object) -> dict[str, Any]:
    settings = json_of("settings", text, dict)
    for key, least in _INTEGERS.items():
        if not _is_integer(settings.get(key), least):
            raise ValueError(f"{key} is {_shown(settings.get(key))}")
    for key in _TEXTS:
        text_of(key, settings.get(key))
    if "text" not in settings:
        raise ValueError("text is not there")
    for key in _TEXTS_OR_NONE:
        if settings.get(key) is not None:
            text_of(key, settings[key])
    chunks = settings["n_chunks_asked"]
    if chunks > MAX_CHUNKS or chunks * settings["n_ctx"] > settings["n_tokens"]:
        raise ValueError(f"n_chunks_asked is {chunks}, of {settings['n_tokens']} tokens")
    if "chunk_order" not in settings:  # of a version that took the first chunks always
        settings |= {"chunk_order": "first", "chunk_seed": None, "chunk_indices": list(range(chunks))}
    settings.setdefault("scored", SCORED[0])
    if settings["scored"] not in SCORED:
        raise ValueError(f"scored is {_shown(settings['scored'])}")
    if settings["chunk_order"] not in ORDERS:
        raise ValueError(f"chunk_order is {_shown(settings['chunk_order'])}")
    seed = settings.setdefault("chunk_seed", None)
    drawn = seed is not None or settings["chunk_order"] == "random"
    if drawn and not _is_integer(seed, 0, (1 << 64) - 1):
        raise ValueError(f"chunk_seed is {_shown(seed)}")
    indices, n_text = settings.get("chunk_indices"), settings["n_tokens"] // settings["n_ctx"]
    if not isinstance(indices, list) or not all(_is_integer(i, 0, n_text - 1) for i in indices):
        raise ValueError("chunk_indices is not a list of the text's chunks")
    if not chunks == len(indices) == len(set(indices)):
        raise ValueError(f"chunk_indices has not {chunks} different chunks")
    baseline = settings.get("baseline", [])
    if not isinstance(baseline, list) or not all(isinstance(rule, str) for rule in baseline):
        raise ValueError(f"baseline is {_shown(baseline)}")
    if not text_of("baseline_profile", settings.get("baseline_profile", "")).isprintable():
        raise ValueError("baseline_profile has characters that cannot be shown")
    if "base_model" in settings or "base_model_sha256" in settings:
        text_of("base_model", settings.get("base_model"))
        if not _SHA256.fullmatch(text_of("base_model_sha256", settings.get("base_model_sha256"))):
            raise ValueError("base_model_sha256 is none")
    _check_calibrations(settings.get("calibrations", []))
    norms = settings.get("norms")
    if not isinstance(norms, list) or not all(_is_value(norm, 3) for norm in norms):
        raise ValueError("norms is not a list of kind, layer and rows")
    values = settings.get("values", [])
    if not isinstance(values, list) or not all(_is_value(value, 5) for value in values):
        raise ValueError("values is not a list of kind, layer, rows and two flags")
    if "sensitivity" in settings:
        asked_of(settings["sensitivity"])
    return settings


def _check_calibrations(found: object) -> None:
    """Of files of static scales, as `calibrations_of` writes them."""
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError("calibrations is not a list of objects")
    for each in found:
        texts = all(isinstance(said_at(each, key), str) for key in _OF_SCALES)
        if not texts or not isinstance(each.get("same_text"), bool):
            raise ValueError("calibrations does not say which files of which model and text")


def asked_of(found: object) -> Asked:
    """Of an estimate of every site and format, as `Asked` is written."""
    if not isinstance(found, dict) or not set(found) == {field.name for field in fields(Asked)}:
        raise ValueError("sensitivity does not say what was asked for")
    lists = ("sites", "formats", "classes", "columns")
    if not all(isinstance(found[key], list) for key in lists):
        raise ValueError("sensitivity is not of lists")
    for key in ("sites", "formats", "columns"):
        if not all(isinstance(x, str) and x.isprintable() for x in found[key]):
            raise ValueError(f"sensitivity's {key} are not texts")
        if not found[key] or len(set(found[key])) < len(found[key]):
            raise ValueError(f"sensitivity's {key} are none, or one is there twice")
    if not ESTIMATE_COLUMNS <= set(found["columns"]):
        raise ValueError(f"sensitivity's columns lack one of {', '.join(sorted(ESTIMATE_COLUMNS))}")
    for site in found["sites"]:
        if not _SITE.fullmatch(site):
            raise ValueError(f"{_shown(site)} is no site")
    if not all(_FORMAT.fullmatch(spec) for spec in found["formats"]):
        raise ValueError("sensitivity's formats are none")
    classes = found["classes"]
    if len(classes) != len(found["sites"]) or not all(
        x is None or _is_integer(x, -(1 << 31), 1 << 31) for x in classes
    ):
        raise ValueError("sensitivity's classes are not those of its sites")
    if not _is_integer(found["samples"], 1, MAX_GRADS) or not _is_integer(found["seed"], 0, 1 << 64):
        raise ValueError("sensitivity's samples or seed are none")
    size = len(found["sites"]) * len(found["formats"]) * len(found["columns"])
    if size > MAX_ESTIMATES:
        raise ValueError(f"sensitivity is of {size} figures")
    texts, samples, seed = {key: tuple(found[key]) for key in lists}, found["samples"], found["seed"]
    return Asked(**texts, samples=samples, seed=seed)


def estimates_of(asked: Asked, blob: object) -> np.ndarray:
    """Of a chunk, (sites, formats, columns)."""
    shape = len(asked.sites), len(asked.formats), len(asked.columns)
    if not isinstance(blob, bytes) or len(blob) != 8 * shape[0] * shape[1] * shape[2]:
        raise ValueError(f"estimates are not of {shape[0]} sites and {shape[1]} formats")
    found = np.frombuffer(blob, "<f8").reshape(shape)
    with np.errstate(invalid="ignore"):
        costs = [asked.columns.index(name) for name in ESTIMATE_COLUMNS - {"along", "cross"}]
        if (found[..., costs] < 0).any() or np.isinf(found).any():
            raise ValueError("estimates have figures that are no costs")
    return found


def _is_value(value: object, length: int) -> bool:
    if not isinstance(value, list) or len(value) != length:
        return False
    kind, layer, rows, *flags = value
    return (
        isinstance(kind, str)
        and re.fullmatch(r"[a-z][a-z0-9_]{0,63}", kind) is not None
        and (layer is None or _is_integer(layer, 0))
        and _is_integer(rows, 0)
        and all(isinstance(flag, bool) for flag in flags)
    )


def chunk_of(n_scored: int, columns: Sequence[str], blobs: Sequence[object]) -> CellChunk:
    """Of nll_base, nll, kld, dp, same_top, counts, whose columns are given, and p_top, as a row has them."""
    *figures, same_top, counts, p_top = blobs
    if p_top is None:  # of a version that did not keep it
        p_top = np.full(n_scored, np.nan, "<f8").tobytes()
    for name, blob, size in zip(
        ("baseline's nll", "nll", "kld", "dp", "same_top", "baseline's p_top"),
        (*figures, same_top, p_top),
        (8, 8, 8, 8, 1, 8),
        strict=True,
    ):
        if not isinstance(blob, bytes) or len(blob) != n_scored * size:
            raise ValueError(f"{name} is not of {n_scored} tokens")
    tops = np.frombuffer(same_top, np.uint8)  # type: ignore[call-overload]
    if tops.max(initial=0) > 1:
        raise ValueError("same_top is neither 0 nor 1")
    table = _counts_of(columns, counts)
    nll_base, nll, kld, dp = (np.frombuffer(blob, "<f8") for blob in figures)  # type: ignore[call-overload]
    if (kld < LEAST_KLD).any():
        raise ValueError("kld has tokens that are below 0")
    # version 0.1.0 took NaN for an agreement
    agree = tops.view(bool) & np.isfinite(kld)
    p_top = np.frombuffer(p_top, "<f8")  # type: ignore[call-overload]
    return CellChunk(Paired(nll_base, nll, kld, dp, agree, p_top), table)


def count_columns_of(text: object) -> list[str]:
    """The names of the columns of counts."""
    columns = json_of("count_columns", text, list)
    if not all(isinstance(c, str) and len(c) <= 64 for c in columns) or len(columns) > MAX_COLUMNS:
        raise ValueError("count_columns is not a list of names")
    if not set(_ALWAYS) <= set(columns):
        raise ValueError(f"count_columns lacks one of {', '.join(_ALWAYS)}")
    return columns


def _counts_of(columns: Sequence[str], blob: object) -> np.ndarray:
    """A site a row, by today's columns: NaN where a version did not count something yet."""
    if not isinstance(blob, bytes) or len(blob) % (8 * len(columns)):
        raise ValueError(f"counts is not of {len(columns)} numbers a site")
    kept = np.frombuffer(blob, "<f8").reshape(-1, len(columns))
    table = np.full((len(kept), len(COUNT_COLUMNS)), np.nan)
    for i, name in enumerate(COUNT_COLUMNS):
        if name in columns:
            table[:, i] = kept[:, columns.index(name)]
            wrong = (table[:, i] < 0) | (table[:, i] > 1 << 53)
            if name in _COUNTS and (wrong.any() or (name in _ALWAYS and np.isnan(table[:, i]).any())):
                raise ValueError("counts has numbers that count nothing")
    return table


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
