"""What the rounding did at one site, counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from .._kernels import log
from ..formats import Format
from .rule import Rule
from .sites import Site

LN_10 = 2.302585092994046


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
    TO_ZERO = 11
    SUBNORMAL = 12


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

    def copy(self) -> Counter:
        totals = None if self.totals is None else self.totals.copy()
        seen = self.rows_seen, self.rows_quantised, self.elements
        return Counter(self.site, self.rule, self.format, *seen, totals)

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
        # row by row, so that it does not matter how many come at a time
        self.totals = np.add.accumulate(np.concatenate([self.totals[None], row_stats]), axis=0)[-1].copy()
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
    def to_zero(self) -> int | None:
        """Elements that rounding made zero: underflow."""
        return self._count(RowStat.TO_ZERO)

    @property
    def subnormal(self) -> int | None:
        """Results that are subnormal numbers of the format; None where elements share a scale, or a function
        in Python rounds."""
        return self._count(RowStat.SUBNORMAL)

    @property
    def not_finite(self) -> int | None:
        """Elements that were or became infinite or NaN; the errors leave them out."""
        return self._count(RowStat.NOT_FINITE)

    @property
    def max_abs_error(self) -> float | None:
        return self._total(RowStat.MAX_ABS_ERROR)

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
        return 10 * log(signal / noise) / LN_10 if signal > 0 and noise > 0 else None

    def _count(self, column: RowStat) -> int | None:
        total = self._total(column)
        return None if total is None else int(total)

    def _total(self, column: RowStat) -> float | None:
        """None where it was not counted: NaN in what a version kept that did not count it yet."""
        if self.totals is None or math.isnan(self.totals[column]):
            return None
        return float(self.totals[column])

    def _mean(self, column: RowStat) -> float | None:
        total, lost = self._total(column), self._total(RowStat.NOT_FINITE)
        if total is None or lost is None:
            return None
        finite = self.elements - int(lost)
        return total / finite if finite else 0.0

    def as_dict(self) -> dict[str, Any]:
        assert self.rule is not None
        return {
            "kind": self.site.place.kind,
            "layer": self.site.place.layer,
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
            "to_zero": self.to_zero,
            "subnormal": self.subnormal,
            "not_finite": self.not_finite,
            "max_abs_error": self.max_abs_error,
            "mean_abs_error": self.mean_abs_error,
            "mean_error": self.mean_error,
            "sqnr_db": self.sqnr_db,
        }
