"""What a norm unit costs in hardware and in KL divergence: which units no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fq_kernels import Format, NormUnit
from fq_kernels.formats.kernels import NARROW
from fq_kernels.rules import UnitRule, parse_rule

from ..errors import FqError
from .prices import read_prices_of

FLOAT_BITS, FLOAT_SIGNIFICAND, DOUBLE_BITS = 32, 24, 64
BF16_SIGNIFICAND = 8
TORCH_LANES = 32 * 4  # src/norm/unit.h
_WHOLE = ("unit", "together")  # kinds of cells that are a unit as it was asked for
# What there is a price of, and what it counts.
QUANTITIES = {
    "accumulator_bits": "bits of an accumulator, times the lanes that have one; of chunks with the outer's",
    "table_entries": "entries of the table of inverse roots; one more where it is linear",
    "newton_steps": "Newton's steps",
    "exact_roots": "1 where the inverse root is exact",
    "multiplier_bits": "significant bits of what the norm reads, which it squares and scales",
    "output_bits": "bits of what it writes",
}


def quantities(unit: NormUnit, wanted: Iterable[str] = QUANTITIES) -> dict[str, float]:
    """Of each of QUANTITIES that is wanted. Raises FqError for a format whose bits are not known."""
    formats, root = unit.formats, unit.inverse_root
    of: dict[str, Callable[[], float]] = {
        "accumulator_bits": lambda: _accumulator_bits(unit),
        "table_entries": lambda: (1 << root.table_bits) + root.linear if root.table_bits else 0,
        "newton_steps": lambda: root.newton,
        "exact_roots": lambda: int(not root.table_bits and not root.newton),
        "multiplier_bits": lambda: _significand(formats.get("x")),
        "output_bits": lambda: _bits(formats.get("out")),
    }
    return {item: of[item]() for item in wanted}


def _accumulator_bits(unit: NormUnit) -> float:
    order = unit.sum_order
    acc = DOUBLE_BITS if unit.sums_in_double else _bits(unit.formats.get("acc"))
    if order.kind == "chunk":
        return acc + _bits(unit.outer_format)
    return acc * {"lanes": order.n, "torch": TORCH_LANES}.get(order.kind, 1)


def _bits(fmt: Format | None) -> float:
    if fmt is None:
        return FLOAT_BITS
    if fmt.bits_per_value is None:
        raise FqError(f"format {fmt}: how many bits it has is not known")
    return fmt.bits_per_value


def _significand(fmt: Format | None) -> int:
    """Bits, with the one that is not stored."""
    if fmt is None:
        return FLOAT_SIGNIFICAND
    quant, narrow, _ = fmt.kernel
    if narrow is not None and quant == NARROW:
        return FLOAT_SIGNIFICAND - narrow.shift
    if fmt.name != "bf16":
        raise FqError(f"format {fmt}: how many significant bits it has is not known")
    return BF16_SIGNIFICAND


def read_prices(path: Path) -> dict[str, float]:
    """Of a CSV file with the columns item and price, a line for each of QUANTITIES that has one.

    Raises FqError naming the file, the line and what is wrong with it.
    """

    def quantity(item: str) -> str:
        if item not in QUANTITIES:
            raise ValueError(f"must be an item and its price; items are {', '.join(QUANTITIES)}")
        return item

    return read_prices_of(path, "price", quantity)


class Priced(NamedTuple):
    """interval: 95 % over chunks of the mean KL; of what is exactly 0 both ends are."""

    unit: str
    cost: float
    kld: float
    interval: tuple[float, float] | None
    quantities: dict[str, float]


def priced(cells: Iterable[Mapping[str, Any]], prices: Mapping[str, float]) -> list[Priced]:
    """The cells, entries of `figures`, that are one unit rule and nothing else; by cost, then by KL.

    Those whose figures are not finite are left out. Raises FqError as `quantities` does, where there is no
    such cell, and where units are of different norms.
    """
    sites: str | None = None
    found: dict[str, Priced] = {}
    for entry in cells:
        rules = [parse_rule(rule) for rule in entry["rules"]]
        if len(rules) != 1 or not isinstance(rules[0], UnitRule) or entry["kind"] not in _WHOLE:
            continue
        mine = str(rules[0]).partition("=")[0]
        if sites not in (None, mine):
            raise FqError(
                f"the run's units are of {sites} and of {mine}: what these cost is not to be compared"
            )
        sites = mine
        kld = entry["comparison"]["mean_kld"]
        if kld is None or not math.isfinite(kld) or entry["not_finite_tokens"]:
            continue
        ends = entry["comparison"]["mean_kld_ci95_chunks"]
        interval = (0.0, 0.0) if kld == 0 else None if ends is None else (float(ends[0]), float(ends[1]))
        of = quantities(rules[0].unit, prices)
        cost = math.fsum(prices[item] * n for item, n in of.items())
        found.setdefault(str(rules[0]), Priced(str(rules[0]), cost, float(kld), interval, of))
    if not found:
        raise FqError("no cell of the run is a unit: fq sweep --norm-unit makes them; or name another run")
    return sorted(found.values(), key=lambda each: (each.cost, each.kld))


def pareto_set(units: Iterable[Priced]) -> list[Priced]:
    """Of units sorted as `priced` sorts them, those that no other beats in cost and mean KL at once."""
    best: list[Priced] = []
    for each in units:
        if not best or each.kld < best[-1].kld:
            best.append(each)
    return best


def cheapest(units: Iterable[Priced], budget: float) -> Priced | None:
    """The first whose mean KL is below the budget with the whole of its interval."""
    return next((u for u in units if u.interval is not None and u.interval[1] < budget), None)
