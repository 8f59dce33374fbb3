"""The numbers of the narrow floats, from their definition, and rounding to nearest among them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


class Table(NamedTuple):
    """``numbers``: by code, 0 first, sign left out; ``first_beyond``: what the next code would be."""

    numbers: tuple[Fraction, ...]
    first_beyond: Fraction
    m: int


def table(e: int, m: int, bias: int, special: int = 0) -> Table:
    """e exponent and m mantissa bits; the ``special`` highest codes are no finite numbers."""
    values = []
    for code in range(2 ** (e + m) + 1):
        exponent, mantissa = divmod(code, 2**m)
        if exponent == 0:
            values.append(Fraction(mantissa, 2**m) * Fraction(2) ** (1 - bias))
        else:
            values.append((1 + Fraction(mantissa, 2**m)) * Fraction(2) ** (exponent - bias))
    end = len(values) - 1 - special
    return Table(tuple(values[:end]), values[end], m)


FLOATS = {
    "fp8_e4m3fn": table(4, 3, 7, special=1),  # NaN
    "fp8_e5m2": table(5, 2, 15, special=4),  # infinity, three NaN
    "fp8_e4m3fnuz": table(4, 3, 8),
    "fp8_e5m2fnuz": table(5, 2, 16),
    "fp6_e2m3": table(2, 3, 1),
    "fp6_e3m2": table(3, 2, 3),
    "fp4_e2m1": table(2, 1, 1),
}


def nearest(numbers: Sequence[Fraction], x: Fraction) -> Fraction:
    """The number of numbers[0] = 0 < numbers[1] < ... nearest to |x|, with x's sign; of two the one
    with the even code, beyond the last the last."""
    magnitude = abs(x)
    above = bisect_left(numbers, magnitude)
    if above == len(numbers):
        found = numbers[-1]
    elif numbers[above] == magnitude:
        found = magnitude
    else:
        low, high = magnitude - numbers[above - 1], numbers[above] - magnitude
        up = high < low or (high == low and above % 2 == 0)
        found = numbers[above] if up else numbers[above - 1]
    return found if x >= 0 else -found
