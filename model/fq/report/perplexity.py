"""The change of the perplexity in words: of one rounding its figure, of several what they show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..measure.inference import LEVEL
from .data import (
    Entry,
    Group,
    between,
    is_finite,
    listed,
    number,
    ppl_change,
    ppl_interval,
    realisations,
    signed,
    significant,
)

ONE_ROUNDING = "of this one rounding alone"


def is_resolved(drawn: dict[str, Any]) -> bool:
    return number(drawn.get("p_adjusted")) < LEVEL


def in_short(groups: Sequence[Group]) -> str:
    """Of the groups whose rounding was drawn several times; nothing where none was."""
    drawn = [(g.name, r) for g in groups if g.whole and is_finite(g.whole) and (r := realisations(g.whole))]
    known = [(name, one) for name, one in drawn if one.get("p_adjusted") is not None]
    if not known:
        return ""
    moved = [name for name, one in known if is_resolved(one)]
    if not moved:
        return "No change of the perplexity is resolved."
    rest = ", for no other with several realisations." if len(moved) < len(known) else "."
    return f"A change of the perplexity is resolved for {listed(moved)}{rest}"


def perplexity_text(group: Group) -> str:
    whole = group.whole
    if whole is None or not is_finite(whole):
        return ""
    comparison, of = whole["comparison"], " of all together" if group.together else ""
    drawn = realisations(whole)
    if drawn is None:
        return (
            f"Perplexity{of} goes from {significant(comparison['ppl_base'], 6)} to "
            f"{significant(comparison['ppl_quant'], 6)}, by {signed(ppl_change(whole), 2)} %: the figure "
            f"{ONE_ROUNDING}. To say whether it changes takes several realisations (--realisations)."
        )
    text = (
        f"Perplexity{of}, {significant(comparison['ppl_base'], 6)} unrounded, changes by {ppl_text(whole)}: "
    )
    if drawn.get("p_adjusted") is None:
        return text + "nothing is said of how sure that is."
    return text + ("the change is resolved." if is_resolved(drawn) else "no change of it is resolved.")


def ppl_text(entry: Entry) -> str:
    """``+0.021 % (−0.01 % to +0.05 %), the mean of 5 realisations``"""
    interval, drawn = ppl_interval(entry), realisations(entry)
    around = "" if interval is None else f" ({between(interval, lambda x: f'{signed(x, 2)} %')})"
    what = f", the mean of {drawn['n']} realisations" if drawn else f", {ONE_ROUNDING}"
    return f"{signed(ppl_change(entry), 2)} %{around}{what}"
