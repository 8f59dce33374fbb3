"""How a norm computes inside: the formats and orders of its steps (unit.py), and what engines do
(profiles.py)."""

from .unit import STEPS, NormUnit

__all__ = ["STEPS", "NormUnit"]
