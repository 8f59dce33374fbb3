"""A rule picks sites, and says what they are rounded to.

It is written ``SITES=FORMAT[:option,...]``:

    ffn_norm[5]=bf16                          the raw output of layer 5's FFN norm
    ffn_norm[0-10,15].weighted=bf16:truncate  a format with its options; after the weight
    *[*].raw=f16                              every norm, output_norm too
    output_norm=bf16                          no layers: all of them; no point: raw
    ffn_norm[3].in=fp8_e4m3                   what the norm reads; the residual itself stays
    l_out[*]=bf16                             a value that is no norm's, which has no points
    activation=int8                           every value that is no norm's
    norm[*]=bf16:first-call                   the original experiment's mode
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..formats import Format, get_format
from .sites import EVERY_ACTIVATION, EVERY_NORM, NORM_N, POINTS, Place, Value, is_norm

MODES = ("every", "first-call")


@dataclass(frozen=True)
class Rule:
    """Sites -> format.

    format a Format or its name
    kind   one that the graph has; "*" (or "all") for every norm; "norm" for llama.cpp's ``norm-N``,
           the raw outputs of a layer's norms; "activation" for every value that is no norm's
    layer  a layer number, a range, or several of both; None or -1 for all layers (and for
           output_norm, which has none). Kept as ranges in order, or None
    point  of a norm: "in", "raw" (where none is given) or "weighted"; None for any other value
    mode   "every" rounds every row; "first-call" rounds the first row that reaches each site
           after a reset and no other. With kind "norm" it is the first row that reaches the
           name: the original experiment's mode, which rounds row 0 of the attention norm

    Two rules that say the same are equal, and ``Rule.parse(str(rule)) == rule``.
    Raises ValueError or TypeError naming the field.
    """

    format: Format
    kind: str = "ffn_norm"
    layer: int | range | Iterable[int | range] | None = None
    point: str | None = None
    mode: str = "every"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        if self.kind == "all":
            object.__setattr__(self, "kind", EVERY_NORM)
        if not isinstance(self.kind, str) or not _KIND.fullmatch(self.kind):
            raise ValueError(f"kind must be a name such as ffn_norm or l_out, or *, not {self.kind!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if not is_norm(self.kind):
            if self.point is not None:
                raise ValueError(f"point must be left out: norms alone have points, and {self.kind} is none")
        elif self.point is None:
            object.__setattr__(self, "point", "raw")
        elif self.point not in POINTS:
            raise ValueError(f"point must be one of {', '.join(POINTS)}, not {self.point!r}")
        elif self.kind == NORM_N and self.point != "raw":
            raise ValueError("point must be raw for kind norm, llama.cpp's name of the raw outputs")
        object.__setattr__(self, "layer", as_ranges(self.layer))

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> Rule:
        """The rule that ``text`` writes; see the head of this module.

        seed  of stochastic rounding, where the text names none

        Raises ValueError quoting the text and naming what is wrong with it.
        """
        if not isinstance(text, str):
            raise TypeError(f"a rule is a string such as 'ffn_norm[5]=bf16', not {type(text).__name__}")
        try:
            return cls._parse(text, seed)
        except ValueError as e:
            raise ValueError(f"rule {text!r}: {e}") from None

    @classmethod
    def _parse(cls, text: str, seed: int) -> Rule:
        sites, equals, spec = text.partition("=")
        if not equals:
            raise ValueError("there is no =FORMAT")
        match = SITES.fullmatch(sites)
        if not match:
            raise ValueError(f"{sites.strip()!r} is not written KIND[LAYERS].POINT")
        kind, layers, point = match.groups()
        name, _, rest = spec.partition(":")
        options = [option.strip() for option in rest.split(",")]
        modes = [option for option in options if option.lower() in MODES]
        if len(modes) > 1:
            raise ValueError(f"two modes: {', '.join(modes)}")
        options = [option for option in options if option and option not in modes]
        return cls(
            get_format(f"{name.strip()}:{','.join(options)}" if options else name, seed=seed),
            kind,
            None if layers is None else parse_layers(layers),
            point,
            modes[0].lower() if modes else "every",
        )

    @property
    def layers(self) -> tuple[range, ...] | None:
        """``layer`` as it is kept: disjoint ranges in order; None for all."""
        return ranges_of(self.layer)

    @property
    def formats(self) -> tuple[Format, ...]:
        return (self.format,)

    def takes(self, value: Value, point: str | None) -> bool:
        """Whether it rounds the value, at a norm's point."""
        kind, layer = value.place
        if self.kind == EVERY_NORM:
            named = value.is_norm
        elif self.kind == NORM_N:
            named = value.norm_n
        elif self.kind == EVERY_ACTIVATION:
            named = not value.is_norm and not value.duplicate
        else:
            named = kind == self.kind
        return (
            named
            and self.point == point
            and (self.layers is None or any(layer in layers for layers in self.layers))
        )

    def __str__(self) -> str:
        layers = layers_text(self.kind, self.layers)
        spec = str(self.format)
        if self.mode != "every":
            spec += f"{',' if ':' in spec else ':'}{self.mode}"
        point = "" if self.point is None else f".{self.point}"
        return f"{self.kind}{layers}{point}={spec}"


