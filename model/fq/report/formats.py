"""The formats at the same sites, and the sites in the same format, in words."""

from __future__ import annotations

from collections.abc import Sequence

from .data import Entry, Group, listed, order_of, same_top_text, unchanged
from .order import Order
from .words import NAMED, STAY, figure, times, too_few

Named = tuple[str, Entry]


def orders(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(what it is about, sentences) of each choice that the run has."""
    said = []
    for about, shared, own in (("format", "sites", "spec"), ("sites", "spec", "sites")):
        for value in dict.fromkeys(getattr(group, shared) for group in groups):
            mine = [group for group in groups if getattr(group, shared) == value]
            items = [(getattr(group, own), group.whole) for group in mine if group.whole]
            if len(items) > 1:
                where = f"at {value}" if about == "format" else f"in {value}"
                said.append((f"Which {about} {where}", order_text(items)))
    if not said and len(groups) == 1 and (whole := groups[0].together):
        n = len(groups[0].singles) + len(groups[0].behind)
        text = (
            f"{groups[0].name} rounds all {n} sites together at a mean KL divergence of "
            f"{figure(whole)} from the unrounded model; the likeliest token stays the same at "
            f"{same_top_text(whole)} of positions."
        )
        said.append(("All sites together", text))
    return said


def order_text(items: Sequence[Named]) -> str:
    """Who costs more than whom by mean KL, and whose order is not resolved."""
    order, name = _order(items)
    same = [name(entry) for entry in unchanged([entry for _, entry in items])]
    of_these = f" Exactly as unrounded in every chunk: {listed(same)}." if same else ""
    return (_ordered(order, name) + of_these).strip()


def _ordered(order: Order[Entry], name: _Name) -> str:
    if not order.items:
        return ""
    most, least = order.items[0], order.items[-1]
    figures = listed([f"{name(entry)} {figure(entry)}" for entry in order.items])
    text = f"All sites together, mean KL divergence: {figures}. "
    if len(order.items) == 1:
        return text + "There is nothing to order."
    if not order.known:
        return text + f"{too_few(order.items)} no order is told. The largest figure is that of {name(most)}."
    open_ = [f"{name(a)} and {name(b)}" for a, b in order.open]
    by = times([most], [least])
    leads = f"{name(most)} costs most" + (f", {by} as {name(least)}" if by else "")
    if not open_:
        return text + f"{leads}, and the whole order is resolved."
    text += (
        "No order among them is resolved. "
        if len(open_) == order.n_pairs
        else f"Not resolved is the order of {'; of '.join(open_[:NAMED])}"
        + (f"; nor of {len(open_) - NAMED} more pairs. " if len(open_) > NAMED else ". ")
    )
    if len(order.first) == 1:
        text += f"{leads}: that is resolved. "
    elif len(open_) < order.n_pairs:
        text += "Which one costs most is not resolved; the other pairs are ordered as listed. "
    if needed := order.chunks_for(*order.open[0]):
        text += f"To tell {open_[0]} apart would need {needed}, {STAY}."
    return text.rstrip()


def in_short(groups: Sequence[Group]) -> list[str]:
    """A sentence for the formats at each choice of sites."""
    lines = []
    for sites in dict.fromkeys(group.sites for group in groups):
        items = [(group.spec, group.whole) for group in groups if group.sites == sites and group.whole]
        order, name = _order(items)
        if len(order.items) < 2:
            continue
        where = "" if sites == groups[0].sites == groups[-1].sites else f"At {sites} "
        lines.append(where + _leader(order, name))
    return lines


def _leader(order: Order[Entry], name: _Name) -> str:
    most, next_ = order.items[:2]
    if not order.known:
        why = _lower(too_few(order.items))
        return f"{name(most)} has the largest mean KL divergence; {why} no order is told."
    if len(order.first) > 1:
        tied = listed([name(entry) for entry in order.first if entry is not most])
        return f"{name(most)} has the largest mean KL divergence, but from {tied} it is not told apart."
    by = times([most], [next_])
    after = ", which comes next" if len(order.items) > 2 else ""
    return f"{name(most)} costs most{f', {by} as {name(next_)}{after}' if by else ''}: resolved."


class _Name:
    """What a cell is called here."""

    def __init__(self, items: Sequence[Named]) -> None:
        self._names = {id(entry): name for name, entry in items}

    def __call__(self, entry: Entry) -> str:
        return self._names[id(entry)]


def _order(items: Sequence[Named]) -> tuple[Order[Entry], _Name]:
    return order_of([entry for _, entry in items]), _Name(items)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
