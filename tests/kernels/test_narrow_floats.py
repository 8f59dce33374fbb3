"""Narrow floats of any shape: the kernel against its reference, that against gfloat and against tables."""

from __future__ import annotations

import gfloat
import numpy as np
import pytest
from gfloat import Domain, FormatInfo, RoundMode
from hypothesis import example, given
from hypothesis import strategies as st
from number_tables import FLOATS
from strategies import assert_same_bits, every_isa, float_arrays, seeds

from fq_kernels import Executor, Format, format_names, get_format, reference, round_trip
from fq_kernels._kernels import N_STATS
from fq_kernels.formats.kernels import NARROW
from fq_kernels.formats.narrow_floats import ROUNDINGS, NarrowFloat
from fq_kernels.rules import RowStat

F32 = np.float32
# those without a rule of their own, which test_rounding.py looks at
NAMED = [name for name in format_names() if get_format(name).kernel.quant == NARROW]
NAMES = sorted({name.split(":")[0] for name in NAMED})
DETERMINISTIC = ROUNDINGS[:-1]
MODES = {
    "nearest-even": RoundMode.TiesToEven,
    "nearest-away": RoundMode.TiesToAway,
    "truncate": RoundMode.TowardZero,
    "up": RoundMode.TowardPositive,
    "down": RoundMode.TowardNegative,
    "stochastic": RoundMode.StochasticFastest,
}


@st.composite
def specs(draw, roundings=ROUNDINGS) -> str:
    """A name and its options: any bits, bias and codes, any rounding."""
    e, m = draw(st.integers(1, 8)), draw(st.integers(1, 22))
    codes = "ieee" if e == 8 else draw(st.sampled_from(["ieee", "fn", "fnuz", "finite"]))
    usual = (1 << (e - 1)) - (codes != "fnuz")
    bias = usual if e == 8 else draw(st.integers(0, 102 - m) | st.just(usual))
    name = f"e{e}m{m}{codes}" + f"b{bias}" * (bias != usual)
    options = [draw(st.sampled_from(roundings))]
    if codes != "finite" and draw(st.booleans()):
        options.append("no-saturate")
    if draw(st.booleans()):
        options.append("flush-subnormals")
    if options[0] == "stochastic" and draw(st.booleans()):
        options.append(f"random-bits={draw(st.integers(1, 31))}")
    return f"{name}:{','.join(options)}"


def parsed(spec: str) -> Format | None:
    """None for one without normal numbers, or beyond float32."""
    try:
        return get_format(spec)
    except ValueError as e:
        assert "has no normal numbers" in str(e) or "must be within" in str(e)
        return None


def number_of(fmt: Format) -> NarrowFloat:
    """By its largest and smallest numbers alone: what the format says of itself."""
    import re

    match = re.fullmatch(r"e(\d)m(\d+)(ieee|fn|fnuz|finite)(?:b(\d+))?", fmt.name)
    assert match is not None
    e, codes = int(match[1]), match[3]
    usual = (1 << (e - 1)) - (codes != "fnuz")
    return NarrowFloat(e, int(match[2]), usual if match[4] is None else int(match[4]), codes)


def probes(fmt: Format, seed: int, n: int = 400) -> np.ndarray:
    """(n + some,) float32: of the format's range and around it, near its numbers and the middles between."""
    rng = np.random.default_rng(seed)
    assert fmt.largest is not None and fmt.smallest_normal is not None
    low = np.log2(fmt.smallest_normal) - 24
    x = np.exp2(rng.uniform(max(low, -149), min(np.log2(fmt.largest) + 3, 127.99), n))
    spec = number_of(fmt)
    step = np.exp2(np.maximum(np.floor(np.log2(x)), spec.emin) - spec.m)
    near = np.where(rng.random(n) < 0.7, np.rint(x / step * 2) / 2 * step, x)
    with np.errstate(over="ignore"):
        x = near.astype(F32)
    x = np.nextafter(x, rng.choice([x, np.full(n, np.inf, F32), np.zeros(n, F32)])).astype(F32)
    ends = [0, np.inf, np.nan, fmt.largest, fmt.smallest_normal, 1e-45, 1.5e-45, 3e38, 1]
    return np.concatenate([x, np.array(ends, F32)]) * rng.choice([F32(1), F32(-1)], n + len(ends))


# ---------------------------------------------------------------- the kernel and its reference


