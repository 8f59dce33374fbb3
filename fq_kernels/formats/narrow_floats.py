"""Floating-point formats of 19 bits and less, element by element: what src/rounding/narrow.h rounds to.

Sources: OCP OFP8 1.0 (fp8_e4m3fn, fp8_e5m2), OCP MX 1.0 (fp6, fp4), Noune et al. 2022 (fnuz), IEEE 754
(ieee; f16), ml_dtypes (e3m4, e4m3b11fnuz).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from .arrays import Floats, Mask, Rounded, Spacing
from .blocks import (
    SMALLEST_NORMAL,
    below_largest,
    largest_magnitude,
    out_of_blocks,
    spacing_out_of_blocks,
    under_one_scale,
    within_float,
)
from .format import DITHER, NEAREST_EVEN, UNSCALED, Family, Format, chooses
from .kernels import BLOCKS, BY_OTHERS, BY_TENSOR, NARROW, NEVER, SCALED, BlockRule, Kernel, NarrowRule

# Rounding -> its number in C; order shared with src/rounding/narrow.h.
ROUNDINGS = (NEAREST_EVEN, "nearest-away", "truncate", "up", "down", "odd", "stochastic")

_NAN = 0x7FC00000
_INFINITY = 0x7F800000
_ALL_BITS = 31  # of a random number, as many as C looks at

SATURATE = ("saturate", "no-saturate")
SUBNORMALS = ("subnormals", "flush-subnormals")
RANDOM_BITS = ("all-bits", "random-bits=")


def _bits(value: float) -> int:
    """Those of float32; infinity's for what is beyond it."""
    return _INFINITY if value >= 2.0**128 else int(np.float32(value).view(np.uint32))


@dataclass(frozen=True)
class NarrowFloat:
    """A format with a sign, ``e`` exponent and ``m`` mantissa bits.

    codes  what the codes stand for that are not needed for numbers: "ieee", those of the highest exponent are
           infinities and NaN; "fn", that of all ones is NaN; "fnuz", that of -0 is NaN; "finite", none is
    """

    e: int
    m: int
    bias: int
    codes: str

    @property
    def has_infinity(self) -> bool:
        return self.codes == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.codes != "finite"

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        return (1 << self.e) - 1 - (self.codes == "ieee") - self.bias

    @property
    def largest(self) -> float:
        return 2.0**self.emax * (2 - 2.0**-self.m * (1 + (self.codes == "fn")))

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (self.emin - self.m)

    def step(self, x: Floats) -> Floats:
        """Distance of the numbers around x, as if the range had no end."""
        exponent = np.maximum(np.frexp(x)[1] - 1, self.emin)
        steps: Floats = np.ldexp(np.float32(1), exponent - self.m)
        return steps

    def scale(self, largest: Floats) -> Floats:
        """That under which the largest magnitude becomes the largest number."""
        scales: Floats = np.maximum(largest / np.float32(self.largest), SMALLEST_NORMAL)
        return scales

    def count_from(self, rounding: str) -> float:
        """The smallest magnitude that counts as beyond the range: for nearest roundings the first that would
        be rounded to a number beyond, for others that number."""
        step = 2.0 ** (self.emax - self.m)
        if rounding == "nearest-away" or (rounding == NEAREST_EVEN and self.codes != "fn"):
            return self.largest + step / 2
        if rounding == NEAREST_EVEN:  # the largest number's last bit is even
            return float(np.nextafter(np.float32(self.largest + step / 2), np.float32(np.inf)))
        return self.largest + step

    def rule(
        self, rounding: str, *, saturate: bool = True, flush: bool = False, random_bits: int = _ALL_BITS
    ) -> NarrowRule:
        """What C needs. Without ``saturate`` what overflows becomes infinity, or NaN where there is none."""
        own = self.e == 8  # float32's exponents
        largest = _bits(self.largest)
        beyond = largest if saturate or not self.has_nan else _INFINITY if self.has_infinity else _NAN
        return NarrowRule(
            ROUNDINGS.index(rounding),
            23 - self.m,
            0 if own else 127 + self.emin,
            0 if own else _bits(self.smallest_subnormal),
            _bits(self.smallest_normal) if flush else 0,
            largest,
            beyond,
            int(self.codes == "fnuz"),
            random_bits,
            _bits(self.count_from(rounding)) if beyond == largest else NEVER,
        )

    def quantise(self, x: Floats) -> Rounded:
        """x (..., n) rounded to nearest even and saturated, in a new array."""
        from .._kernels import round_trip  # which imports this package

        return round_trip(x, f"e{self.e}m{self.m}{self.codes}b{self.bias}"), self.overflows(x)

    def overflows(self, x: Floats, rounding: str = NEAREST_EVEN) -> Mask:
        return np.abs(x) >= np.array(_bits(self.count_from(rounding)), np.uint32).view(np.float32)


