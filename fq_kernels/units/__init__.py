"""How a norm computes inside: the formats and orders of its steps. What is written how stands in unit.py."""

from .unit import STEPS, NormUnit

__all__ = ["STEPS", "NormUnit"]
