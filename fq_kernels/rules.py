"""Which norm outputs are rounded, to what, and what the rounding did.

A *norm* is one rms_norm of the graph, (kind, layer). It has two *sites*, one per point:
``raw`` before the weight, ``weighted`` after it. Rules pick sites; a context holds the
rules and the counters of one evaluation of the graph and is its only state.

A rule is written ``SITES=FORMAT[:option,...]``:

    ffn_norm[5]=bf16                          the raw output of layer 5's FFN norm
    ffn_norm[0-10,15].weighted=bf16:truncate  a format with its options; after the weight
    *[*].raw=f16                              every norm, output_norm too
    output_norm=bf16                          no layers: all of them; no point: raw
    norm[*]=bf16:first-call                   the original experiment's mode
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, cast

import numpy as np

from ._kernels import N_STATS, rms_norm_f32, round_trip
from .formats import Format, get_format

KINDS = ("attn_norm", "ffn_norm", "output_norm")
POINTS = ("raw", "weighted")
MODES = ("every", "first-call")

# Kinds that a rule may name beside KINDS. llama.cpp calls the raw output of both norms of layer N "norm-N".
NORM_N = "norm"
NORM_N_KINDS = ("attn_norm", "ffn_norm")
EVERY_KIND = "*"


class RowStat(IntEnum):
    """Columns of the kernels' ``row_stats``; order shared with src/rounding/contract.h."""

    MAX_ABS_ERROR = 0
    SUM_ABS_ERROR = 1
    SUM_ERROR = 2
    SUM_SQ_ERROR = 3
    SUM_SQ_VALUE = 4
    CHANGED = 5
    NOT_FINITE = 6
    FIRST_ERROR = 7
    LAST_ERROR = 8
    SUMMED_IN_ORDER = 9
    OUT_OF_RANGE = 10


class Norm(NamedTuple):
    """One rms_norm of the graph; ``layer`` is None for output_norm."""

    kind: str
    layer: int | None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}[{self.layer}]"


class Site(NamedTuple):
    """One output of a norm: the norm and the point."""

    norm: Norm
    point: str

    def __str__(self) -> str:
        return f"{self.norm}.{self.point}"