E4M3FN = NarrowFloat(4, 3, 7, "fn")
E5M2 = NarrowFloat(5, 2, 15, "ieee")
E2M3 = NarrowFloat(2, 3, 1, "finite")
E3M2 = NarrowFloat(3, 2, 3, "finite")
E2M1 = NarrowFloat(2, 1, 1, "finite")
F16 = NarrowFloat(5, 10, 15, "ieee")
BF16 = NarrowFloat(8, 7, 127, "ieee")


def _by_kernel(x: Floats, fmt: Format) -> Rounded:
    from .._kernels import round_trip  # which imports this package

    return round_trip(x, fmt), None


def _check(fmt: Format) -> None:
    fmt.check_static_scale()
    others = [o for o in fmt.options if not chooses(o, UNSCALED) and o != DITHER]
    if fmt.rounding != NEAREST_EVEN:
        others.insert(0, fmt.rounding)
    if fmt.has_own_scale and others:
        raise ValueError(f"a scale of format {fmt.name} does not go with option {others[0]}")
    n = fmt.number("random-bits")
    if n and fmt.rounding != "stochastic":
        raise ValueError(f"option random-bits={n} of format {fmt.name} needs stochastic rounding")
    if n > _ALL_BITS:
        raise ValueError(f"random-bits of format {fmt.name} must be at most {_ALL_BITS}, not {n}")


def _family(
    name: str, spec: NarrowFloat, quantise: Callable[[Floats, Format], Rounded], **own: Any
) -> Family:
    def spacing(x: Floats, fmt: Format) -> Spacing:
        if fmt.static_scale:
            scales = fmt.scales_for(x.shape[1])
            return Spacing(spec.step(x / scales) * scales)
        if fmt.has_own_scale:
            blocks = under_one_scale(x, fmt)
            largest = largest_magnitude(blocks)
            scale = spec.scale(largest)
            step = spec.step(blocks / scale) * scale
            return spacing_out_of_blocks(below_largest(blocks, largest, step), *x.shape)
        return Spacing(spec.step(x))

    def bits_per_value(fmt: Format) -> float:
        group = fmt.number("group")
        return 1 + spec.e + spec.m + (32 / group if group else 0)

    return Family(
        name,
        quantise,
        check=_check,
        bits=bits_per_value,
        largest=spec.largest,
        smallest_normal=spec.smallest_normal,
        smallest_subnormal=spec.smallest_subnormal,
        idempotent=True,
        spacing=spacing,
        **own,
    )


def to_infinity_family(
    name: str, spec: NarrowFloat, note: str, rules: Mapping[str, int] = MappingProxyType({})
) -> Family:
    """What overflows becomes infinity. rules: numbers of those roundings that have a C rule of their own."""

    def kernel(fmt: Format) -> Kernel:
        bits = fmt.number("random-bits")
        if fmt.rounding in rules and not bits:
            return Kernel(rules[fmt.rounding])
        return Kernel(NARROW, spec.rule(fmt.rounding, saturate=False, random_bits=bits or _ALL_BITS))

    return _family(
        name,
        spec,
        _by_kernel,
        roundings=(*rules, *(rounding for rounding in ROUNDINGS if rounding not in rules)),
        kernel=kernel,
        choices=(RANDOM_BITS,),
        note=note,
    )


def narrow_family(name: str, spec: NarrowFloat, note: str, aliases: tuple[str, ...] = ()) -> Family:
    """Saturating by default, as fp8 is used."""

    def quantise(x: Floats, fmt: Format) -> Rounded:
        if fmt.static_scale:
            scales = fmt.scales_for(x.shape[1])
            elements = x / scales
            values, clipped = spec.quantise(elements)
            values *= scales
            return within_float(values), clipped
        if fmt.has_own_scale:
            blocks = under_one_scale(x, fmt)
            scale = spec.scale(largest_magnitude(blocks))
            values, _ = spec.quantise(blocks / scale)
            values *= scale
            return out_of_blocks(within_float(values), *x.shape), None
        values, _ = _by_kernel(x, fmt)
        return values, spec.overflows(x, fmt.rounding) if "no-saturate" not in fmt.settings else None

    def kernel(fmt: Format) -> Kernel:
        settings = fmt.settings
        saturate, flush = "no-saturate" not in settings, "flush-subnormals" in settings
        bits = fmt.number("random-bits") or _ALL_BITS
        rule = spec.rule(fmt.rounding, saturate=saturate, flush=flush, random_bits=bits)
        if fmt.scales:
            blocks = BlockRule(SCALED, top=spec.largest, given=BY_OTHERS, scales=fmt.static_scales)
            return Kernel(BLOCKS, rule, blocks)
        if fmt.has_own_scale:
            return Kernel(BLOCKS, rule, BlockRule(SCALED, size=fmt.number("group"), top=spec.largest))
        return Kernel(NARROW, rule)

    def tensor_kernel(fmt: Format, lowest: np.float32, highest: np.float32) -> Kernel:
        scale = spec.scale(largest_magnitude(np.array([[lowest, highest]], np.float32)))
        blocks = BlockRule(SCALED, top=spec.largest, given=BY_TENSOR, scale=scale.item())
        return Kernel(BLOCKS, spec.rule(NEAREST_EVEN), blocks)

    # with float32's own exponents most scales would be below its normal numbers
    choices = (SUBNORMALS, RANDOM_BITS) if spec.e == 8 else (SUBNORMALS, RANDOM_BITS, UNSCALED)
    return _family(
        name,
        spec,
        quantise,
        roundings=ROUNDINGS,
        kernel=kernel,
        tensor_kernel=tensor_kernel,
        choices=(SATURATE, *choices) if spec.has_nan else choices,
        static_top=spec.largest,
        aliases=aliases,
        note=note,
    )


