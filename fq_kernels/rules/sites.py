"""The values of a graph that can be rounded, by the names that rules give them.

Which kinds there are, a graph says. Of a kind, its name alone says whether it is a norm's: those end
in ``norm``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

POINTS = ("in", "raw", "weighted")  # of a norm, in the order in which it passes them

# What a rule may name beside the graph's kinds. llama.cpp calls what several norms of layer N return,
# before their weights, "norm-N".
EVERY_NORM = "*"
NORM_N = "norm"
EVERY_ACTIVATION = "activation"


def is_norm(kind: str) -> bool:
    """Whether a kind, or what a rule names as one, is of norms: these have points."""
    return kind == EVERY_NORM or kind.endswith("norm")


class Place(NamedTuple):
    """A value of the graph by its role; ``layer`` is None where it belongs to none."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}[{self.layer}]"


class Site(NamedTuple):
    """What a rule rounds: a place and, of a norm, the point; None for any other value."""

    place: Place
    point: str | None = None

    def __str__(self) -> str:
        return str(self.place) if self.point is None else f"{self.place}.{self.point}"


class Value(NamedTuple):
    """A place, and what rules and counters have to know of it.

    rows    how many a token makes: one, or one for each head
    norm_n  whether llama.cpp calls what the norm returns, before the weight, ``norm-N``
    duplicate
            whether the same numbers have another place too, which stands for both where all are meant
    width   elements of a row; 0: not known
    """

    place: Place
    rows: int = 1
    norm_n: bool = False
    duplicate: bool = False
    width: int = 0

    @property
    def is_norm(self) -> bool:
        return is_norm(self.place.kind)

    @property
    def sites(self) -> tuple[Site, ...]:
        points = POINTS if self.is_norm else (None,)
        return tuple(Site(self.place, point) for point in points)


def describe_values(values: Iterable[Value]) -> str:
    """``attn_norm[0-29], ffn_norm[0-29], output_norm; points in, raw, weighted of norms``."""
    layers: dict[str, list[int | None]] = {}
    for value in values:
        layers.setdefault(value.place.kind, []).append(value.place.layer)
    parts = []
    for kind, of in layers.items():
        if of == [None]:
            parts.append(kind)
        else:
            parts.append(f"{kind}[{of[0]}-{of[-1]}]" if len(of) > 1 else f"{kind}[{of[0]}]")
    points = f"; points {', '.join(POINTS)}" if any(map(is_norm, layers)) else ""
    if points and not all(map(is_norm, layers)):
        points += " of norms"
    return ", ".join(parts) + points