_KIND = re.compile(r"[a-z][a-z0-9_]*|\*")
SITES = re.compile(r"\s*([^][.\s]*)(?:\[([^][]*)\])?(?:\.([^][.\s]*))?\s*")
_LAYERS = re.compile(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?")


def parse_layers(text: str) -> list[range] | None:
    """``0-10,15``, both ends included, or ``*``: None."""
    if text.strip() == "*":
        return None
    ranges = []
    for piece in text.split(","):
        match = _LAYERS.fullmatch(piece)
        if not match:
            raise ValueError(f"layers must be * or numbers and ranges such as 0-10,15, not {piece.strip()!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"layers {piece.strip()} run backwards")
        ranges.append(range(first, last + 1))
    return ranges


def as_ranges(layer: Any) -> tuple[range, ...] | None:
    """Disjoint ranges of step 1 in order, none next to another; None for all layers."""
    if layer is None:
        return None
    several = not isinstance(layer, str) and isinstance(layer, Iterable) and not isinstance(layer, range)
    ranges: list[range] = []
    try:
        for item in layer if several else [layer]:
            if isinstance(item, range) and item.step == 1:
                ranges.append(item)
            else:
                numbers = item if isinstance(item, range) else [operator.index(item)]
                ranges += [range(i, i + 1) for i in numbers]
    except TypeError:
        raise TypeError(f"layer must be a layer number, a range or several, not {layer!r}") from None
    if not several and ranges == [range(-1, 0)]:
        return None
    merged: list[range] = []
    for r in sorted((r for r in ranges if r), key=lambda r: r.start):
        if r.start < 0:
            raise ValueError(f"layer must be a layer number, or -1 for all layers, not {r.start}")
        if merged and r.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, r.stop))
        else:
            merged.append(r)
    if not merged:
        raise ValueError("layer names no layer")
    return tuple(merged)


def ranges_of(layer: object) -> tuple[range, ...] | None:
    """A rule's ``layer``, once `as_ranges` has read it."""
    return cast("tuple[range, ...] | None", layer)


def sites_text(places: Iterable[Place]) -> list[str]:
    """Places as rules name them: ``ffn_norm[0-29]``, one for each kind."""
    layers: dict[str, list[int]] = {}
    for kind, layer in places:
        layers.setdefault(kind, []).extend([] if layer is None else [layer])
    return [f"{kind}{layers_text(kind, as_ranges(some)) if some else ''}" for kind, some in layers.items()]


def layers_text(kind: str, layers: tuple[range, ...] | None) -> str:
    """As a rule writes them behind its kind."""
    if layers is None:
        return "" if kind == "output_norm" else "[*]"
    return f"[{','.join(map(range_text, layers))}]"


def range_text(r: range) -> str:
    return f"{r.start}" if r.stop - r.start == 1 else f"{r.start}-{r.stop - 1}"


def rules_text(rules: Sequence[object]) -> str:
    """The first rules, for a repr."""
    texts = [str(rule) for rule in rules[:3]]
    return ", ".join(texts + ["…"] * (len(rules) > 3)) or "none"
