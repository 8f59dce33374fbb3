"""Formats whose elements share a scale: the kernel against its reference, the format's own function."""

from __future__ import annotations

import numpy as np
import pytest
from float_environments import FTZ_AND_DAZ, X86_64_GLIBC, foreign_environment
from format_specs import SCALED
from hypothesis import given, note
from hypothesis import strategies as st
from strategies import ROW_KINDS, assert_row_stats, assert_same_bits, every_isa, make_row, seeds

from fq_kernels import Executor, get_format, reference, rms_norm_f32, round_trip
from fq_kernels._kernels import N_STATS

F32 = np.float32
# scales of more than one span of values, and what is rotated
SPECS = [
    *SCALED, "int8:group=600", "int4:asymmetric,group=700", "int8:had=16", "int4:had=64,group=32",
    "int8:asymmetric,had=32,tensor", "mxfp4:had=128,block=64", "mxfp8_e5m2:rceil,had=512",
    "mxint8:even,had=2", "nvfp4:had=16", "nvfp4:row,had=64,four-over-six",
]  # fmt: skip
LENGTHS = [1, 5, 16, 33, 257, 512, 700, 1300]
KINDS = [*ROW_KINDS, "scaled", "ties"]


@st.composite
def rows_for(draw, spec: str) -> np.ndarray:
    """(rows, n) float32: rows of every kind, of any scale, and of values half-way between codes."""
    rng = np.random.default_rng(draw(seeds))
    had = get_format(spec).number("had")
    n = had * draw(st.integers(1, 1024 // had)) if had else draw(st.sampled_from(LENGTHS))
    rows = []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)):
        if kind == "scaled":
            row = rng.standard_normal(n) * 2.0 ** rng.integers(-149, 125)
        elif kind == "ties":
            row = rng.integers(-254, 255, n) / 2 * 2.0 ** rng.integers(-30, 30)
        else:
            row = make_row(kind, n, rng)
        rows.append(row)
    with np.errstate(over="ignore"):
        return np.array(rows, F32)


@pytest.mark.parametrize("spec", SPECS)
class TestEverySet:
    @given(data=st.data())
    def test_equals_the_reference(self, spec, data):
        fmt = get_format(spec)
        x = data.draw(rows_for(spec))
        values, clipped = fmt.quantise(x)
        for isa in every_isa():
            note(isa)
            stats = np.full((len(x), N_STATS), np.nan)
            assert_same_bits(round_trip(x, fmt, row_stats=stats), values)
            if not fmt.number("had"):  # else codes of the rotated are cut: their number is not of the values
                assert_row_stats(stats, x, values, np.zeros(x.shape, bool) if clipped is None else clipped)

    def test_many_blocks(self, spec):
        # some ties and orders show in one block of thousands
        rng = np.random.default_rng(1)
        x = (rng.standard_normal((64, 2048)) * 2.0 ** rng.integers(-8, 8, (64, 1))).astype(F32)
        values = get_format(spec).quantise(x).values
        for isa in every_isa():
            assert_same_bits(round_trip(x, spec), values, isa)

    def test_fused_into_the_norm(self, spec):
        rng = np.random.default_rng(2)
        x, weight = rng.standard_normal((5, 1024)).astype(F32), rng.standard_normal(1024).astype(F32)
        for point in ("raw", "weighted"):
            expected = reference.rms_norm_f32(x, weight=weight, quant=spec, point=point)
            for isa in every_isa():
                assert_same_bits(rms_norm_f32(x, weight=weight, quant=spec, point=point), expected, isa)
                in_place = x.copy()
                rms_norm_f32(in_place, weight=weight, quant=spec, point=point, out=in_place)
                assert_same_bits(in_place, expected, isa)


@pytest.mark.threads
@pytest.mark.parametrize("spec", SPECS)
def test_at_any_number_of_threads_and_under_any_environment(spec):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((300, 512)) * 2.0 ** rng.integers(-140, 100, (300, 1))).astype(F32)
    expected = round_trip(x, spec)
    for threads in (2, 3):
        with Executor(threads) as executor:
            assert_same_bits(round_trip(x, spec, executor=executor), expected)
    if X86_64_GLIBC:
        with foreign_environment(mxcsr_bits=FTZ_AND_DAZ):
            got = round_trip(x, spec)
        assert_same_bits(got, expected)


def test_one_long_row_is_one_row():
    x = np.random.default_rng(4).standard_normal(5000).astype(F32)
    for spec in ("int8", "mxfp4", "nvfp4:row", "q8_0"):
        assert_same_bits(round_trip(x, spec), round_trip(x[np.newaxis], spec)[0])


def test_rows_that_a_rotation_does_not_fit():
    x = np.ones((2, 48), F32)
    for use in (
        lambda: round_trip(x, "mxfp4:had=32"),
        lambda: rms_norm_f32(x, quant="int8:had=32"),
        lambda: round_trip(x, "int8:tensor,had=32"),
        lambda: get_format("nvfp4:had=32").quantise(x),
    ):
        with pytest.raises(ValueError, match="had=32 rotates 32 values together: rows of 48 cannot be cut"):
            use()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mxfp4:block=8", "block=8 of format mxfp4 must be from 16 to 256"),
        ("mxfp4:block=512", "block=512 of format mxfp4 must be from 16 to 256"),
        ("mxfp4:had=24", "had=24 of format mxfp4 must be a power of two up to 512"),
        ("int8:had=1024", "had=1024 of format int8 must be a power of two up to 512"),
        ("mxfp4:had=32,block=48", "option block=48 of format mxfp4 must be a power of two beside had=32"),
        ("int8:had=32,group=48", "option group=48 of format int8 must be a power of two beside had=32"),
        ("nvfp4:had=16,dither", "format nvfp4 has no dither beside had=16"),
        ("mxfp4:floor,rceil", "options floor and rceil of .* exclude each other"),
        ("q8_0:had=32", "unknown option 'had=32'"),
    ],
)
def test_options_that_do_not_go_together(spec, message):
    with pytest.raises(ValueError, match=message):
        get_format(spec)
