"""What things cost, from a CSV file of two columns."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

from ..errors import FqError

MAX_BYTES = 1 << 20


def read_prices_of(path: Path, what: str, name: Callable[[str], str]) -> dict[str, float]:
    """Of a file whose first line is item and ``what``, by item, as ``name`` has it, which raises ValueError
    for what is none.

    Raises FqError naming the file, the line and what is wrong with it.
    """
    if path.stat().st_size > MAX_BYTES:
        raise FqError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (UnicodeDecodeError, csv.Error) as e:
        raise FqError(f"{path}: is no CSV file in UTF-8: {e}") from None
    lines = [[field.strip() for field in line] for line in lines]
    if not lines or lines[0] != ["item", what]:
        raise FqError(f"{path}: the first line must be item,{what}")
    prices: dict[str, float] = {}
    for number, line in enumerate(lines[1:], 2):
        if not any(line):
            continue
        where = f"{path}, line {number}"
        if len(line) != 2:
            raise FqError(f"{where}: must be an item and its {what}")
        try:
            item = name(line[0])
        except ValueError as e:
            raise FqError(f"{where}: {e}") from None
        if item in prices:
            raise FqError(f"{where}: {item} is there twice")
        try:
            price = float(line[1])
        except ValueError:
            price = math.nan
        if not 0 <= price < math.inf:
            raise FqError(f"{where}: a {what} is a number from 0, not {line[1]!r}")
        prices[item] = price
    if not prices:
        raise FqError(f"{path}: there is no {what} in it")
    return prices
