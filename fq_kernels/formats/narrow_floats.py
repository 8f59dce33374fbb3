"""Floating-point formats of 19 bits and less, element by element.

The 8, 6 and 4 bit formats are rounded by ml_dtypes, imported at first use.
Sources: OCP OFP8 1.0 (fp8_e4m3fn, fp8_e5m2), OCP MX 1.0 (fp6, fp4), Noune et al. 2022 (fnuz).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .arrays import Floats, Mask, Rounded, Spacing
from .format import Family, Format


def float_step(x: Floats, m: int, emin: int) -> Floats:
    """Distance of the numbers around x that have m mantissa bits and exponents from emin up."""
    exponent = np.maximum(np.frexp(x)[1] - 1, emin)
    return np.ldexp(np.float32(1), exponent - m)


@dataclass(frozen=True)
class NarrowFloat:
    """A format with ``e`` exponent and ``m`` mantissa bits and a sign.

    dtype     its name in ml_dtypes
    largest   largest finite number
    overflow  smallest float32 that nearest-even would take beyond ``largest``, had the format
              no end there
    """

    dtype: str
    e: int
    m: int
    bias: int
    largest: float
    overflow: float
    has_nan: bool = True

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (1 - self.bias - self.m)

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        return int(np.frexp(self.largest)[1]) - 1

    def step(self, x: Floats) -> Floats:
        return float_step(x, self.m, 1 - self.bias)

    def quantise(self, x: Floats, saturate: bool = True) -> Rounded:
        """x (...) rounded to nearest even, in a new array.

        What overflows, infinities included, becomes the largest number of its sign, or without
        ``saturate`` what ml_dtypes makes of it. NaN stays NaN, whether or not the format has one.
        """
        if not saturate:
            return self._cast(x), None
        values = self._cast(np.clip(x, -self.largest, self.largest))
        if not self.has_nan:
            values[np.isnan(x)] = np.nan
        return values, self.overflows(x)

    def overflows(self, x: Floats) -> Mask:
        return np.abs(x) >= self.overflow

    def _cast(self, x: Floats) -> Floats:
        dtype, values = _codes(self.dtype)
        return values.take(x.astype(dtype).view(np.uint8))


@lru_cache
def _codes(dtype: str) -> tuple[Any, Floats]:
    """The type ``dtype`` of ml_dtypes and the numbers of its codes, (256,) float32."""
    import ml_dtypes

    found = getattr(ml_dtypes, dtype)
    return found, np.arange(256, dtype=np.uint8).view(found).astype(np.float32)


E4M3FN = NarrowFloat("float8_e4m3fn", 4, 3, 7, 448.0, float(np.nextafter(np.float32(464), np.float32(512))))
E5M2 = NarrowFloat("float8_e5m2", 5, 2, 15, 57344.0, 61440.0)
E4M3FNUZ = NarrowFloat("float8_e4m3fnuz", 4, 3, 8, 240.0, 248.0)
E5M2FNUZ = NarrowFloat("float8_e5m2fnuz", 5, 2, 16, 57344.0, 61440.0)
E2M3 = NarrowFloat("float6_e2m3fn", 2, 3, 1, 7.5, 7.75, has_nan=False)
E3M2 = NarrowFloat("float6_e3m2fn", 3, 2, 3, 28.0, 30.0, has_nan=False)
E2M1 = NarrowFloat("float4_e2m1fn", 2, 1, 1, 6.0, 7.0, has_nan=False)


def _family(name: str, spec: NarrowFloat, note: str, aliases: tuple[str, ...] = ()) -> Family:
    def quantise(x: Floats, fmt: Format) -> Rounded:
        return spec.quantise(x, saturate="no-saturate" not in fmt.settings)

    return Family(
        name,
        quantise,
        choices=(("saturate", "no-saturate"),) if spec.has_nan else (),
        bits=1 + spec.e + spec.m,
        largest=spec.largest,
        smallest_normal=spec.smallest_normal,
        smallest_subnormal=spec.smallest_subnormal,
        idempotent=True,
        aliases=aliases,
        needs="ml_dtypes",
        spacing=lambda x, fmt: Spacing(spec.step(x)),
        note=note,
    )


def _tf32(x: Floats, fmt: Format) -> Rounded:
    """float32 with the low 13 bits of its mantissa rounded away; a carry into the exponent is right."""
    u = x.view(np.uint32)
    if fmt.rounding == "nearest-even":
        u = u + (np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1)))
    values = (u & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), values, x), None


FAMILIES = (
    Family(
        "tf32",
        _tf32,
        roundings=("nearest-even", "truncate"),
        bits=19,
        largest=float(np.float32(2 - 2**-10) * np.float32(2.0**127)),
        smallest_normal=2.0**-126,
        smallest_subnormal=2.0**-136,
        idempotent=True,
        spacing=lambda x, fmt: Spacing(float_step(x, 10, -126)),
        note="NVIDIA TensorFloat-32: float32's exponent, 10 bits of mantissa; overflow to infinity",
    ),
    _family("fp8_e4m3fn", E4M3FN, "OCP OFP8 E4M3; no infinity: no-saturate makes NaN", ("fp8_e4m3",)),
    _family("fp8_e5m2", E5M2, "OCP OFP8 E5M2; no-saturate makes infinity"),
    _family("fp8_e4m3fnuz", E4M3FNUZ, "AMD MI300; no infinity and no -0: no-saturate makes NaN"),
    _family("fp8_e5m2fnuz", E5M2FNUZ, "AMD MI300; no infinity and no -0: no-saturate makes NaN"),
    _family("fp6_e2m3", E2M3, "OCP MX element; has neither infinity nor NaN, a NaN stays one here"),
    _family("fp6_e3m2", E3M2, "OCP MX element; has neither infinity nor NaN, a NaN stays one here"),
    _family("fp4_e2m1", E2M1, "OCP MX element; has neither infinity nor NaN, a NaN stays one here"),
)
