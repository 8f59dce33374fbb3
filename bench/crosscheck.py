"""Formats beside the package gfloat: how many formats, roundings and inputs are compared, and what differs.

Element formats in every rounding that gfloat has, saturating and not, on inputs of their range, around their
numbers and the middles between; MX formats by OCP's rule, on blocks. What differs and is no mistake is
named in docs/formats.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import gfloat
import numpy as np
from gfloat import Domain, FormatInfo, RoundMode, formats

from fq_kernels import get_format, reference, round_trip
from fq_kernels.formats.narrow_floats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3FN,
    E5M2,
    F16,
    NarrowFloat,
)

F32 = np.float32
# gfloat's own, and those that gfloat can be told of
NAMED = {
    "bf16": BF16, "f16": F16, "tf32": NarrowFloat(8, 10, 127, "ieee"), "fp8_e4m3fn": E4M3FN, "fp8_e5m2": E5M2,
    "fp8_e4m3fnuz": NarrowFloat(4, 3, 8, "fnuz"), "fp8_e5m2fnuz": NarrowFloat(5, 2, 16, "fnuz"),
    "fp8_e4m3_ieee": NarrowFloat(4, 3, 7, "ieee"), "fp8_e3m4": NarrowFloat(3, 4, 3, "ieee"),
    "fp8_e4m3b11fnuz": NarrowFloat(4, 3, 11, "fnuz"), "fp6_e2m3": E2M3, "fp6_e3m2": E3M2, "fp4_e2m1": E2M1,
}  # fmt: skip
OTHERS = [
    NarrowFloat(e, m, (1 << (e - 1)) - (codes != "fnuz"), codes)
    for codes in ("ieee", "fn", "fnuz", "finite")
    for e in range(2, 8)
    for m in (1, 2, 3, 5, 8, 12)
]
MODES = {
    "nearest-even": RoundMode.TiesToEven,
    "nearest-away": RoundMode.TiesToAway,
    "truncate": RoundMode.TowardZero,
    "up": RoundMode.TowardPositive,
    "down": RoundMode.TowardNegative,
    "stochastic": RoundMode.StochasticFastest,
}
MX = {
    "mxfp8_e4m3": formats.format_info_mxfp8_e4m3, "mxfp8_e5m2": formats.format_info_mxfp8_e5m2,
    "mxfp6_e2m3": formats.format_info_mxfp6_e2m3, "mxfp6_e3m2": formats.format_info_mxfp6_e3m2,
    "mxfp4": formats.format_info_mxfp4_e2m1, "mxint8": formats.format_info_mxint8,
}  # fmt: skip


class Compared(NamedTuple):
    what: str
    formats: int
    modes: int
    inputs: int
    differences: int


def info_of(spec: NarrowFloat) -> FormatInfo:
    """As gfloat describes it."""
    nans = {"ieee": 2**spec.m - 1, "fn": 1, "fnuz": 0, "finite": 0}[spec.codes]
    return FormatInfo(
        name=f"e{spec.e}m{spec.m}{spec.codes}",
        k=1 + spec.e + spec.m,
        precision=spec.m + 1,
        bias=spec.bias,
        has_nz=spec.codes != "fnuz",
        domain=Domain.Extended if spec.codes == "ieee" else Domain.Finite,
        num_high_nans=nans,
        has_subnormals=True,
        is_signed=True,
        is_twos_complement=False,
    )


def inputs(spec: NarrowFloat, n: int, rng: np.random.Generator) -> np.ndarray:
    """(about n,) float32 over the range and beyond, most of them numbers or middles, or next to one."""
    x = np.exp2(rng.uniform(max(spec.emin - spec.m - 4, -126), min(spec.emax + 3, 127.9), n))
    step = np.exp2(np.maximum(np.floor(np.log2(x)), spec.emin) - spec.m)
    near = np.rint(x / step * 2) / 2 * step
    with np.errstate(over="ignore"):
        x = np.where(rng.random(n) < 0.7, near, x).astype(F32)
        beside = np.nextafter(x, F32(np.inf) * rng.choice(F32([-1, 1]), n))
    x = np.where(rng.random(n) < 0.5, beside, x) * rng.choice(F32([-1, 1]), n)
    ends = np.array([0.0, -0.0, np.inf, -np.inf, spec.largest, -spec.largest], F32)
    return np.concatenate([x, ends, *([[np.nan]] if spec.has_nan else [])]).astype(F32)


def differences(got: np.ndarray, expected: np.ndarray) -> int:
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    return int(np.count_nonzero(~same))


def elements(named: dict[str, NarrowFloat], n: int, rng: np.random.Generator) -> Compared:
    """Each format in each rounding, saturating and not where it has the choice."""
    compared = differing = 0
    for name, spec in named.items():
        choices = [
            o for o in ("saturate", "no-saturate") if any(o in c for c in get_format(name).family.choices)
        ]
        for rounding, mode in MODES.items():
            for choice in choices or [""]:
                x = inputs(spec, n, rng)
                fmt = get_format(f"{name}:{rounding},{choice}")
                saturate = choice == "saturate" or spec.codes == "finite"
                drawn = reference.random_bits(0, 0, x.shape, 31).astype(np.int64)
                drawn = drawn if rounding == "stochastic" else None
                wide = gfloat.round_ndarray(info_of(spec), x.astype(np.float64), mode, saturate, drawn, 31)
                got = round_trip(x[np.newaxis], fmt)[0]
                if rounding == "stochastic":
                    # bf16's own rule draws 16 bits; of what is below 1/128 of the smallest number 31 count
                    kept = ~(np.abs(x) < spec.smallest_subnormal / 128) & (name != "bf16")
                    got, wide, x = got[kept], wide[kept], x[kept]
                compared += len(x)
                differing += differences(got, wide.astype(F32))
    return Compared("", len(named), len(MODES), compared, differing)


def blocks(n: int, rng: np.random.Generator) -> Compared:
    """Blocks with a scale of OCP's rule, none of zeros alone, of which gfloat takes the logarithm."""
    compared = differing = 0
    for name, info in MX.items():
        x = rng.standard_normal((n, 32)) * np.exp2(rng.integers(-100, 100, (n, 1)))
        x[rng.random(x.shape) < 0.1] = 0
        x = np.where(rng.random((n, 1)) < 0.5, x, np.rint(x * 8) / 8).astype(F32)
        x = x[np.abs(x).max(axis=1) > 0]

        def scale(emax: float, vals: np.ndarray) -> float:
            return float(np.exp2(np.floor(np.log2(np.max(np.abs(vals)))) - emax))

        with np.errstate(all="ignore"):
            expected = np.array([gfloat.quantize_block(info, row.astype(np.float64), scale) for row in x])
        got = round_trip(x, name)
        kept = np.ones(x.shape, np.bool_)
        if name == "mxint8":  # -2, which is left unused so that the range is symmetric
            kept = expected != -2 * np.exp2(np.floor(np.log2(np.abs(x).max(axis=1, keepdims=True))))
        compared += int(kept.sum())
        differing += differences(got[kept] + F32(0), expected[kept].astype(F32) + F32(0))
    return Compared("MX, blocks of 32", len(MX), 1, compared, differing)


def measure(n: int, seed: int) -> Iterator[Compared]:
    rng = np.random.default_rng(seed)
    yield elements(NAMED, n, rng)._replace(what="element formats by name")
    others = {f"e{s.e}m{s.m}{s.codes}": s for s in OTHERS}
    yield elements(others, n // 10, rng)._replace(what="eXmY, usual bias")
    yield blocks(max(1, n // 50), rng)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.crosscheck", description=__doc__)
    parser.add_argument(
        "-n", type=int, default=100_000, metavar="N", help="inputs of a format (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    from importlib.metadata import version

    print(f"gfloat {version('gfloat')}\n")
    print("| | formats | roundings | inputs compared | differences |")
    print("| --- | --: | --: | --: | --: |")
    worst = 0
    for row in measure(args.n, args.seed):
        print(f"| {row.what} | {row.formats} | {row.modes} | {row.inputs} | {row.differences} |", flush=True)
        worst = max(worst, row.differences)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
