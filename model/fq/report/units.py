"""How norms compute inside, and what engines do: what a run says of steps, norms and profiles, in words."""

from __future__ import annotations

from ..measure.cells import label_of
from .data import Entry, Group, between, is_finite, kl_text, kld, kld_interval, listed, plain
from .words import left_out


def units_text(group: Group) -> tuple[str, list[str]]:
    """What it is about, and lines, of a group of a unit's steps, of norms under one, or of profiles."""
    what = group.parts[0]["kind"]
    lines = [left_out(group, what), _most(group, what), _ties(group, what), _in_company(group)]
    if group.additivity is not None:
        around = between(group.additivity_interval, lambda x: f"{x:.2f}")
        lines.append(
            f"Together they cost {group.additivity:.2f} ({around}) times the sum of what each costs alone."
        )
    return f"Which {what}{'' if what in ('profile', 'unit') else f': {plain(group.name)}'}", [
        line for line in lines if line
    ]


def name_of(entry: Entry) -> str:
    return plain(label_of(entry))


def _cost(entry: Entry) -> str:
    return f"{kl_text(kld(entry))} ({between(kld_interval(entry))})"


def _most(group: Group, what: str) -> str:
    finite = sorted((e for e in group.parts if is_finite(e)), key=kld, reverse=True)
    if not finite or group.behind:
        return ""
    first = finite[0]
    alone = "" if what in ("profile", "unit") else " alone"
    text = f"{name_of(first)}{alone} has a mean KL of {_cost(first)}"
    rank = group.order.rank(first)
    if rank is not None and rank[1] == 1 and len(finite) > 1:
        text += f": more than any other {what}, which is resolved"
    return f"{text}."


def _ties(group: Group, what: str) -> str:
    zero = [name_of(e) for e in group.parts if is_finite(e) and kld(e) == 0]
    return f"{listed(zero)} {'changes' if len(zero) == 1 else 'change'} nothing." if zero else ""


def _in_company(group: Group) -> str:
    """What a unit costs more with a step than without it, of the step that matters most."""
    known = [e for e in group.without if e.get("in_company") is not None and is_finite(e)]
    if not known:
        return ""
    most = max(known, key=lambda e: float(e["in_company"]["mean_kld"]))
    more = most["in_company"]
    ends = between(more["mean_kld_ci95_chunks"] and tuple(more["mean_kld_ci95_chunks"]))
    step = name_of(most).removeprefix("without ")
    less = f"{kl_text(more['mean_kld'])} ({ends})"
    return f"In company {step} costs most: the unit's mean KL is {less} less without it."
