"""The sites of a group, each alone, in words: which cost most and least, and whether they add up."""

from __future__ import annotations

import math

from ..measure.inference import MIN_CHUNKS
from .data import Entry, Group, capital, differs_in_few, is_finite, kl_text, kld, n_differing, unchanged
from .words import NAMED, STAY, count, figure, left_out, named, percent, too_few, word_of

ADDS_UP = 0.05
STANDS_OUT = 3.0  # a chunk of more than so many times the mean is named


def layers_text(group: Group) -> str:
    """Which sites cost most and least, and what of their order is resolved."""
    same = unchanged(group.singles)
    of_these = f" Exactly as unrounded in every chunk: {named(group, same, word_of(same))}." if same else ""
    return (_ordered(group) + of_these).strip()


def _ordered(group: Group) -> str:
    order, word = group.order, word_of(group.singles)
    if text := left_out(group, word):
        return text
    n = len(order.items)
    if n == 0:
        return ""
    most, least = order.items[0], order.items[-1]
    if n == 1:
        only = "One site only" if len(group.singles) == 1 else "One site only that can be ordered"
        return f"{only}, {group.text([most])}: mean KL {figure(most)}. There is nothing to order."
    ends = (
        f"The largest figure is that of {group.text([most])}, {figure(most)}, the smallest that of "
        f"{group.text([least])}, {figure(least)}"
    )
    if not order.known:
        return f"{too_few(order.items)} no {word} is told from another. {ends}."
    if order.n_resolved == 0:
        return (
            f"No {word} can be told from another: of {order.n_pairs} pairs the order of none is resolved. "
            f"{ends}; which costs most is not resolved.{_for_the_first(group)}"
        )
    first, second, last = order.first, order.second, order.last
    if len(first) == 1:
        share = kld(most) / group.sum_of_singles if group.sum_of_singles else math.nan
        part = f", {percent(share, 0)} of the sum over all {n}" if math.isfinite(share) else ""
        text = f"{capital(group.text(first))} costs most, mean KL {figure(most)}{part}: that is resolved. "
        if 0 < len(second) <= NAMED and n > 2:
            tied = ", not ordered among themselves" if len(second) > 1 else ""
            text += f"Then {'come' if len(second) > 1 else 'comes'} {group.text(second)}{tied}. "
    else:
        text = (
            f"The first place is shared by {named(group, first, word)}: which of them costs most is not "
            f"resolved. The largest figure is that of {group.text([most])}, {figure(most)}. "
        )
        if len(first) < n:
            text += f"Each other {word} costs less than at least one of them. "
    if len(last) == 1:
        text += f"{capital(group.text(last))} costs least, {figure(least)}. "
    else:
        text += f"The last place is shared by {named(group, last, word)}. "
    return text + _pairs(group, word) + _for_the_first(group)


def _pairs(group: Group, word: str) -> str:
    order = group.order
    if not order.open:
        return f"The order of all {len(order.items)} is resolved."
    needed = order.chunks_for_the_next()
    return (
        f"Of {order.n_pairs} pairs of {word}s the order of {order.n_resolved} is resolved, that of "
        f"{len(order.open)} is not" + (f"; the next would need {needed}, {STAY}." if needed else ".")
    )


def _for_the_first(group: Group) -> str:
    """What it would take to tell the largest from the next that shares the first place."""
    first = group.order.first
    if len(first) < 2 or not (needed := group.order.chunks_for(*first[:2])):
        return ""
    one, other = (group.text([entry]) for entry in first[:2])
    return f" To tell {one} from {other} would need {needed}."


def who_costs_most(group: Group) -> str:
    """Without figures, as a clause."""
    order, n, word = group.order, len(group.singles), word_of(group.singles)
    if group.behind:
        return f"no {word} is told from another, as some are left out"
    if not order.items:
        return f"no {word} can be ordered"
    if n == 1:
        return f"one site was measured, {group.text(group.singles)}"
    if not order.known:
        return f"no {word} is told from another"
    if len(order.first) == len(order.items):
        return f"no {word} is told from another: no order is resolved"
    if len(order.first) == 1:
        return f"{group.text(order.first)} costs most, which is resolved"
    return f"the first place is shared by {named(group, order.first, word)}, not ordered among themselves"


# ---------------------------------------------------------------- chunks


def chunks_text(group: Group) -> str:
    """Which cells differ in too few chunks, and which owe much of their mean to one."""
    parts = []
    few = [entry for entry in group.singles if differs_in_few(entry)]
    if few:
        most = max(map(n_differing, few))
        parts.append(
            f"At {len(few)} of {len(group.singles)} sites at most {count(most)} "
            f"chunk{'s differ' if most > 1 else ' differs'} from the unrounded model, and "
            f"{count(MIN_CHUNKS)} are needed: there is no interval of these, and no order."
        )
    whole = group.together
    if whole is not None and not differs_in_few(whole) and largest_chunk(group, whole) > STANDS_OUT:
        parts.append(f"One chunk stands out: all together cost in {largest_text(group, whole)}.")
    large = [e for e in group.singles if not differs_in_few(e) and largest_chunk(group, e) > STANDS_OUT]
    if large:
        most_ = max(large, key=lambda entry: largest_chunk(group, entry))
        parts.append(
            f"Of {len(group.singles)} sites alone {len(large)} "
            f"{'have' if len(large) > 1 else 'has'} a chunk of more than {count(int(STANDS_OUT))} times the "
            f"mean: {group.text([most_])} in {largest_text(group, most_)}."
        )
    return " ".join(parts)


def largest_chunk(group: Group, entry: Entry) -> float:
    """Its mean KL over that of all chunks."""
    by = entry["comparison"]["largest_chunk"]["times_mean"]
    return float(by) if by is not None and is_finite(entry) else math.nan


def largest_text(group: Group, entry: Entry) -> str:
    """``chunk 17 4.4 times the mean``"""
    by, chunk = largest_chunk(group, entry), group.indices[entry["comparison"]["largest_chunk"]["position"]]
    return f"chunk {chunk} {by:.1f} times the mean"


# ---------------------------------------------------------------- additivity


def additivity_words(group: Group) -> str:
    if group.additivity_interval is None:
        return "without an interval nothing is said of whether they add up"
    low, high = group.additivity_interval
    if 1 - ADDS_UP <= low and high <= 1 + ADDS_UP:
        return f"single costs add up, to within {100 * ADDS_UP:.0f} %"
    if low <= 1 <= high:
        return "the interval holds 1, no departure from adding up is shown"
    if low > 1:
        return "together they cost more than the single costs add up to"
    return "together they cost less than the single costs add up to"


def additivity_text(group: Group) -> str:
    interval = group.additivity_interval
    return f"{group.additivity:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def additivity(group: Group) -> str:
    ratio = group.additivity
    if group.together is None or ratio is None or not math.isfinite(ratio):
        return ""
    return (
        f"All together cost {figure(group.together)}, {additivity_text(group)} times "
        f"the sum of the single ones ({kl_text(group.sum_of_singles)}): {additivity_words(group)}."
    )
