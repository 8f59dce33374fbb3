"""What a format's name stands for: its options, its numbers, and the function that rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .formats import Format

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
# values, and which elements were cut to the format's range (None: none was)
Rounded = tuple[Floats, Mask | None]


class Spacing(NamedTuple):
    """Where a neighbour of x (rows, n) may lie, so that it is rounded as x is: what dither needs.

    step       (rows, n): how far apart the format's values lie around each element; 0 for one
               that must stay, since it makes its block's scale
    low, high  (rows, n): bounds outside which it would make another scale; None: there is none
    """

    step: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True)
class Family:
    """The formats that share a name and differ in their options.

    quantise        (x, format) -> Rounded; x is (rows, n) float32, C-contiguous, not empty, read-only.
                    That a finite element became infinite or NaN need not be said in the mask
    roundings       names of the rounding rules, the default first
    choices         further options, each a tuple of which one holds, the default first; an
                    entry that ends in ``=`` takes a positive integer
    bits            bits per value, shares of scales included; a function where options matter
    largest, smallest_normal, smallest_subnormal
                    positive numbers; None where they depend on a scale
    block           how many values share a scale, in words; None where there is no scale
    whole_tensor    whether the rows must come in one call; option ``tensor`` says so as well
    needs           package that the format is rounded with
    spacing         (x, format) -> Spacing, x as for quantise; None: the format has no dither
    noise           whether it is a control (noise.py), which hands its options on
    """

    name: str
    quantise: Callable[[Floats, Format], Rounded]
    roundings: tuple[str, ...] = ("nearest-even",)
    choices: tuple[tuple[str, ...], ...] = ()
    bits: float | Callable[[Format], float] | None = None
    largest: float | None = None
    smallest_normal: float | None = None
    smallest_subnormal: float | None = None
    block: str | None = None
    idempotent: bool = False
    whole_tensor: bool = False
    aliases: tuple[str, ...] = ()
    needs: str | None = None
    spacing: Callable[[Floats, Format], Spacing] | None = None
    noise: bool = False
    note: str = ""
