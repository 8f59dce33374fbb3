"""A unit rule says how norms compute inside: ``SITES=STEP=VALUE;STEP=VALUE;...``.

    *[*]=acc=bf16;order=lanes=16     every norm, output_norm too, with a bf16 accumulator
    ffn_norm[0-3]=rsqrt=lut=6        those of four layers, with a table of 64 entries

The left side is a rule's, without a point. What steps there are stands in fq_kernels/units/unit.py. Of
several rules a norm takes each step from the last that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..formats import Format
from ..units import STEPS, NormUnit
from .rule import SITES, Rule, as_ranges, layers_text, parse_layers, ranges_of
from .sites import EVERY_NORM, NORM_N, Value, is_norm


@dataclass(frozen=True)
class UnitRule:
    """Norms -> how they compute.

    unit   a NormUnit, or how it is written
    kind, layer
           as of a Rule, of norms: "*" (or "all") for every norm

    Two rules that say the same are equal, and ``UnitRule.parse(str(rule)) == rule``. Raises ValueError or
    TypeError naming the field.
    """

    unit: NormUnit
    kind: str = EVERY_NORM
    layer: int | range | Iterable[int | range] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.unit, str):
            object.__setattr__(self, "unit", NormUnit.parse(self.unit))
        if not isinstance(self.unit, NormUnit):
            raise TypeError(f"unit must be a NormUnit or a string, not {type(self.unit).__name__}")
        if not self.unit.steps:
            raise ValueError("unit must have a step")
        if self.kind == "all":
            object.__setattr__(self, "kind", EVERY_NORM)
        if not isinstance(self.kind, str) or self.kind == NORM_N or not is_norm(self.kind):
            raise ValueError(f"kind must be a norm's, such as ffn_norm, or *, not {self.kind!r}")
        object.__setattr__(self, "layer", as_ranges(self.layer))

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> UnitRule:
        """The rule that ``text`` writes; see the head of this module.

        seed  of stochastic rounding, where the text names none

        Raises ValueError quoting the text and naming what is wrong with it.
        """
        if not isinstance(text, str):
            raise TypeError(f"a unit rule is a string such as '*=acc=bf16', not {type(text).__name__}")
        try:
            sites, _, unit = text.partition("=")
            match = SITES.fullmatch(sites)
            if not match or match[3]:
                raise ValueError(f"{sites.strip()!r} is not written KIND[LAYERS]")
            if not unit.strip():
                raise ValueError("there is no =STEP=VALUE")
            layers = None if match[2] is None else parse_layers(match[2])
            return cls(NormUnit.parse(unit, seed=seed), match[1], layers)
        except ValueError as e:
            raise ValueError(f"unit rule {text!r}: {e}") from None

    def takes(self, value: Value) -> bool:
        """Whether it says how the value is computed."""
        kind, layer = value.place
        named = value.is_norm and self.kind in (EVERY_NORM, kind)
        layers = ranges_of(self.layer)
        return named and (layers is None or any(layer in some for some in layers))

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(self.unit.formats.values())

    def __str__(self) -> str:
        return f"{self.kind}{layers_text(self.kind, ranges_of(self.layer))}={self.unit}"


def parse_rule(text: str, *, seed: int = 0) -> Rule | UnitRule:
    """Of either kind: a unit rule names a step behind its sites."""
    step, equals, _ = text.partition("=")[2].partition("=") if isinstance(text, str) else ("", "", "")
    if equals and step.strip() in STEPS:
        return UnitRule.parse(text, seed=seed)
    return Rule.parse(text, seed=seed)


AnyRule = Rule | UnitRule
Rules = str | AnyRule | Iterable[str | AnyRule]


def as_rules(rules: Rules) -> tuple[AnyRule, ...]:
    """A rule, its text, or several of either. Raises ValueError or TypeError naming the bad one."""
    several = rules if isinstance(rules, Iterable) and not isinstance(rules, str) else [rules]
    return tuple(rule if isinstance(rule, AnyRule) else parse_rule(rule) for rule in several)
