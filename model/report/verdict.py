"""What a run says, in words: never more than its intervals say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ..sweep_figures import ranks
from .data import (
    Entry,
    Group,
    apart,
    between,
    capital,
    control_of,
    groups_of,
    kl_text,
    kld,
    kld_interval,
    listed,
    ppl_change,
    ppl_interval,
    signed,
    significant,
    site_of,
)

NAMED = 6  # at most so many sites, or pairs, by name
ENOUGH_CHUNKS = 8
ADDS_UP = 0.05


@dataclass(frozen=True)
class Statement:
    """tone is "bad" where the figures cannot be trusted, "warning" where they are not all there."""

    about: str
    lines: tuple[str, ...]
    tone: str = ""


def _statement(about: str, *lines: str, tone: str = "") -> Statement:
    return Statement(about, tuple(line for line in lines if line), tone)


def verdict(data: dict[str, Any]) -> list[Statement]:
    """``data`` as of `figures`; what must be known before all else comes first."""
    said = _partial(data)
    if not data["n_chunks"]:
        return said
    groups = [group for group in groups_of(data) if group.singles and not group.is_noise]
    control = _control(data)
    if control.tone:
        said.append(control)
    said += [_in_short(groups, control.tone == ""), *_orders(groups)]
    for group in groups:
        name = f": {group.name}" if len(groups) > 1 else ""
        lines = layers_text(group), _additivity(group), _perplexity(group), _noise(group)
        said.append(_statement(f"Which layers{name}", *lines))
    if not control.tone:
        said.append(control)
    return [*said, _how_sure(data)]


def _partial(data: dict[str, Any]) -> list[Statement]:
    if not data["partial"]:
        return []
    done, asked = data["n_chunks"], data["n_chunks_asked"]
    if not done:
        text = f"No chunk of {asked} has ended in every cell yet, so there are no figures."
    else:
        text = f"{done} of {asked} chunks have ended in every cell; all figures here are of these {done}."
    return [
        _statement("Partial result", f"{text} The sweep's own command with --resume goes on.", tone="warning")
    ]


def _control(data: dict[str, Any]) -> Statement:
    control = control_of(data)
    if control is None:
        text = "This run has no control: the baseline was not compared with itself."
        return _statement("Control", text, tone="warning")
    if control["exactly_zero"]:
        text = (
            "The baseline run a second time differs from itself by exactly 0 in every figure, as it must: "
            "whatever is above 0 here is the rounding's doing."
        )
        return _statement("Control", text)
    text = "The baseline run a second time does NOT come out as 0: no figure of this run can be trusted."
    return _statement("Control", text, tone="bad")


def _how_sure(data: dict[str, Any]) -> Statement:
    n, ctx, scored = data["n_chunks"], data["n_ctx"], data["n_scored"]
    if n < 2:
        text = (
            f"One chunk of {ctx} tokens, {scored} of them scored: there are no intervals over chunks, so "
            "nothing here is ordered or resolved. Two chunks give an interval, eight one to rely on."
        )
        return _statement("How sure", text, tone="warning")
    text = (
        f"Intervals are 95 %, bootstrapped over {n} chunks of {ctx} tokens ({scored} scored). What is called "
        "ordered or resolved has intervals that do not overlap; each interval holds by itself, not all of "
        "them at once."
    )
    if n < ENOUGH_CHUNKS:
        return _statement("How sure", f"{text} Fewer than eight chunks make them too narrow.", tone="warning")
    return _statement("How sure", text)


def _in_short(groups: Sequence[Group], sound: bool) -> Statement:
    """The answer in a sentence for the formats, one for the layers, and one for the perplexity."""
    lines = []
    for sites in dict.fromkeys(group.sites for group in groups):
        wholes = [(group.spec, group.whole) for group in groups if group.sites == sites]
        known = sorted(((spec, e) for spec, e in wholes if e), key=lambda item: -_or_inf(kld(item[1])))
        if len(known) < 2:
            continue
        (first, most), (second, next_) = known[:2]
        where = "" if sites == groups[0].sites == groups[-1].sites else f"At {sites} "
        tied = [spec for spec, e in known[1:] if not apart(kld_interval(most), kld_interval(e))]
        by = _times(most, next_)
        after = ", which comes next" if len(known) > 2 else ""
        times = f", {by}{second}{after}" if by else ""
        lines.append(
            f"{where}{first} costs most{times}: resolved."
            if not tied
            else f"{where}{first} has the largest mean KL divergence, but from {listed(tied)} it is not told "
            "apart."
        )
    layers: dict[str, list[str]] = {}
    for group in groups:
        layers.setdefault(_who(group), []).append(group.name if _several_sites(groups) else group.spec)
    lines += [capital(f"{who}, in {listed(names)}.") for who, names in layers.items()]
    changes = [(group, ppl_interval(group.whole)) for group in groups if group.whole]
    moved = [group.name for group, i in changes if i is not None and not i[0] <= 0 <= i[1]]
    lines.append(
        f"A change of the perplexity is resolved for {listed(moved)}"
        + (", for no other." if len(moved) < len(changes) else ".")
        if moved
        else "No change of the perplexity is resolved."
    )
    if sound:
        lines.append("The control is exactly 0.")
    return _statement("In short", *lines)


def _several_sites(groups: Sequence[Group]) -> bool:
    return len({group.sites for group in groups}) > 1


def _who(group: Group) -> str:
    """Who costs most, without figures."""
    first, n, word = _places(group)[0], len(group.singles), _word(group.singles)
    if n == 1:
        return f"one site was measured, {group.text(group.singles)}"
    if not first:
        return f"without intervals no {word} is told from another"
    if len(first) == n:
        return f"no {word} is told from another: all intervals overlap"
    if len(first) == 1:
        return f"{group.text(first)} costs most, which is resolved"
    return f"the first place is shared by {_named(group, first, word)}, not ordered among themselves"


def _times(one: Entry, other: Entry) -> str:
    """``273 times what ``, or nothing where there is no such figure."""
    by = kld(one) / kld(other) if kld(other) else math.nan
    return f"{significant(by, 2 if by < 100 else 3)} times as much as " if math.isfinite(by) else ""


# ---------------------------------------------------------------- formats


def _orders(groups: Sequence[Group]) -> list[Statement]:
    """The formats at the same sites, and the sites in the same format."""
    said = []
    for about, shared, own in (("format", "sites", "spec"), ("sites", "spec", "sites")):
        for value in dict.fromkeys(getattr(group, shared) for group in groups):
            mine = [group for group in groups if getattr(group, shared) == value and group.whole]
            if len(mine) > 1:
                where = f"at {value}" if about == "format" else f"in {value}"
                text = order_text([(getattr(group, own), group.whole) for group in mine if group.whole])
                said.append(_statement(f"Which {about} {where}", text))
    if not said and len(groups) == 1 and groups[0].together:
        whole = groups[0].together
        text = (
            f"{groups[0].name} rounds all {len(groups[0].singles)} sites together at a mean KL divergence of "
            f"{_figure(whole)} from the unrounded model; the likeliest token stays the same at "
            f"{_percent(whole['comparison']['same_top'])} of positions."
        )
        said.append(_statement("All sites together", text))
    return said


def order_text(items: Sequence[tuple[str, Entry]]) -> str:
    """Who costs more than whom by mean KL, and who is not ordered."""
    items = sorted(items, key=lambda item: -_or_inf(kld(item[1])))
    (first, most), (last, least) = items[0], items[-1]
    by = _times(most, least)
    times = f", {by}{last}" if by else ""
    figures = listed([f"{name} {_figure(entry)}" for name, entry in items])
    text = f"All sites together, mean KL divergence: {figures}. "
    if any(kld_interval(entry) is None for _, entry in items):
        return text + f"The largest figure is that of {first}; without intervals no order is resolved."
    tied = [
        f"{a} and {b}"
        for (a, one), (b, other) in combinations(items, 2)
        if not apart(kld_interval(one), kld_interval(other))
    ]
    if not tied:
        return text + f"{first} costs most{times}, and the whole order is resolved."
    if len(tied) == math.comb(len(items), 2):
        return text + "No order among them is resolved: all intervals overlap."
    more = f", nor {len(tied) - NAMED} more pairs" if len(tied) > NAMED else ""
    text += f"Not ordered, as their intervals overlap: {'; '.join(tied[:NAMED])}{more}. "
    if not any(pair.startswith(f"{first} and ") for pair in tied):
        return text + f"{first} costs most{times}: that is resolved."
    return text + "Which one costs most is not resolved; other pairs are ordered as listed."


# ---------------------------------------------------------------- layers


def layers_text(group: Group) -> str:
    """Which sites cost most and least, and what of their order is resolved."""
    singles = sorted(group.singles, key=lambda entry: -_or_inf(kld(entry)))
    n, word = len(singles), _word(singles)
    most, least = singles[0], singles[-1]
    if n == 1:
        return f"One site only, {group.text(singles)}: mean KL {_figure(most)}. There is nothing to order."
    intervals = [kld_interval(entry) for entry in singles]
    top, second, bottom = _places(group)
    if not top:
        return (
            f"Without intervals no {word} can be told from another. The largest figure is that of "
            f"{group.text([most])}, {_figure(most)}, the smallest that of {group.text([least])}, "
            f"{_figure(least)}."
        )
    if len(top) == n:
        return (
            f"No {word} can be told from another: all {n} intervals overlap. The largest figure is that of "
            f"{group.text([most])}, {_figure(most)}, the smallest that of {group.text([least])}, "
            f"{_figure(least)}; which costs most is not resolved."
        )
    if len(top) == 1:
        share = kld(most) / group.sum_of_singles if group.sum_of_singles else math.nan
        part = f", {_percent(share, 0)} of the sum over all {n}" if math.isfinite(share) else ""
        text = (
            f"{capital(group.text(top))} costs most, mean KL {_figure(most)}{part}: its interval lies above "
            "every other. "
        )
        if 0 < len(second) <= NAMED and n > 2:
            tied = ", not ordered among themselves" if len(second) > 1 else ""
            text += f"Then {'come' if _many(second) else 'comes'} {group.text(second)}{tied}. "
    else:
        text = (
            f"The first place is shared by {_named(group, top, word)}: their intervals overlap, so which of "
            f"them costs most is not resolved. The largest figure is that of {group.text([most])}, "
            f"{_figure(most)}. Each other {word} costs less than at least one of them. "
        )
    if len(bottom) == 1:
        text += f"{capital(group.text(bottom))} costs least, {_figure(least)}. "
    else:
        text += f"The last place is shared by {_named(group, bottom, word)}. "
    pairs = math.comb(n, 2)
    resolved = sum(apart(a, b) for a, b in combinations(intervals, 2))
    return text + (
        f"Of {pairs} pairs of {word}s the order of {resolved} is resolved, that of {pairs - resolved} is not."
        if resolved < pairs
        else f"The order of all {n} is resolved."
    )


def _places(group: Group) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Cells that may be the first, whose best place is the second, that may be the last.

    All empty where no interval is known.
    """
    intervals = [kld_interval(entry) for entry in group.singles]
    if all(interval is None for interval in intervals):
        return [], [], []
    found = list(zip(group.singles, ranks(intervals), strict=True))
    return (
        [entry for entry, (best, _) in found if best == 1],
        [entry for entry, (best, _) in found if best == 2],
        [entry for entry, (_, worst) in found if worst == len(found)],
    )


