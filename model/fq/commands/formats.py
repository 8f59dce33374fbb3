"""fq formats."""

from __future__ import annotations

import argparse
from typing import Any

from fq_kernels.formats import describe_formats

from ..words import table
from .files import write_json


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def main(args: argparse.Namespace) -> int:
    data = describe_formats()
    if args.json:
        write_json("formats", {"formats": data}, "-")
    else:
        print(_text(data))
    return 0


def _text(formats: list[dict[str, Any]]) -> str:
    """Three tables: numbers, options, notes."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.6g}"

    numbers = ["bits_per_value", "largest", "smallest_normal", "smallest_subnormal"]
    rows = [["format", "bits", "largest", "smallest normal", "subnormal", "scale shared by", "rounding"]]
    options = [["format", "options"]]
    notes = [["format", "note"]]
    for f in formats:
        values = [number(f[key]) for key in numbers]
        rows.append([f["name"], *values, str(f["block"] or "-"), f["rounding"]])
        if f["options"]:
            options.append([f["name"], ", ".join(f["options"])])
        if f["note"]:
            notes.append([f["name"], f["note"]])
    notes.append(["eXmY", "any other: X bits of exponent, Y of mantissa; e4m3, e3m4fn, e5m2fnuzb17 …"])
    return "\n\n".join([table(rows, {1, 2, 3, 4}), table(options), table(notes)])