@dataclass(frozen=True)
class Rule:
    """Sites -> format.

    format a Format or its name
    kind   one of KINDS; "*" (or "all") for every norm; "norm" for llama.cpp's ``norm-N``, the
           raw outputs of both norms of a layer
    layer  a layer number, a range, or several of both; None or -1 for all layers (and for
           output_norm, which has none). Kept as ranges in order, or None
    point  "raw" or "weighted"
    mode   "every" rounds every row; "first-call" rounds the first row that reaches each site
           after a reset and no other. With kind "norm" it is the first row that reaches the
           name: the original experiment's mode, which rounds row 0 of the attention norm

    Two rules that say the same are equal, and ``Rule.parse(str(rule)) == rule``.
    Raises ValueError or TypeError naming the field.
    """

    format: Format
    kind: str = "ffn_norm"
    layer: int | range | Iterable[int | range] | None = None
    point: str = "raw"
    mode: str = "every"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        for name, value, allowed in (
            ("kind", self.kind, (*KINDS, NORM_N, EVERY_KIND, "all")),
            ("point", self.point, POINTS),
            ("mode", self.mode, MODES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        if self.kind == "all":
            object.__setattr__(self, "kind", EVERY_KIND)
        if self.kind == NORM_N and self.point != "raw":
            raise ValueError("point must be raw for kind norm, llama.cpp's name of the raw outputs")
        object.__setattr__(self, "layer", _as_ranges(self.layer))

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
        match = _SITES.fullmatch(sites)
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
            None if layers is None else _parse_layers(layers),
            "raw" if point is None else point,
            modes[0].lower() if modes else "every",
        )

    @property
    def layers(self) -> tuple[range, ...] | None:
        """``layer`` as it is kept: disjoint ranges in order; None for all."""
        return cast("tuple[range, ...] | None", self.layer)

    def matches(self, site: Site) -> bool:
        kind, layer = site.norm
        return (
            self.point == site.point
            and (self.kind in (kind, EVERY_KIND) or (self.kind == NORM_N and kind in NORM_N_KINDS))
            and (self.layers is None or any(layer in layers for layers in self.layers))
        )

    def __str__(self) -> str:
        if self.layers is None:
            layers = "" if self.kind == "output_norm" else "[*]"
        else:
            layers = f"[{','.join(map(_range_text, self.layers))}]"
        spec = str(self.format)
        if self.mode != "every":
            spec += f"{',' if ':' in spec else ':'}{self.mode}"
        return f"{self.kind}{layers}.{self.point}={spec}"


_SITES = re.compile(r"\s*([^][.\s]*)(?:\[([^][]*)\])?(?:\.([^][.\s]*))?\s*")
_LAYERS = re.compile(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?")


def _parse_layers(text: str) -> list[range] | None:
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


def _as_ranges(layer: Any) -> tuple[range, ...] | None:
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


def _range_text(r: range) -> str:
    return f"{r.start}" if r.stop - r.start == 1 else f"{r.start}-{r.stop - 1}"


Rules = str | Rule | Iterable[str | Rule]


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """A rule, its text, or several of either. Raises ValueError or TypeError naming the bad one."""
    several = rules if isinstance(rules, Iterable) and not isinstance(rules, str) else [rules]
    return tuple(rule if isinstance(rule, Rule) else Rule.parse(rule) for rule in several)


@dataclass
class Counter:
    """What one site saw and what its rule did. Errors are result - value, in float64.

    ``format`` is the rule's, with a seed of the site's own where it has one.
    ``totals`` are the columns of RowStat over the rounded rows (sums; for MAX_ABS_ERROR the
    largest), or None where errors are not counted; then the error figures are None too.
    """

    site: Site
    rule: Rule | None = None
    format: Format | None = None
    rows_seen: int = 0
    rows_quantised: int = 0
    elements: int = 0
    totals: np.ndarray | None = None

    def add(self, rows: int, quantised: int, n: int, row_stats: np.ndarray | None = None) -> None:
        """Count ``rows`` rows of n elements, the first ``quantised`` of them rounded.

        row_stats (rows, N_STATS) is what the kernel left; it is used where errors are counted.
        """
        self.rows_seen += rows
        self.rows_quantised += quantised
        self.elements += quantised * n
        if self.totals is None or row_stats is None or not quantised:
            return
        row_stats = row_stats[:quantised]
        largest = max(self.totals[RowStat.MAX_ABS_ERROR], row_stats[:, RowStat.MAX_ABS_ERROR].max())
        self.totals += row_stats.sum(axis=0)
        self.totals[RowStat.MAX_ABS_ERROR] = largest

    @property
    def rows_skipped(self) -> int:
        return self.rows_seen - self.rows_quantised

    @property
    def coverage(self) -> float:
        """Rounded rows among those seen, 0 to 1."""
        return self.rows_quantised / self.rows_seen if self.rows_seen else 0.0

    @property
    def changed(self) -> int | None:
        """Elements that rounding changed."""
        return self._count(RowStat.CHANGED)

    @property
    def out_of_range(self) -> int | None:
        """Elements that left the format's range: cut to its end, or turned infinite or NaN."""
        return self._count(RowStat.OUT_OF_RANGE)

    @property
    def not_finite(self) -> int | None:
        """Elements that were or became infinite or NaN; the errors leave them out."""
        return self._count(RowStat.NOT_FINITE)

    @property
    def max_abs_error(self) -> float | None:
        return None if self.totals is None else float(self.totals[RowStat.MAX_ABS_ERROR])

    @property
    def mean_abs_error(self) -> float | None:
        return self._mean(RowStat.SUM_ABS_ERROR)

    @property
    def mean_error(self) -> float | None:
        """Mean signed error: the bias."""
        return self._mean(RowStat.SUM_ERROR)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise in dB; None where there was no error (or no signal)."""
        if self.totals is None:
            return None
        signal, noise = self.totals[RowStat.SUM_SQ_VALUE], self.totals[RowStat.SUM_SQ_ERROR]
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None

    def _count(self, column: RowStat) -> int | None:
        return None if self.totals is None else int(self.totals[column])

    def _mean(self, column: RowStat) -> float | None:
        if self.totals is None:
            return None
        finite = self.elements - int(self.totals[RowStat.NOT_FINITE])
        return float(self.totals[column]) / finite if finite else 0.0

    def as_dict(self) -> dict[str, Any]:
        assert self.rule is not None
        return {
            "kind": self.site.norm.kind,
            "layer": self.site.norm.layer,
            "point": self.site.point,
            "format": str(self.rule.format),
            "mode": self.rule.mode,
            "rows_seen": self.rows_seen,
            "rows_quantised": self.rows_quantised,
            "rows_skipped": self.rows_skipped,
            "coverage": self.coverage,
            "elements": self.elements,
            "changed": self.changed,
            "out_of_range": self.out_of_range,
            "not_finite": self.not_finite,
            "max_abs_error": self.max_abs_error,
            "mean_abs_error": self.mean_abs_error,
            "mean_error": self.mean_error,
            "sqnr_db": self.sqnr_db,
        }


RowCallback = Callable[[Site, float, float], None]


def rules_text(rules: Sequence[object]) -> str:
    """The first rules, for a repr."""
    texts = [str(rule) for rule in rules[:3]]
    return ", ".join(texts + ["…"] * (len(rules) > 3)) or "none"


class FakeQuant:
    """The rules of one stream and its counters, one per site.

    norms         the graph's norms, in order
    rules         a rule, its text, or several of either; each site takes the last that matches
                  it, so a raw and a weighted rule on one norm both act
    on_row        called for each rounded row with its site and |error| of its first and last
                  element
    count_errors  False: count rows alone, for which nothing is computed

    Raises ValueError for a rule that cannot be read, and for one that matches no site, listing
    what there is. Not for use by two threads at once.
    """

    def __init__(
        self,
        norms: Iterable[Norm],
        rules: Rules = (),
        on_row: RowCallback | None = None,
        *,
        count_errors: bool = True,
    ) -> None:
        self.norms = tuple(norms)
        self.rules = as_rules(rules)
        self.on_row = on_row
        self.count_errors = count_errors
        self._sites = {norm: (Site(norm, "raw"), Site(norm, "weighted")) for norm in self.norms}
        for rule in self.rules:
            if not any(rule.matches(site) for pair in self._sites.values() for site in pair):
                raise ValueError(f"{rule} matches no site; there are {describe_norms(self.norms)}")
        self.reset()

    def __repr__(self) -> str:
        rounded = sum(counter.rows_quantised for counter in self.counters.values())
        return f"<FakeQuant {rules_text(self.rules)}: {len(self.matched)} sites, {rounded} rows rounded>"

    def reset(self) -> None:
        """Zero the counters; first-call starts anew."""
        sites = [site for pair in self._sites.values() for site in pair]
        self.counters = {site: self._new_counter(site, i) for i, site in enumerate(sites)}

    @property
    def counters(self) -> dict[Site, Counter]:
        """Of each site; those kept from before may be put back."""
        return self._counters

    @counters.setter
    def counters(self, counters: dict[Site, Counter]) -> None:
        self._counters = counters
        # looking up a norm's two counters by their sites takes longer than a row's rounding
        self._pairs = {norm: (counters[raw], counters[wt]) for norm, (raw, wt) in self._sites.items()}

    def _new_counter(self, site: Site, i: int) -> Counter:
        rule = next((r for r in reversed(self.rules) if r.matches(site)), None)
        if rule is None:
            return Counter(site)
        fmt = rule.format
        if fmt.seeded:
            # each site draws numbers of its own
            fmt = fmt.with_seed((fmt.seed * 0x9E3779B97F4A7C15 + i) % 2**64)
        return Counter(site, rule, fmt, totals=np.zeros(len(RowStat)) if self.count_errors else None)

    @property
    def matched(self) -> list[Counter]:
        """Counters of the sites that a rule takes, in graph order."""
        return [c for c in self.counters.values() if c.rule]

    def rows_seen(self, norm: Norm) -> int:
        """Rows that reached ``norm`` since the last reset."""
        return self.counters[self._sites[norm][0]].rows_seen

    def rows_quantised(self, norm: Norm) -> int:
        """Rows of ``norm`` that were rounded, at either point or both."""
        # what a rule rounds are all rows or the first: of two rules, one's rows are among the other's
        return max(self.counters[site].rows_quantised for site in self._sites[norm])

    def as_dict(self) -> dict[str, Any]:
        """Rules, counts of every norm, and the figures of the sites that a rule takes."""
        norms = [
            {
                "kind": norm.kind,
                "layer": norm.layer,
                "rows_seen": self.rows_seen(norm),
                "rows_quantised": self.rows_quantised(norm),
            }
            for norm in self.norms
        ]
        return {
            "rules": [str(rule) for rule in self.rules],
            "rows_seen": sum(self.rows_seen(norm) for norm in self.norms),
            "rows_quantised": sum(self.rows_quantised(norm) for norm in self.norms),
            "norms": norms,
            "sites": [c.as_dict() for c in self.matched],
        }

    def rms_norm(
        self,
        norm: Norm,
        x: np.ndarray,
        *,
        eps: float,
        weight: np.ndarray,
        out: np.ndarray,
        executor: Any = None,
    ) -> np.ndarray:
        """rms_norm_f32 of x (rows, n) under the rules for ``norm``'s two sites; counts the rows."""
        rows, n = x.shape
        raw, weighted = self._pairs[norm]
        wanted_raw, wanted_weighted = self._wanted(raw, rows), self._wanted(weighted, rows)
        stats = None
        # at both points at once, where nothing is counted in between
        both = (
            not self._counting and 0 < wanted_raw == wanted_weighted and raw.rows_seen == weighted.rows_seen
        )
        if wanted_raw or not wanted_weighted:
            if not wanted_raw:
                rms_norm_f32(x, eps=eps, weight=weight, out=out, executor=executor)
            else:
                stats = self._stats(rows)
                rms_norm_f32(
                    x,
                    eps=eps,
                    weight=weight,
                    quant=raw.format,
                    out=out,
                    executor=executor,
                    quant_rows=None if wanted_raw == rows else (0, wanted_raw),
                    first_row=raw.rows_seen,
                    row_stats=stats,
                    result_quant=weighted.format if both else None,
                )
        self._count(raw, rows, wanted_raw, n, stats)
        stats = None
        if wanted_weighted and not both:
            stats = self._stats(rows)
            rounding: dict[str, Any] = {
                "quant_rows": None if wanted_weighted == rows else (0, wanted_weighted),
                "first_row": weighted.rows_seen,
                "row_stats": stats,
            }
            assert weighted.format is not None
            if wanted_raw:  # out is the rounded norm times the weight
                round_trip(out, weighted.format, out=out, executor=executor, **rounding)
            else:
                rms_norm_f32(
                    x,
                    eps=eps,
                    weight=weight,
                    quant=weighted.format,
                    point="weighted",
                    out=out,
                    executor=executor,
                    **rounding,
                )
        self._count(weighted, rows, wanted_weighted, n, stats)
        return out

    @property
    def _counting(self) -> bool:
        return self.count_errors or self.on_row is not None

    def _stats(self, rows: int) -> np.ndarray | None:
        return np.empty((rows, N_STATS)) if self._counting else None

    def _count(self, counter: Counter, rows: int, wanted: int, n: int, stats: np.ndarray | None) -> None:
        counter.add(rows, wanted, n, stats)
        if self.on_row and stats is not None:
            for row in stats[:wanted]:
                self.on_row(counter.site, float(row[RowStat.FIRST_ERROR]), float(row[RowStat.LAST_ERROR]))

    def pass_by(self, norm: Norm, rows: int) -> None:
        """Count rows that reached ``norm`` elsewhere, in an evaluation shared with another stream."""
        for site in self._sites[norm]:
            self.counters[site].add(rows, 0, 0)

    def _wanted(self, counter: Counter, rows: int) -> int:
        """How many of the next ``rows`` rows its rule rounds, counted from the first."""
        rule = counter.rule
        if rule is None:
            return 0
        if rule.mode == "every":
            return rows
        if counter.rows_seen or not rows:
            return 0
        if rule.kind == NORM_N:
            # the name belongs to two norms: the first row to reach either has had its turn
            layer = counter.site.norm.layer
            same_name = (Norm(kind, layer) for kind in NORM_N_KINDS)
            return int(not any(self.rows_seen(norm) for norm in same_name if norm in self._sites))
        return 1


def describe_norms(norms: Sequence[Norm]) -> str:
    """``attn_norm[0-29], ffn_norm[0-29], output_norm; points raw, weighted``."""
    parts = []
    for kind in KINDS:
        layers = [norm.layer for norm in norms if norm.kind == kind]
        if layers == [None]:
            parts.append(kind)
        elif layers:
            parts.append(f"{kind}[{layers[0]}-{layers[-1]}]" if len(layers) > 1 else f"{kind}[{layers[0]}]")
    return f"{', '.join(parts)}; points {', '.join(POINTS)}"