def _named(group: Group, entries: Sequence[Entry], word: str) -> str:
    return group.text(entries) if len(entries) <= 2 * NAMED else f"{len(entries)} {word}s"


def _many(entries: Sequence[Entry]) -> bool:
    return len(entries) > 1


def _word(singles: Sequence[Entry]) -> str:
    kinds = {(kind, point) for kind, _, point in map(site_of, singles)}
    return "layer" if len(kinds) == 1 else "site"


def additivity_words(group: Group) -> str:
    ratio = group.additivity
    assert ratio is not None
    if group.additivity_interval is None:
        return "no departure from adding up is resolved"
    low, high = group.additivity_interval
    if 1 - ADDS_UP <= low and high <= 1 + ADDS_UP:
        return f"single costs add up, to within {100 * ADDS_UP:.0f} %"
    if low <= 1 <= high:
        return "no departure from adding up is resolved"
    if ratio > 1:
        return "together they cost more than the single costs add up to"
    return "together they cost less than the single costs add up to"


def additivity_text(group: Group) -> str:
    interval = group.additivity_interval
    return f"{group.additivity:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _additivity(group: Group) -> str:
    ratio = group.additivity
    if group.together is None or ratio is None or not math.isfinite(ratio):
        return ""
    return (
        f"All together cost {_figure(group.together)}, {additivity_text(group)} times "
        f"the sum of the single ones ({kl_text(group.sum_of_singles)}): {additivity_words(group)}."
    )


