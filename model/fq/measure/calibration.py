"""Static scales: of each site the magnitude that the largest code is to stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from fq_kernels import Executor, Format, get_format, round_trip
from fq_kernels.rules import Site
from fq_kernels.rules.calibration import KIND, VERSION

from ..errors import FqError
from ..machine import available_memory
from ..run.model import Model
from .chunks import Settings
from .observation import Observation

LARGEST, PERCENTILE, MSE = "largest", "percentile", "mse"
PER = ("tensor", "channel")
# of the largest magnitude: what the largest code stands for where the squared error is looked at
_PARTS = np.linspace(0.02, 1, 50, dtype=np.float32)


@dataclass(frozen=True)
class Method:
    """How a range is chosen.

    kind     "largest"; "percentile": of the magnitudes; "mse": the least squared error
    percent  of "percentile", 50 to 100
    format   of "mse": the format whose error it is
    """

    kind: str = LARGEST
    percent: float = 100.0
    format: Format | None = None

    @classmethod
    def parse(cls, text: str) -> Method:
        """``largest``, ``percentile=99.9`` or ``mse=int8``. Raises FqError naming what is wrong."""
        kind, equals, value = text.partition("=")
        if kind == LARGEST and not equals:
            return cls()
        if kind == PERCENTILE and equals:
            try:
                percent = float(value)
            except ValueError:
                percent = math.nan
            if not 50 <= percent <= 100:
                raise FqError(f"a percentile must be from 50 to 100, not {value}")
            return cls(PERCENTILE, percent)
        if kind == MSE and equals:
            try:
                fmt = get_format(value)
            except ValueError as e:
                raise FqError(str(e)) from None
            if fmt.family.static_top is None or fmt.family.noise or str(fmt) != fmt.name:
                raise FqError(f"format {value} takes no static scale, or not beside its options")
            return cls(MSE, format=fmt)
        raise FqError(f"the method must be largest, percentile=P or mse=FORMAT, not {text!r}")

    def above(self, n: int) -> int:
        """How many of n magnitudes may be above the percentile: of 99.9 exactly a thousandth."""
        return math.floor(n * (100 - Fraction(str(self.percent))) / 100)

    def __str__(self) -> str:
        if self.kind == PERCENTILE:
            return f"percentile={self.percent:g}"
        return f"mse={self.format}" if self.kind == MSE else self.kind


@dataclass
class _Range:
    """What one site has shown: magnitudes are kept from the largest down, as many as the method needs."""

    tops: np.ndarray | None = None  # (k, n) or (k, 1)
    errors: np.ndarray | None = None  # (parts, n) or (parts, 1)
    values: int = 0  # of each scale


class Calibrating:
    """One calibration; iterate over it to run it: once over the chunks, twice for the least squared error.

    per  "tensor": a site has one scale; "channel": one for each element of a row

    ``for position in run: ...`` yields positions, 0 to ``n_steps`` - 1; `result` is there at the end.
    Raises FqError, also for a site where a value is not finite.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        sites: Sequence[str],
        *,
        method: Method,
        per: str,
        executor: Executor,
        settings: Settings,
    ) -> None:
        if per not in PER:
            raise FqError(f"scales are per {' or '.join(PER)}, not per {per}")
        if per == "channel" and method.format is not None and not method.format.family.static_channels:
            raise FqError(
                f"format {method.format} has one static scale for a tensor, not one for each channel"
            )
        self.method, self.per = method, per

        def observing(see: Callable[[Site, np.ndarray, bool], None]) -> Observation:
            return Observation(model, tokens, sites, see, executor=executor, settings=settings)

        self._passes = [observing(self._look)] + [observing(self._try)] * (method.kind == MSE)
        self.text = self._passes[0].text
        self.model, self.settings = model, settings
        self._ranges = {site: _Range() for site in self._passes[0].sites}
        self._rows = {value.place: value.rows for value in model.values}
        widths = {value.place: value.width for value in model.values}
        kept = sum(
            4 * self._kept(site, widths[site.place]) * self._scales(widths[site.place])
            for site in self._ranges
        )
        free = available_memory()
        if free is not None and 2 * kept > free:  # once beside what is put to it
            raise FqError(
                f"{method}: magnitudes above it take {2 * kept / 1e9:.3g} GB of {self.text.n} chunks, "
                f"{free / 1e9:.3g} are free: fewer --chunks or sites, or a higher percentile"
            )

    def _scales(self, width: int) -> int:
        """How many a site of this width has."""
        return 1 if self.per == "tensor" else width

    def _kept(self, site: Site, width: int) -> int:
        """How many magnitudes each of its scales needs: as many as can be above the percentile, and one."""
        rows = self.text.n * (self.settings.n_ctx - 1) * self._rows[site.place]
        return 1 + self.method.above(rows * width // self._scales(width))

    @property
    def n_steps(self) -> int:
        return self.text.n * len(self._passes)

    def __iter__(self) -> Iterator[int]:
        step = 0
        for each in self._passes:
            for _ in each:
                yield step
                step += 1

    def _look(self, site: Site, x: np.ndarray, _first: bool) -> None:
        found = self._ranges[site]
        magnitudes = np.abs(x)
        if not np.isfinite(magnitudes.max(initial=0)):
            raise FqError(f"{site}: a value is not finite")
        kept = self._kept(site, x.shape[1])
        if self.per == "tensor":
            magnitudes = magnitudes.reshape(-1, 1)
        found.values += len(magnitudes)
        all_of_it = magnitudes if found.tops is None else np.concatenate([found.tops, magnitudes])
        if len(all_of_it) > kept:
            all_of_it = np.partition(all_of_it, len(all_of_it) - kept, axis=0)[-kept:]
        found.tops = all_of_it

    def _try(self, site: Site, x: np.ndarray, _first: bool) -> None:
        found, fmt = self._ranges[site], self.method.format
        assert found.tops is not None and fmt is not None
        largest = found.tops.max(axis=0)
        if found.errors is None:
            found.errors = np.zeros((len(_PARTS), len(largest)))
        for i, part in enumerate(_PARTS):
            y = round_trip(x, _with_range(fmt, largest * part))
            errors = np.subtract(y, x, dtype=np.float64)
            np.square(errors, out=errors)
            found.errors[i] += errors.sum() if self.per == "tensor" else errors.sum(axis=0)

    def _range(self, found: _Range) -> np.ndarray:
        """(1,) or (n,)."""
        assert found.tops is not None
        tops = np.sort(found.tops, axis=0)[::-1]
        if self.method.kind == MSE:
            assert found.errors is not None
            # the larger of two equals
            best = len(_PARTS) - 1 - found.errors[::-1].argmin(axis=0)
            return np.asarray(tops[0] * _PARTS[best], np.float32)
        if self.method.kind == PERCENTILE:
            # of N magnitudes in order, the one that this part of them does not exceed
            return np.asarray(tops[min(self.method.above(found.values), len(tops) - 1)], np.float32)
        return np.asarray(tops[0], np.float32)

    def result(self, text: str, text_sha256: str, model_sha256: str) -> dict[str, Any]:
        """What a file of static scales holds (fq_kernels.rules.calibration)."""
        smallest = np.finfo(np.float32).smallest_normal
        ranges = {
            str(site): np.maximum(self._range(found), smallest).tolist()
            for site, found in self._ranges.items()
        }
        return {
            "kind": KIND,
            "version": VERSION,
            "model": {"file": self.model.path, "sha256": model_sha256},
            "text": {"name": text, "sha256": text_sha256},
            "n_ctx": self.settings.n_ctx,
            "chunks": list(self.text.indices),
            "method": str(self.method),
            "per": self.per,
            "format": None if self.method.format is None else self.method.format.name,
            "sites": {
                site: values if self.per == "channel" else values[0] for site, values in ranges.items()
            },
        }


def _with_range(fmt: Format, ranges: np.ndarray) -> Format:
    """Under the scale, or scales, of a range."""
    return get_format(f"{fmt.name}:scale=1").with_ranges(ranges.astype(np.float32))
