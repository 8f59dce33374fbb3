"""Norms under rules: a context holds the rules and the counters of one evaluation of the graph
and is its only state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .._kernels import N_STATS, rms_norm_f32, round_trip
from .counter import Counter, RowStat
from .rule import Rules, as_rules, rules_text
from .sites import KINDS, NORM_N, NORM_N_KINDS, POINTS, Norm, Site

RowCallback = Callable[[Site, float, float], None]


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