@given(spec=specs(), seed=seeds)
@example(spec="e8m7ieee:odd,no-saturate", seed=0)
@example(spec="e5m10ieee:up,no-saturate", seed=0)
def test_the_kernel_equals_the_reference(isa, spec, seed):
    fmt = parsed(spec)
    if fmt is None:
        return
    x = probes(fmt, seed)
    fmt = fmt.with_seed(seed % 2**64) if fmt.seeded else fmt
    assert fmt.kernel.narrow is not None
    assert_same_bits(round_trip(x, fmt), reference.round_trip(x, fmt))


@pytest.mark.parametrize("fmt", NAMED)
def test_named_formats_equal_the_reference(isa, fmt):
    """Every exponent with mantissas where roundings part ways, of both signs."""
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    upper = np.arange(0, 2**16, 7, dtype=np.uint32) << 16
    x = (upper[:, np.newaxis] | np.array(lower, np.uint32)).view(F32)
    assert_same_bits(round_trip(x, fmt), reference.round_trip(x, fmt))


@pytest.mark.threads
@pytest.mark.parametrize("fmt", NAMED)
def test_threads_change_nothing(isa, fmt):
    x = (np.arange(0, 2**16, 7, dtype=np.uint32) << 16).view(F32).reshape(-1, 1).repeat(3, axis=1)
    with Executor(2) as executor:
        assert_same_bits(round_trip(x, fmt, executor=executor), round_trip(x, fmt))


# ---------------------------------------------------------------- gfloat


def gfloat_of(spec: NarrowFloat) -> FormatInfo:
    nans = {"ieee": 2**spec.m - 1, "fn": 1, "finite": 0, "fnuz": 0}[spec.codes]
    return FormatInfo(
        "",
        k=1 + spec.e + spec.m,
        precision=spec.m + 1,
        bias=spec.bias,
        is_signed=True,
        domain=Domain.Extended if spec.has_infinity else Domain.Finite,
        has_nz=spec.codes != "fnuz",
        num_high_nans=nans,
        has_subnormals=True,
        is_twos_complement=False,
    )


@given(spec=specs([*MODES]), seed=seeds)
def test_the_reference_equals_gfloat(spec, seed):
    fmt = parsed(spec.replace(",flush-subnormals", ""))
    if fmt is None:
        return
    number = number_of(fmt)
    x = probes(fmt, seed, 200)
    saturate = "no-saturate" not in fmt.options
    if not number.has_nan:
        x = x[~np.isnan(x)]
    n_bits, drawn = fmt.number("random-bits") or 31, None
    if fmt.rounding == "stochastic":
        drawn = reference.random_bits(0, 0, x.shape, n_bits).astype(np.int64)
    expected = gfloat.round_ndarray(
        gfloat_of(number), x.astype(np.float64), MODES[fmt.rounding], saturate, drawn, n_bits
    )
    got = reference.round_trip(x, fmt)
    if fmt.rounding == "stochastic":  # of so small a number more than 31 bits fall away
        kept = ~(np.abs(x) < number.smallest_subnormal / 128)
        got, expected = got[kept], expected[kept]
    assert_same_bits(got, expected.astype(F32))
    assert fmt.largest == gfloat_of(number).max


# ---------------------------------------------------------------- tables and counters


@pytest.mark.parametrize("rounding", ["up", "down", "truncate", "odd"])
@pytest.mark.parametrize("name", FLOATS)
def test_directed_roundings_take_the_neighbour_that_they_say(name, rounding):
    numbers = np.array([float(v) for v in FLOATS[name].numbers], F32)
    below, above = numbers[:-1], numbers[1:]
    odd_above = np.arange(1, len(numbers)) % 2 == 1
    third = (below + (above - below) / 3).astype(F32)
    for x, sign in ((third, 1), (-third, -1)):
        towards_zero = {"up": sign < 0, "down": sign > 0, "truncate": True, "odd": ~odd_above}[rounding]
        expected = np.where(towards_zero, below, above) * F32(sign)
        assert np.array_equal(round_trip(x, f"{name}:{rounding}"), expected)
    assert np.array_equal(round_trip(numbers, f"{name}:{rounding}"), numbers)