FAMILIES = (
    to_infinity_family(
        "tf32",
        NarrowFloat(8, 10, 127, "ieee"),
        "NVIDIA TensorFloat-32: float32's exponent, 10 bits of mantissa; overflow to infinity",
    ),
    narrow_family("fp8_e4m3fn", E4M3FN, "OCP OFP8 E4M3; no infinity: no-saturate makes NaN", ("fp8_e4m3",)),
    narrow_family("fp8_e5m2", E5M2, "OCP OFP8 E5M2; no-saturate makes infinity"),
    narrow_family(
        "fp8_e4m3fnuz",
        NarrowFloat(4, 3, 8, "fnuz"),
        "AMD MI300; no infinity and no -0: no-saturate makes NaN",
    ),
    narrow_family(
        "fp8_e5m2fnuz",
        NarrowFloat(5, 2, 16, "fnuz"),
        "AMD MI300; no infinity and no -0: no-saturate makes NaN",
    ),
    narrow_family(
        "fp8_e4m3_ieee",
        NarrowFloat(4, 3, 7, "ieee"),
        "E4M3 as IEEE 754 would have it; no-saturate makes infinity",
    ),
    narrow_family(
        "fp8_e3m4", NarrowFloat(3, 4, 3, "ieee"), "as IEEE 754 would have it; no-saturate makes infinity"
    ),
    narrow_family(
        "fp8_e4m3b11fnuz",
        NarrowFloat(4, 3, 11, "fnuz"),
        "bias 11; no infinity and no -0: no-saturate makes NaN",
    ),
    narrow_family("fp6_e2m3", E2M3, "OCP MX element; has neither infinity nor NaN, a NaN stays one here"),
    narrow_family("fp6_e3m2", E3M2, "OCP MX element; has neither infinity nor NaN, a NaN stays one here"),
    narrow_family("fp4_e2m1", E2M1, "OCP MX element; has neither infinity nor NaN, a NaN stays one here"),
)


# ---------------------------------------------------------------- eXmY

_NAME = re.compile(r"e([1-8])m([1-9]|1[0-9]|2[0-2])(ieee|fn|fnuz|finite)?(?:b([0-9]{1,3}))?")


@lru_cache
def family_of(name: str) -> Family | None:
    """The family of a name such as e4m3, e3m4fn, e5m7finite or e4m3fnuzb11; None for another.

    After the bits: what the highest codes stand for (NarrowFloat.codes; ieee if it is left out), b and the
    bias (2^(e-1) - 1, one more for fnuz). Raises ValueError for one whose numbers float32 has not.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    e, m, codes = int(match[1]), int(match[2]), match[3] or "ieee"
    usual = (1 << (e - 1)) - (codes != "fnuz")
    bias = usual if match[4] is None else int(match[4])
    spec = NarrowFloat(e, m, bias, codes)
    if e == 8:
        if (bias, codes) != (127, "ieee"):
            raise ValueError(f"format {name}: with 8 bits of exponent it must be IEEE's, with a bias of 127")
    elif (1 << e) - (codes == "ieee") < 2:
        raise ValueError(f"format {name} has no normal numbers")
    elif not 26 + m <= 127 + spec.emin or spec.emax > 126:
        raise ValueError(
            f"format {name}: its numbers, from {spec.smallest_subnormal:.3g} to {spec.largest:.3g}, must be "
            "within 2^-100 to 2^127"
        )
    return narrow_family(name, spec, f"{e} bits of exponent, {m} of mantissa, bias {bias}, {codes}")
