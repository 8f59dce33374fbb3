"""Static scales, which `fq calibrate` finds: a file, and what it says of a site."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..formats import Format
from ..formats.noise import without_noise
from .unit_rule import AnyRule

KIND = "fq static scales"
VERSION = 1
_MAX_BYTES = 256 << 20
# what is shown of a file, so that it must be there
_STRINGS = ("model.file", "model.sha256", "text.name", "text.sha256", "method", "per")
# float32's
_SMALLEST_NORMAL, _LARGEST = 2.0**-126, 2.0**128 - 2.0**104


@dataclass(frozen=True)
class Calibration:
    """What a file of static scales holds.

    path    the file
    about   model, text and its SHA-256, chunks, method, per
    sha256  of the file
    ranges  site -> the magnitude that the largest code stands for, float32 (1,), or (n,) for each channel
    """

    path: str
    about: dict[str, Any]
    sha256: str
    ranges: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: str) -> Calibration:
        """Raises ValueError that names the file and what is wrong with it, and OSError."""
        status = os.stat(path)
        return _load(path, status.st_mtime_ns, status.st_size)

    def format_at(self, site: object, fmt: Format) -> Format:
        """``fmt`` with the scales of a site. Raises ValueError for a site that the file lacks."""
        ranges = self.ranges.get(str(site))
        if ranges is None:
            raise ValueError(f"{self.path} has no scale for {site}")
        wanted = self.about.get("format")
        if wanted is not None and wanted != without_noise(fmt.name):
            raise ValueError(f"{self.path} has the scales that are best for {wanted}, not for {fmt.name}")
        return fmt.with_ranges(ranges)


def calibrations_of(rules: Iterable[AnyRule], text_sha256: str) -> list[dict[str, Any]]:
    """Of each file that the rules take scales from, what it is, and whether it is of the text measured on."""
    files = dict.fromkeys(fmt.calibration for rule in rules for fmt in rule.formats)
    found = [Calibration.load(file) for file in files if file]
    return [
        each.about
        | {
            "file": each.path,
            "sha256": each.sha256,
            "same_text": each.about["text"]["sha256"] == text_sha256,
        }
        for each in found
    ]


@lru_cache(maxsize=8)
def _load(path: str, _mtime: int, size: int) -> Calibration:
    import hashlib  # most runs have no such file
    import json

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}: {what}")

    if size > _MAX_BYTES:
        raise wrong(f"larger than {_MAX_BYTES >> 20} MiB")
    with open(path, "rb") as file:
        content = file.read(_MAX_BYTES)
        try:
            data = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError):
            raise wrong("is not JSON") from None
    if not isinstance(data, dict) or data.pop("kind", None) != KIND:
        raise wrong("is no file of static scales, which fq calibrate writes")
    if data.pop("version", None) != VERSION:
        raise wrong(f"is of another version than {VERSION}")
    sites = data.pop("sites", None)
    for key in _STRINGS:
        said = said_at(data, key)
        if not isinstance(said, str):
            raise wrong(f"{key} {'is missing' if said is None else 'must be a string'}")
    if not isinstance(sites, dict) or not sites:
        raise wrong("names no sites")
    ranges = {}
    for site, value in sites.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(_is_range(each) for each in values):
            raise wrong(f"the scale of {site} must be a number above 0, or one for each channel")
        ranges[site] = np.array(values, np.float32)
    return Calibration(path, data, hashlib.sha256(content).hexdigest(), ranges)


def said_at(data: dict[str, Any], key: str) -> object:
    """What a key, or ``KEY.KEY`` of an object in it, says; None: it is not there."""
    outer, dot, inner = key.partition(".")
    said = data.get(outer)
    if not dot:
        return said
    return said.get(inner) if isinstance(said, dict) else None


def _is_range(value: object) -> bool:
    return type(value) in (int, float) and _SMALLEST_NORMAL <= value <= _LARGEST  # type: ignore[operator]