@pytest.mark.parametrize("bits", [1, 3, 31])
def test_stochastic_rounding_is_as_fair_as_its_bits(bits):
    """0.3 of a step up: in 31 bits three times of ten, in 3 bits two of eight, in 1 bit never."""
    x = np.full(200_000, 1 + 0.3 / 8, F32)
    y = round_trip(x, f"fp8_e4m3fn:stochastic,random-bits={bits}")
    assert set(np.unique(y)) <= {1.0, 1.125}
    share = {1: 0.0, 3: 0.25, 31: 0.3}[bits]
    assert abs((y > 1).mean() - share) <= (5e-3 if share else 0)


@pytest.mark.parametrize("name", NAMES)
def test_counted_and_cut_alike(isa, name):
    """The kernel's counter of elements out of range is the mask of the function."""
    fmt = get_format(name)
    largest = float(fmt.largest or 0)
    row = np.array([largest, -largest, 1, 0, np.nan, np.inf, -np.inf], F32)
    with np.errstate(over="ignore"):
        more = np.concatenate(
            [np.nextafter(row, F32(np.inf)), row * F32(1.01), row * F32(1.04), row * F32(1.3)]
        )
    x = np.concatenate([row, more])[np.newaxis].astype(F32)
    for rounding in DETERMINISTIC:
        fmt = get_format(f"{name}:{rounding}")
        stats = np.zeros((1, N_STATS))
        round_trip(x, fmt, row_stats=stats)
        clipped = fmt.quantise(x).clipped
        assert stats[0, RowStat.OUT_OF_RANGE] == (0 if clipped is None else clipped.sum()), rounding


@given(x=float_arrays())
@pytest.mark.parametrize("name", [*NAMES, "f16", "bf16", "tf32"])
def test_subnormals_are_counted(name, x):
    fmt = get_format(name)
    for isa in every_isa():
        stats = np.zeros((x.size // x.shape[-1], N_STATS))
        result = np.abs(round_trip(x, fmt, row_stats=stats)).reshape(len(stats), -1)
        small = (result > 0) & (result < fmt.smallest_normal)
        assert np.array_equal(stats[:, RowStat.SUBNORMAL], small.sum(axis=1)), isa


def test_names_and_options():
    assert get_format("e4m3fn").largest == 448 and get_format("e4m3").largest == 240
    assert get_format("E5M10").smallest_subnormal == 2.0**-24
    assert get_format("e4m3fnuzb11").largest == 30 == get_format("fp8_e4m3b11fnuz").largest
    assert get_format("fp8_e3m4").largest == 15.5
    assert get_format("fp8_e5m2:flush-subnormals").smallest_subnormal is None
    assert str(get_format("fp8_e5m2:random-bits=8,stochastic")) == "fp8_e5m2:stochastic,random-bits=8,seed=0"
    x = np.linspace(-70000, 70000, 1001).astype(F32)
    assert_same_bits(round_trip(x, "e5m10:no-saturate"), round_trip(x, "f16"))
    assert_same_bits(round_trip(x, "e8m7:no-saturate"), round_trip(x, "bf16"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("e8m3fn", "with 8 bits of exponent it must be IEEE's"),
        ("e8m3b100", "with 8 bits of exponent it must be IEEE's"),
        ("e1m3", "e1m3 has no normal numbers"),
        ("e5m22b81", "must be within"),
        ("e7m3fnb0", "must be within"),
        ("e0m3", "unknown format 'e0m3'; there are .*and eXmY"),
        ("e5m23", "unknown format"),
        ("fp8_e5m2:random-bits=8", "random-bits=8 of format fp8_e5m2 needs stochastic rounding"),
        ("bf16:stochastic,random-bits=32", "random-bits of format bf16 must be at most 31, not 32"),
        ("fp4_e2m1:no-saturate", "unknown option 'no-saturate'"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        get_format(spec)


def test_scales_of_their_own():
    """A format with float32's exponents would need scales that float32 has not."""
    for spec in ("fp8_e4m3fn:row,truncate", "fp8_e5m2:tensor,no-saturate", "e4m3:group=8,random-bits=3"):
        with pytest.raises(ValueError, match=r"does not go with option|needs stochastic"):
            get_format(spec)
    for spec in ("e8m3:row", "bf16:row", "tf32:tensor"):
        with pytest.raises(ValueError, match="unknown option"):
            get_format(spec)
    assert get_format("fp8_e4m3fn:group=128").bits_per_value == 8.25
    fmt = get_format("fp8_e4m3fn:row")
    assert fmt.largest is fmt.smallest_normal is fmt.smallest_subnormal is None
