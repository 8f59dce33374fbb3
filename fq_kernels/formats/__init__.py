"""The formats that a norm's output can be rounded to, by name.

A format is written ``name[:option[,option...]]``: ``bf16``, ``bf16:truncate``,
``bf16:stochastic,seed=7``, ``int8:asymmetric,group=32``. docs/formats.md describes each.
"""

from .arrays import Floats, Mask, Rounded, Spacing
from .format import DITHER, NEAREST_EVEN, Family, Format, Quantised
from .registry import (
    describe_formats,
    format_names,
    get_format,
    register_format,
    roundings,
    unregister_format,
)

__all__ = [
    "DITHER",
    "NEAREST_EVEN",
    "Family",
    "Floats",
    "Format",
    "Mask",
    "Quantised",
    "Rounded",
    "Spacing",
    "describe_formats",
    "format_names",
    "get_format",
    "register_format",
    "roundings",
    "unregister_format",
]
