"""Which norm outputs are rounded, to what, and what the rounding did.

A *norm* is one rms_norm of the graph, (kind, layer). It has two *sites*, one per point:
``raw`` before the weight, ``weighted`` after it. Rules pick sites; a context holds the
rules and the counters of one evaluation of the graph and is its only state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from ._kernels import N_STATS, rms_norm_f32
from .formats import Format, get_format

KINDS = ("attn_norm", "ffn_norm", "output_norm")
POINTS = ("raw", "weighted")
MODES = ("every", "first-call")


class RowStat(IntEnum):
    """Columns of ``rms_norm_f32(row_stats=...)``; order shared with src/rms_norm.h."""

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

    kind is one of KINDS or "all"; layer is a layer number or -1 for all; point is "raw" or
    "weighted". mode "every" rounds every row; "first-call" rounds the first row that
    reaches each site after a reset and no other (the original experiment's mode).
    Raises ValueError naming the field.
    """

    format: Format
    kind: str = "ffn_norm"
    layer: int = -1
    point: str = "raw"
    mode: str = "every"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        for name, value, allowed in (
            ("kind", self.kind, (*KINDS, "all")),
            ("point", self.point, POINTS),
            ("mode", self.mode, MODES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        if self.layer < -1:
            raise ValueError(f"layer must be a layer number, or -1 for all layers, not {self.layer}")

    def matches(self, norm: Norm) -> bool:
        return self.kind in (norm.kind, "all") and self.layer in (-1, norm.layer)

    def __str__(self) -> str:
        layers = "" if self.kind == "output_norm" else "[*]" if self.layer < 0 else f"[{self.layer}]"
        kind = "*" if self.kind == "all" else self.kind
        return f"{kind}{layers}.{self.point}={self.format} ({self.mode})"


@dataclass
class Counter:
    """What one norm saw and what its rounding did. Errors are result - value, in float64."""

    norm: Norm
    rule: Rule | None
    seed: int = 0
    rows_seen: int = 0
    rows_quantised: int = 0
    elements: int = 0
    changed: int = 0
    not_finite: int = 0
    max_abs_error: float = 0.0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(N_STATS))

    def add(self, rows: int, row_stats: np.ndarray | None, n: int) -> None:
        """Count ``rows`` rows seen, of which those of ``row_stats`` (k, N_STATS), n long, were rounded."""
        self.rows_seen += rows
        if row_stats is None or not len(row_stats):
            return
        self.rows_quantised += len(row_stats)
        self.elements += len(row_stats) * n
        self.max_abs_error = max(self.max_abs_error, float(row_stats[:, RowStat.MAX_ABS_ERROR].max()))
        self.sums += row_stats.sum(axis=0)
        self.changed = int(self.sums[RowStat.CHANGED])
        self.not_finite = int(self.sums[RowStat.NOT_FINITE])

    @property
    def coverage(self) -> float:
        """Rounded rows among those seen, 0 to 1."""
        return self.rows_quantised / self.rows_seen if self.rows_seen else 0.0

    @property
    def mean_abs_error(self) -> float:
        return self._mean(RowStat.SUM_ABS_ERROR)

    @property
    def mean_error(self) -> float:
        """Mean signed error: the bias."""
        return self._mean(RowStat.SUM_ERROR)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise in dB; None where there was no error (or no signal)."""
        signal, noise = self.sums[RowStat.SUM_SQ_VALUE], self.sums[RowStat.SUM_SQ_ERROR]
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None

    def _mean(self, column: RowStat) -> float:
        finite = self.elements - self.not_finite
        return float(self.sums[column]) / finite if finite else 0.0

    def as_dict(self) -> dict[str, Any]:
        assert self.rule is not None
        return {
            "kind": self.norm.kind,
            "layer": self.norm.layer,
            "point": self.rule.point,
            "format": str(self.rule.format),
            "mode": self.rule.mode,
            "rows_seen": self.rows_seen,
            "rows_quantised": self.rows_quantised,
            "coverage": self.coverage,
            "elements": self.elements,
            "changed": self.changed,
            "not_finite": self.not_finite,
            "max_abs_error": self.max_abs_error,
            "mean_abs_error": self.mean_abs_error,
            "mean_error": self.mean_error,
            "sqnr_db": self.sqnr_db,
        }


RowCallback = Callable[[Site, float, float], None]


class FakeQuant:
    """The rules of one stream and its counters.

    norms  the graph's norms, in order
    rules  later rules win; each must match at least one norm
    on_row called for each rounded row with its site and |error| of its first and last element

    Raises ValueError for a rule that matches nothing, listing what there is.
    """

    def __init__(
        self, norms: Iterable[Norm], rules: Sequence[Rule] = (), on_row: RowCallback | None = None
    ) -> None:
        self.norms = tuple(norms)
        self.rules = tuple(rules)
        self.on_row = on_row
        for rule in self.rules:
            if not any(rule.matches(norm) for norm in self.norms):
                raise ValueError(f"{rule} matches no site; there are {describe_norms(self.norms)}")
        self.reset()

    def reset(self) -> None:
        """Zero the counters; first-call starts anew."""
        self.counters = {
            norm: Counter(norm, next((r for r in reversed(self.rules) if r.matches(norm)), None), seed=i)
            for i, norm in enumerate(self.norms)
        }

    @property
    def matched(self) -> list[Counter]:
        """Counters of the norms that a rule takes, in graph order."""
        return [c for c in self.counters.values() if c.rule]

    def as_dict(self) -> dict[str, Any]:
        """Rules, counts of every norm, and the error figures of those that a rule takes."""
        counters = list(self.counters.values())
        return {
            "rules": [str(rule) for rule in self.rules],
            "rows_seen": sum(c.rows_seen for c in counters),
            "rows_quantised": sum(c.rows_quantised for c in counters),
            "norms": [
                {
                    "kind": c.norm.kind,
                    "layer": c.norm.layer,
                    "rows_seen": c.rows_seen,
                    "rows_quantised": c.rows_quantised,
                }
                for c in counters
            ],
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
        """rms_norm_f32 of x (rows, n) under the rule for ``norm``; counts the rows."""
        counter = self.counters[norm]
        rows, n = x.shape
        rule = counter.rule
        wanted = 0
        if rule is not None:
            wanted = rows if rule.mode == "every" else min(rows, int(counter.rows_seen == 0))
        if rule is None or not wanted:
            rms_norm_f32(x, eps=eps, weight=weight, out=out, executor=executor)
            counter.add(rows, None, n)
            return out
        stats = np.empty((rows, N_STATS))
        fmt = rule.format
        if fmt.rounding == "stochastic":
            # each norm draws numbers of its own
            fmt = fmt.with_seed((fmt.seed * 0x9E3779B97F4A7C15 + counter.seed) % 2**64)
        rms_norm_f32(
            x,
            eps=eps,
            weight=weight,
            quant=fmt,
            point=rule.point,
            out=out,
            executor=executor,
            quant_rows=(0, wanted),
            first_row=counter.rows_seen,
            row_stats=stats,
        )
        counter.add(rows, stats[:wanted], n)
        if self.on_row:
            site = Site(norm, rule.point)
            for row in stats[:wanted]:
                self.on_row(site, float(row[RowStat.FIRST_ERROR]), float(row[RowStat.LAST_ERROR]))
        return out


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
