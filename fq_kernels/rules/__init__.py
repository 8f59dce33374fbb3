"""Which values are rounded, to what, and what the rounding did.

A *place* is a value of the graph by its role, (kind, layer). A norm has a *site* at each of its points:
``in``, what it reads; ``raw``, before the weight; ``weighted``, after it. Any other place is one site.
Rules pick sites, and unit rules norms; a context holds the rules and the counters of one evaluation of
the graph and is its only state. How they are written stands at the heads of rule.py and unit_rule.py.
"""

from .calibration import Calibration, calibrations_of
from .counter import Counter, RowStat
from .fake_quant import FakeQuant, RowCallback, misfit
from .observer import Observer
from .rule import MODES, Rule, rules_text, sites_text
from .sites import EVERY_ACTIVATION, EVERY_NORM, NORM_N, POINTS, Place, Site, Value, describe_values, is_norm
from .unit_rule import AnyRule, Rules, UnitRule, as_rules, parse_rule

__all__ = [
    "EVERY_ACTIVATION",
    "EVERY_NORM",
    "MODES",
    "NORM_N",
    "POINTS",
    "AnyRule",
    "Calibration",
    "Counter",
    "FakeQuant",
    "Observer",
    "Place",
    "RowCallback",
    "RowStat",
    "Rule",
    "Rules",
    "Site",
    "UnitRule",
    "Value",
    "as_rules",
    "calibrations_of",
    "describe_values",
    "is_norm",
    "misfit",
    "parse_rule",
    "rules_text",
    "sites_text",
]
