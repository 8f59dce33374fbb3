"""How a norm computes inside: the formats and orders of its steps, and what engines do. How a unit
is written stands in unit.py."""

from .profiles import DTYPES, NORMS, PROFILES, Profile, describe_profiles, find_profile, profile_rules
from .unit import STEPS, NormUnit

__all__ = [
    "DTYPES",
    "NORMS",
    "PROFILES",
    "STEPS",
    "NormUnit",
    "Profile",
    "describe_profiles",
    "find_profile",
    "profile_rules",
]
