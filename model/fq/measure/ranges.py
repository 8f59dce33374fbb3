"""How large the values at a site are, and where: what sizes exponent bits, scales and accumulators.

The chunk's first token, BOS in most models, is told apart: it is often many times larger than all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fq_kernels import Executor, describe_formats
from fq_kernels.rules import Site

from ..run.model import Model
from .chunks import Settings
from .observation import Observation

# An element is an outlier where it is so many times its row's median magnitude; of normal values none is.
OUTLIER = 10.0
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)
MOST_CHANNELS = 16  # of a site, in what is written
_LOWEST = -127  # stands for zeros and float32's subnormals
_FINE = 16  # bits of a float32 that are left out where percentiles are found


class Range:
    """What passed one site; ``add`` takes rows of n values.

    exponents  counts by floor(log2 |x|) + 127; 0 holds zeros and subnormals, 255 what is not finite
    fine       counts by the upper 16 bits of |x|
    """

    def __init__(self) -> None:
        self.rows = self.values = self.zeros = 0
        self.exponents = np.zeros(256, np.int64)
        self.fine = np.zeros(1 << (31 - _FINE), np.int64)
        self.low = self.high = 0.0

    def add(self, x: np.ndarray) -> None:
        bits = np.abs(x).view(np.uint32).ravel() >> np.uint32(_FINE)
        counts = np.bincount(bits, minlength=len(self.fine))
        self.fine += counts
        self.exponents += counts.reshape(256, -1).sum(axis=1)
        self.rows += len(x)
        self.values += x.size
        self.zeros += int(x.size - np.count_nonzero(x))
        finite = x[np.isfinite(x)]
        self.low = min(self.low, float(finite.min(initial=0)))
        self.high = max(self.high, float(finite.max(initial=0)))

    @property
    def largest(self) -> float:
        return max(-self.low, self.high)

    @property
    def not_finite(self) -> int:
        return int(self.exponents[255])

    def percentile(self, percent: float) -> float:
        """Of the finite magnitudes; at most 1 / 128 too large."""
        counts = self.fine[: 255 << (23 - _FINE)]
        total = int(counts.sum())
        if not total:
            return math.nan
        at = int(np.searchsorted(np.cumsum(counts), max(1, math.ceil(total * percent / 100))))
        upper = np.array([(at + 1) << _FINE], np.uint32).view(np.float32)[0]
        return min(float(upper), self.largest)

    def exponent_counts(self) -> dict[int, int]:
        """Of those that there are; -127 stands for float32's subnormals, without zeros."""
        counts = {int(e) + _LOWEST: int(n) for e, n in enumerate(self.exponents[:255]) if n}
        if counts.get(_LOWEST):
            counts[_LOWEST] -= self.zeros
        return {e: int(n) for e, n in counts.items() if n}

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "values": self.values,
            "zeros": self.zeros,
            "not_finite": self.not_finite,
            "lowest": self.low,
            "highest": self.high,
            "largest": self.largest,
            "percentiles": {f"{p:g}": self.percentile(p) for p in PERCENTILES},
            "exponents": self.exponent_counts(),
        }


class Channels:
    """Of each element of a row, over tokens: its largest magnitude, and where it stands out of its row."""

    def __init__(self) -> None:
        self.rows = 0
        self.largest = self.ratio = np.zeros(0)
        self.tokens = np.zeros(0, np.int64)

    def add(self, x: np.ndarray) -> None:
        if not self.rows:
            self.largest, self.ratio = np.zeros(x.shape[1]), np.zeros(x.shape[1])
            self.tokens = np.zeros(x.shape[1], np.int64)
        magnitudes = np.abs(x)
        magnitudes = magnitudes[np.isfinite(magnitudes).all(axis=1)]
        median = np.median(magnitudes, axis=1, keepdims=True)
        ratios = np.divide(magnitudes, median, out=np.zeros_like(magnitudes), where=median > 0)
        self.rows += len(x)
        self.largest = np.maximum(self.largest, magnitudes.max(axis=0, initial=0))
        self.ratio = np.maximum(self.ratio, ratios.max(axis=0, initial=0))
        self.tokens += np.count_nonzero(ratios > OUTLIER, axis=0)

    def as_dict(self) -> dict[str, Any]:
        """``outliers``: those of most tokens first, MOST_CHANNELS of ``n_outliers`` at most."""
        found = np.flatnonzero(self.tokens)
        first = found[np.lexsort((found, -self.ratio[found], -self.tokens[found]))][:MOST_CHANNELS]
        return {
            "n": len(self.tokens),
            "n_outliers": len(found),
            "outliers": [
                {
                    "channel": int(c),
                    "tokens": int(self.tokens[c]),
                    "times_median": float(self.ratio[c]),
                    "largest": float(self.largest[c]),
                }
                for c in first
            ],
        }