def _noise(group: Group) -> str:
    noise = group.noise
    if noise is None or not group.sum_of_singles:
        return ""
    beside = {site_of(entry): kld_interval(entry) for entry in noise.singles}
    pairs = [(kld_interval(entry), beside.get(site_of(entry))) for entry in group.singles]
    known = [(ours, noises) for ours, noises in pairs if ours is not None and noises is not None]
    more = sum(ours[0] > noises[1] for ours, noises in known)
    less = sum(ours[1] < noises[0] for ours, noises in known)
    ratio = noise.sum_of_singles / group.sum_of_singles
    return (
        f"Gaussian noise of the same length in place of the rounding error costs {significant(ratio)} times "
        f"as much, summed over single sites. Rounding costs more than its noise at {more} of {len(pairs)} "
        f"sites and less at {less}; at {len(pairs) - more - less} that is not resolved."
    )


def _perplexity(group: Group) -> str:
    whole = group.whole
    if whole is None:
        return ""
    comparison, interval = whole["comparison"], ppl_interval(whole)
    text = (
        f"Perplexity{' of all together' if group.together else ''} goes from "
        f"{significant(comparison['ppl_base'], 6)} to {significant(comparison['ppl_quant'], 6)}, by "
        f"{ppl_text(whole)}: "
    )
    if interval is None:
        return text + "without an interval."
    if interval[0] <= 0 <= interval[1]:
        return text + "the interval holds 0, no change of it is resolved."
    return text + "the interval leaves 0 out, the change is resolved."


# ---------------------------------------------------------------- figures


def ppl_text(entry: Entry) -> str:
    """``+0.021 % (−0.01 % to +0.05 %)``"""
    interval = ppl_interval(entry)
    around = "" if interval is None else f" ({between(interval, lambda x: f'{signed(x, 2)} %')})"
    return f"{signed(ppl_change(entry), 2)} %{around}"


def _figure(entry: Entry) -> str:
    interval = kld_interval(entry)
    return kl_text(kld(entry)) + ("" if interval is None else f" ({between(interval)})")


def _percent(fraction: float, decimals: int = 1) -> str:
    return f"{100 * fraction:.{decimals}f} %"


def _or_inf(value: float) -> float:
    """A broken model's figures sort first."""
    return math.inf if math.isnan(value) else value
