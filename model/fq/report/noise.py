"""A rounding against its controls, in words."""

from __future__ import annotations

from ..measure.inference import LEVEL, holm
from .data import Control, Group, is_finite, paired, site_of
from .words import times, too_few


def noise_text(group: Group) -> str:
    return " ".join(filter(None, (_beside(group, control, other) for control, other in group.controls)))


def _beside(group: Group, control: Control, other: Group) -> str:
    """Site by site: a paired test each, their p adjusted over the sites."""
    theirs = {site_of(entry): entry for entry in other.singles if is_finite(entry)}
    pairs = [
        (entry, theirs[site_of(entry)])
        for entry in group.singles
        if is_finite(entry) and site_of(entry) in theirs
    ]
    by = times([b for _, b in pairs], [a for a, _ in pairs])
    if not by:
        return ""
    text = f"{control.costs} {by}, summed over single sites"
    tests = [paired([a], [b]) for a, b in pairs]
    if not any(tests):
        return f"{text}. {too_few([pairs[0][0]])} nothing is said of how sure that is."
    ps = holm([1.0 if test is None else test.p for test in tests])
    ratios = [
        test.ratio if test is not None and p < LEVEL else 1.0 for test, p in zip(tests, ps, strict=True)
    ]
    more, less = sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios)
    return (
        f"{text}. Rounding costs more than {control.than} at {more} of {len(pairs)} sites and less at "
        f"{less}; at {len(pairs) - more - less} that is not resolved."
    )
