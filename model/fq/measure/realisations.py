"""The same rounding fallen anew, several times: what a change of the perplexity owes to chance.

A rounding's errors could as well have been others: with another seed, another batch, another order of
summation. The KL divergence hardly depends on which ones fell; the perplexity goes up with some and down
with others, by as much as it changes at all. A stochastic format gets another seed, any other the
dither of its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fq_kernels import get_format
from fq_kernels.rules import AnyRule, UnitRule, parse_rule

from ..errors import FqError
from .inference import LEVEL, holm, realisations_test
from .noise import is_noise


def fallen_anew(rule: AnyRule | str, number: int) -> AnyRule:
    """A rule's ``number``-th other realisation, from 1. Raises FqError for a format that has none."""
    if isinstance(rule, str):
        rule = parse_rule(rule)
    if isinstance(rule, UnitRule):
        raise FqError(f"--realisations: {rule}: a unit's roundings do not fall anew")
    fmt = rule.format
    if fmt.seeded:
        return replace(rule, format=fmt.with_seed((fmt.seed + number) % 2**64))
    try:
        spec = f"{fmt}{',' if ':' in str(fmt) else ':'}dither,seed={number}"
        return replace(rule, format=get_format(spec))
    except ValueError as e:
        raise FqError(f"--realisations: {e}") from None


def has_none(rules: Sequence[str]) -> bool:
    """Whether it is a noise control, which stands for no rounding of its own."""
    return any(is_noise(rule.partition("=")[2]) for rule in rules)


def summary(ln_ratios: Sequence[Sequence[float]]) -> dict[str, Any]:
    """As written to JSON, of ln(PPL ratio) in each chunk, (realisations, chunks).

    The interval holds by itself and takes both chunks and realisations as drawn (inference).
    """
    values = np.array(ln_ratios, np.float64)
    test = realisations_test(values)
    return {
        "n": len(values),
        "ln_ppl_ratio": float(np.mean(values)),
        "ln_ppl_ratio_of_each": values.mean(axis=1).tolist(),
        "ln_ppl_ratio_ci95": None if test is None else test.interval,
        "p": None if test is None else test.p,
    }


def adjust(summaries: Sequence[dict[str, Any]]) -> None:
    """Say which changes of the perplexity are resolved, by p adjusted over all that are shown."""
    known = [s for s in summaries if s["p"] is not None]
    for found, p in zip(known, holm([s["p"] for s in known]), strict=True):
        found["p_adjusted"] = p
    for found in summaries:
        found.setdefault("p_adjusted", None)
        found["resolved"] = found["p_adjusted"] is not None and found["p_adjusted"] < LEVEL
