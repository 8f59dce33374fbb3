"""Which norm outputs are rounded, to what, and what the rounding did.

A *norm* is one rms_norm of the graph, (kind, layer). It has two *sites*, one per point:
``raw`` before the weight, ``weighted`` after it. Rules pick sites; a context holds the
rules and the counters of one evaluation of the graph and is its only state. How a rule is
written stands at the head of rule.py.
"""

from .counter import Counter, RowStat
from .fake_quant import FakeQuant, RowCallback, describe_norms
from .rule import MODES, Rule, Rules, as_rules, rules_text
from .sites import EVERY_KIND, KINDS, NORM_N, NORM_N_KINDS, POINTS, Norm, Site

__all__ = [
    "EVERY_KIND",
    "KINDS",
    "MODES",
    "NORM_N",
    "NORM_N_KINDS",
    "POINTS",
    "Counter",
    "FakeQuant",
    "Norm",
    "RowCallback",
    "RowStat",
    "Rule",
    "Rules",
    "Site",
    "as_rules",
    "describe_norms",
    "rules_text",
]
