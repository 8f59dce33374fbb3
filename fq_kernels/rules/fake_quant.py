"""Values under rules: a FakeQuant holds the rules and the counters of one evaluation of the graph
and is its only state."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .._kernels import N_STATS, rms_norm_f32, round_trip, unit_gains
from ..formats import Format
from ..norm_unit import rms_norm_unit
from ..units import NormUnit
from .calibration import Calibration
from .counter import Counter, RowStat
from .rule import Rule, range_text, ranges_of, rules_text
from .sites import NORM_N, Place, Site, Value, describe_values
from .unit_rule import AnyRule, Rules, UnitRule, as_rules

RowCallback = Callable[[Site, float, float], None]


# steps of a unit, and the points of its norm where the same value is
_SAME_PLACE = {"x": "in", "raw": "raw", "out": "weighted"}


@lru_cache(maxsize=1024)
def misfit(fmt: Format, width: int) -> str:
    """Why rows of so many values cannot be rounded to a format; nothing where they can.

    What a registered function takes is its user's business.
    """
    if not width or fmt.family.registered:
        return ""
    try:
        round_trip(np.ones((1, width), np.float32), fmt)
    except ValueError as e:
        return str(e)
    return ""


@lru_cache(maxsize=8)
def _sites_of(values: tuple[Value, ...]) -> dict[Place, tuple[Site, ...]]:
    """Of each place; once for all the rules of a sweep, whose cells are many."""
    return {value.place: value.sites for value in values}


class FakeQuant:
    """The rules of one stream and its counters, one per site.

    values        what can be rounded of a graph, in order: `Model.values`
    rules         a rule, its text, or several of either; each site takes the last that matches
                  it, so a raw and a weighted rule on one norm both act. Of unit rules a norm takes
                  each step from the last that names it
    on_row        called for each rounded row with its site and |error| of its first and last
                  element
    count_errors  False: count rows alone, for which nothing is computed
    matching_only for what is only to be seen, which sites the rules take: files of static scales are not
                  read, nor lengths of rows and layers checked

    Raises ValueError for a rule that cannot be read, for one that matches no site, or none of some layers
    that it names, listing what there is, for a format that does not fit a site's rows, and for a rule and a
    step of a unit at one place of one norm: x and ``in``, raw, out and ``weighted``. Not for use by two
    threads at once.
    """

    def __init__(
        self,
        values: Iterable[Value],
        rules: Rules = (),
        on_row: RowCallback | None = None,
        *,
        count_errors: bool = True,
        matching_only: bool = False,
    ) -> None:
        self.values = tuple(values)
        self.rules = as_rules(rules)
        self.on_row = on_row
        self.count_errors = count_errors
        self._matching_only = matching_only
        self._sites = _sites_of(self.values)
        taken = self._sites_taken()
        # how norms compute that a unit rule takes
        self.units = self._units_taken(taken)
        # whether a rule takes a value that is no norm's
        self.rounds_values = any(site.point is None for site in taken)
        norm_numbers = {norm: 2 * i for i, norm in enumerate(self.norms)} if taken else {}
        widths = {value.place: value.width for value in self.values}
        self._new = {
            site: self._new_counter(site, rule, norm_numbers.get(site.place), widths[site.place])
            for site, rule in taken.items()
        }
        self.reset()

    def __repr__(self) -> str:
        rounded = sum(counter.rows_quantised for counter in self.counters.values())
        return f"<FakeQuant {rules_text(self.rules)}: {len(self.matched)} sites, {rounded} rows rounded>"

    @property
    def whole_tensor(self) -> bool:
        """Whether a rule's scale is over all rows that come together."""
        return any(fmt.whole_tensor for rule in self.rules for fmt in rule.formats)

    @property
    def norms(self) -> tuple[Place, ...]:
        return tuple(value.place for value in self.values if value.is_norm)

    def reset(self) -> None:
        """Zero the counters; first-call starts anew."""
        self.counters = {
            site: self._new[site].copy() if site in self._new else Counter(site)
            for sites in self._sites.values()
            for site in sites
        }

    @property
    def counters(self) -> dict[Site, Counter]:
        """Of each site; those kept from before may be put back."""
        return self._counters

    @counters.setter
    def counters(self, counters: dict[Site, Counter]) -> None:
        self._counters = counters
        # looking up a place's counters by their sites takes longer than a row's rounding
        self._by_place = {
            place: tuple([counters[site] for site in sites]) for place, sites in self._sites.items()
        }

    def kept(self) -> dict[Site, Counter]:
        """The counters as they are now, to be put back."""
        return {site: counter.copy() for site, counter in self.counters.items()}

    def _sites_taken(self) -> dict[Site, Rule]:
        """The last rule of each site that has one. Raises ValueError for a rule without a site."""
        by_kind: dict[str, list[Value]] = {}
        for value in self.values:
            by_kind.setdefault(value.place.kind, []).append(value)
        taken: dict[Site, Rule] = {}
        for rule in self.rules:
            if isinstance(rule, UnitRule):
                continue
            # all of them for a word that stands for several kinds
            some = by_kind.get(rule.kind, self.values)
            sites = [Site(value.place, rule.point) for value in some if rule.takes(value, rule.point)]
            if not sites:
                raise ValueError(f"{rule} matches no site; there are {describe_values(self.values)}")
            self._check_layers(rule, [site.place for site in sites])
            taken |= dict.fromkeys(sites, rule)
        return taken

    def _check_layers(self, rule: AnyRule, taken: Sequence[Place]) -> None:
        """Raises ValueError where of layers that a rule names one after another it takes none."""
        if self._matching_only:
            return
        layers = {place.layer for place in taken}
        for some in ranges_of(rule.layer) or ():
            if not any(layer in some for layer in layers):
                there = describe_values(self.values)
                raise ValueError(f"{rule} takes nothing of layer {range_text(some)}; there are {there}")

    def _units_taken(self, rules: dict[Site, Rule]) -> dict[Place, NormUnit]:
        """Of each norm that has one. Raises ValueError for a unit rule without a norm, or beside a rule."""
        units: dict[Place, NormUnit] = {}
        for rule in self.rules:
            if not isinstance(rule, UnitRule):
                continue
            norms = [value.place for value in self.values if rule.takes(value)]
            if not norms:
                raise ValueError(f"{rule} matches no norm; there are {describe_values(self.values)}")
            self._check_layers(rule, norms)
            for norm in norms:
                units[norm] = units.get(norm, NormUnit()).changed(rule.unit.steps)
        for norm, unit in units.items():
            try:
                unit.check()
            except ValueError as e:
                raise ValueError(f"{norm}: {e}") from None
            for step, point in _SAME_PLACE.items():
                other = rules.get(Site(norm, point))
                if step in unit.formats and other is not None:
                    raise ValueError(
                        f"{other} and step {step} of a unit ({unit}) round the same value of {norm}"
                    )
        return {norm: unit.seeded(str(norm)) for norm, unit in units.items()}

    def _new_counter(self, site: Site, rule: Rule, norm_number: int | None, width: int) -> Counter:
        fmt = rule.format
        if not self._matching_only:
            if fmt.calibration:
                fmt = Calibration.load(fmt.calibration).format_at(site, fmt)
            if error := misfit(fmt, width):
                raise ValueError(f"{site}: {error}")
        if fmt.seeded:
            # each site draws numbers of its own
            if norm_number is not None and site.point in ("raw", "weighted"):
                number = norm_number + (site.point == "weighted")
            else:
                number = (1 << 32) + zlib.crc32(str(site).encode())
            fmt = fmt.with_seed((fmt.seed * 0x9E3779B97F4A7C15 + number) % 2**64)
        return Counter(site, rule, fmt, totals=np.zeros(len(RowStat)) if self.count_errors else None)

    @property
    def matched(self) -> list[Counter]:
        """Counters of the sites that a rule takes, in graph order."""
        return [c for c in self.counters.values() if c.rule]

    def takes(self, place: Place) -> bool:
        """Whether a rule takes a site of the place."""
        return place in self.units or any(counter.rule for counter in self._by_place[place])

    def reads_unrounded(self, norm: Place) -> bool:
        """Whether the norm's unit reads what it reads before a rule rounds it."""
        unit = self.units.get(norm)
        return unit is not None and unit.reads_unrounded

    def rows_seen(self, place: Place) -> int:
        """Rows that reached the place since the last reset; of one that is no norm's, if a rule takes it."""
        return self._by_place[place][0].rows_seen

    def rows_quantised(self, place: Place) -> int:
        """Rows of the place that were rounded, at any of its points."""
        # what a rule rounds are all rows or the first: of two rules, one's rows are among the other's
        return max(counter.rows_quantised for counter in self._by_place[place])

    def as_dict(self) -> dict[str, Any]:
        """Rules, counts of every norm, and the figures of the sites that a rule takes."""
        norms: list[dict[str, Any]] = [
            {
                "kind": norm.kind,
                "layer": norm.layer,
                "rows_seen": self.rows_seen(norm),
                "rows_quantised": self.rows_quantised(norm),
            }
            | ({"unit": str(self.units[norm])} if norm in self.units else {})
            for norm in self.norms
        ]
        return {
            "rules": [str(rule) for rule in self.rules],
            "rows_seen": sum(self.rows_seen(norm) for norm in self.norms),
            "rows_quantised": sum(self.rows_quantised(norm) for norm in self.norms),
            "norms": norms,
            "sites": [c.as_dict() for c in self.matched],
        }

    def round(self, values: Sequence[Value], x: np.ndarray, executor: Any = None) -> None:
        """Round x, a node's value, in place under the rules for the places that it has; no norm's.

        x (n_tokens, …) has value.rows rows a token, one after the other.
        """
        for value in values:
            (counter,) = self._by_place[value.place]
            if counter.rule is None:
                continue
            rows = x.shape[0] * value.rows
            view = x if value.rows == 1 and x.ndim == 2 else x.reshape(rows, x[:1].size // value.rows)
            if x.size and not np.may_share_memory(view, x):
                raise ValueError(f"{value.place}: rows that are not contiguous cannot be rounded in place")
            self._round(counter, view, view, executor)

    def rms_norm(
        self,
        norm: Place,
        x: np.ndarray,
        *,
        eps: float,
        weight: np.ndarray,
        out: np.ndarray,
        executor: Any = None,
    ) -> np.ndarray:
        """rms_norm_f32 of x (rows, n), or what its unit computes, under the rules for ``norm``'s sites;
        counts the rows."""
        rows, n = x.shape
        unit = self.units.get(norm)
        if unit is not None:
            return self._by_unit(unit, norm, x, eps, weight, out, executor)
        read, raw, weighted = counters = self._by_place[norm]
        if read.rule is raw.rule is weighted.rule is None:
            for counter in counters:
                counter.rows_seen += rows
            rms_norm_f32(x, eps=eps, weight=weight, out=out, executor=executor)
            return out
        wanted_raw, wanted_weighted = self._wanted(raw, rows), self._wanted(weighted, rows)
        if read.rule is None:
            read.add(rows, 0, n)
        else:
            x = self._round(read, x, None, executor)
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

    def _by_unit(
        self,
        unit: NormUnit,
        norm: Place,
        x: np.ndarray,
        eps: float,
        weight: np.ndarray,
        out: np.ndarray,
        executor: Any,
    ) -> np.ndarray:
        """A norm by its unit; where a rule takes a value on the way, in two halves."""
        read, raw, weighted = self._by_place[norm]
        first = raw.rows_seen
        # said before the rows are counted at any point
        wanted = [self._wanted(counter, len(x)) for counter in (read, raw, weighted)]
        x = self._round(read, x, None, executor, wanted[0])
        if raw.rule is None:
            rms_norm_unit(x, unit, eps=eps, weight=weight, out=out, executor=executor, first_row=first)
            raw.add(len(x), 0, x.shape[1])
        else:
            rms_norm_unit(x, unit.without_gain, eps=eps, out=out, executor=executor, first_row=first)
            self._round(raw, out, out, executor, wanted[1])
            np.multiply(out, unit_gains(unit, weight), out=out)
            if "out" in unit.formats:
                round_trip(out, unit.formats["out"], out=out, executor=executor, first_row=first)
        self._round(weighted, out, out, executor, wanted[2])
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

    def _round(
        self,
        counter: Counter,
        x: np.ndarray,
        out: np.ndarray | None,
        executor: Any,
        wanted: int | None = None,
    ) -> np.ndarray:
        """x (rows, n) as the site's rule has it, into out, which may be x; None: a new array.

        wanted  how many rows are rounded, where that is known
        """
        rows, n = x.shape
        wanted = self._wanted(counter, rows) if wanted is None else wanted
        stats = None
        if wanted:
            assert counter.format is not None
            stats = self._stats(rows)
            x = round_trip(
                x,
                counter.format,
                out=out,
                executor=executor,
                quant_rows=None if wanted == rows else (0, wanted),
                first_row=counter.rows_seen,
                row_stats=stats,
            )
        self._count(counter, rows, wanted, n, stats)
        return x

    def pass_by(self, place: Place, rows: int) -> None:
        """Count rows that reached the place elsewhere, in an evaluation shared with another stream."""
        for counter in self._by_place[place]:
            counter.add(rows, 0, 0)

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
            # the name belongs to several norms: the first row to reach either has had its turn
            layer = counter.site.place.layer
            same_name = (v.place for v in self.values if v.norm_n and v.place.layer == layer)
            return int(not any(self.rows_seen(norm) for norm in same_name))
        return 1