class Squares:
    """Of rows' sums of squares, in float64."""

    def __init__(self) -> None:
        self.smallest, self.largest = math.inf, 0.0
        self.exponents: dict[int, int] = {}

    def add(self, x: np.ndarray) -> None:
        sums = np.square(x, dtype=np.float64).sum(axis=1)
        sums = sums[np.isfinite(sums)]
        self.smallest = min(self.smallest, float(sums.min(initial=math.inf)))
        self.largest = max(self.largest, float(sums.max(initial=0)))
        found, counts = np.unique(np.frexp(sums[sums > 0])[1] - 1, return_counts=True)
        for e, n in zip(found.tolist(), counts.tolist(), strict=True):
            self.exponents[e] = self.exponents.get(e, 0) + n

    def as_dict(self) -> dict[str, Any]:
        smallest = self.smallest if math.isfinite(self.smallest) else None
        exponents = dict(sorted(self.exponents.items()))
        return {"smallest": smallest, "largest": self.largest, "exponents": exponents}


class SiteRanges:
    """One site: all tokens but each chunk's first, the first ones, channels, and what a norm sums."""

    def __init__(self, site: Site, rows_per_token: int) -> None:
        self.site, self._rows = site, rows_per_token
        self.rest, self.first = Range(), Range()
        self.channels = Channels()
        self.squares = (Squares(), Squares()) if site.point == "in" else None  # of the rest, of the first

    def add(self, x: np.ndarray, first: bool) -> None:
        n = self._rows * first
        for part, found, which in ((x[:n], self.first, 1), (x[n:], self.rest, 0)):
            if len(part):
                found.add(part)
                if self.squares:
                    self.squares[which].add(part)
        if len(x) > n:
            self.channels.add(x[n:])

    def as_dict(self) -> dict[str, Any]:
        largest = max(self.rest.largest, self.first.largest)
        data = {
            "site": str(self.site),
            "kind": self.site.place.kind,
            "layer": self.site.place.layer,
            "point": self.site.point,
            "rest": self.rest.as_dict(),
            "first": self.first.as_dict(),
            "channels": self.channels.as_dict(),
            "headroom_bits": headroom(largest),
        }
        if self.squares:
            data["sum_of_squares"] = dict(
                zip(("rest", "first"), (s.as_dict() for s in self.squares), strict=True)
            )
        return data


def headroom(largest: float) -> dict[str, float | None]:
    """By format that rounds element by element: log2 of its largest number over the largest value.

    Below 0 values are cut. None where all are 0.
    """
    return {
        entry["name"]: math.log2(entry["largest"] / largest) if largest > 0 else None
        for entry in describe_formats()
        if entry["block"] is None and entry["largest"]
    }


class Ranges:
    """One measurement; iterate over it to run it.

    ``for position in run: ...`` yields each chunk's position in the run as it ends; `result` is of the chunks
    that have ended. Raises what Observation raises.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        sites: Sequence[str],
        *,
        executor: Executor,
        settings: Settings,
    ) -> None:
        self._run = Observation(model, tokens, sites, self._see, executor=executor, settings=settings)
        self.model, self.settings, self.text = model, settings, self._run.text
        rows = {value.place: value.rows for value in model.values}
        self.sites = {site: SiteRanges(site, rows[site.place]) for site in self._run.sites}

    def _see(self, site: Site, x: np.ndarray, first: bool) -> None:
        self.sites[site].add(x, first)

    def __iter__(self) -> Iterator[int]:
        return iter(self._run)

    @property
    def done(self) -> int:
        return self._run.done

    def result(self) -> dict[str, Any]:
        """As written to JSON. Percentiles are of magnitudes; ``first`` is of each chunk's first token."""
        return {
            "model": self.model.path,
            "n_tokens": len(self.text.tokens),
            "n_ctx": self.settings.n_ctx,
            "n_chunks": self.done,
            "n_chunks_asked": self.text.n,
            "partial": self.done < self.text.n,
            "activations": self.settings.activations,
            "outlier_times_median": OUTLIER,
            **self.text.about(),
            "sites": [found.as_dict() for found in self.sites.values()],
        }
