"""What the sentences of the verdict share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..measure.inference import MIN_CHUNKS
from .data import Entry, Group, between, chunk_klds, kl_text, kld, kld_interval, paired, significant, site_of

NAMED = 6  # at most so many sites, or pairs, by name
STAY = "should means and scatter stay"
_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 8: "eight"}


def count(n: int) -> str:
    return _WORDS.get(n, str(n))


def figure(entry: Entry) -> str:
    """Its mean KL with its interval."""
    interval = kld_interval(entry)
    return kl_text(kld(entry)) + ("" if interval is None else f" ({between(interval)})")


def percent(fraction: float, decimals: int = 1) -> str:
    return f"{100 * fraction:.{decimals}f} %"


def times(one: Sequence[Entry], other: Sequence[Entry], digits: int = 3) -> str:
    """``99.2 (97.1 to 101) times as much``, over the same chunks; empty where there is no such figure."""
    below = math.fsum(map(kld, other))
    by = math.fsum(map(kld, one)) / below if below else math.nan
    if not math.isfinite(by):
        return ""
    test = paired(one, other)
    around = f" ({between(test.interval, lambda x: significant(x, digits))})" if test else ""
    return f"{significant(by, digits)}{around} times as much"


def too_few(entries: Sequence[Entry]) -> str:
    """Why nothing is told of an order: ``Over two chunks``, or that too few of them differ."""
    n = len(chunk_klds(entries[0]))
    if n < MIN_CHUNKS:
        return f"Over {count(n)} chunk{'s' if n > 1 else ''}, fewer than {count(MIN_CHUNKS)},"
    return f"Where fewer than {count(MIN_CHUNKS)} chunks differ from the unrounded model"


def left_out(group: Group, word: str) -> str:
    """Why nothing is told of the order where cells of the group are behind; else empty."""
    if not group.behind:
        return ""
    behind, here = len(group.behind), len(group.singles or group.parts)
    are = "are" if behind > 1 else "is"
    return f"Of {behind + here} {word}s {behind} {are} left out: nothing is said of their order."


def named(group: Group, entries: Sequence[Entry], word: str) -> str:
    return group.text(entries) if len(entries) <= 2 * NAMED else f"{len(entries)} {word}s"


def word_of(singles: Sequence[Entry]) -> str:
    kinds = {(kind, point) for kind, _, point in map(site_of, singles)}
    return "layer" if len(kinds) == 1 else "site"
