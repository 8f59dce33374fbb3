"""Format names: what parses, to what, and what the errors say there is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq_kernels import Format, format_names, get_format, reference, round_trip
from fq_kernels.formats import roundings


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("bf16", Format("bf16")),
        ("f16", Format("f16")),
        ("BF16", Format("bf16")),
        ("  bf16\n", Format("bf16")),
        ("bf16:", Format("bf16")),
        ("bf16:nearest-even", Format("bf16")),
        ("bf16:nearest-even-ftz", Format("bf16", "nearest-even-ftz")),
        ("bf16:Truncate", Format("bf16", "truncate")),
        ("bf16:nearest-away", Format("bf16", "nearest-away")),
        ("bf16:stochastic", Format("bf16", "stochastic", 0)),
        ("bf16:stochastic,seed=7", Format("bf16", "stochastic", 7)),
        ("bf16:seed=7,stochastic", Format("bf16", "stochastic", 7)),
        ("bf16:stochastic,seed=18446744073709551615", Format("bf16", "stochastic", 2**64 - 1)),
    ],
)
def test_specs(spec, expected):
    assert get_format(spec) == expected
    assert get_format(expected) is expected


@pytest.mark.parametrize(
    "spec",
    ["", "bf17", "bf16:up", "f16:truncate", ":truncate", "bf16,truncate", "bf 16", "bf16:truncate:1", "none"],
)
def test_unknown_formats_name_what_there_is(spec):
    with pytest.raises(ValueError) as caught:
        get_format(spec)
    assert repr(spec) in str(caught.value)
    for name in format_names():
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "option", ["seed=", "seed=-1", "seed=x", "seed=1.5", "seed=\u0663", "sede=1", "=", "seed=0x10"]
)
def test_unknown_options(option):
    with pytest.raises(ValueError, match=r"unknown option .* there is seed=N") as caught:
        get_format(f"bf16:stochastic,{option}")
    assert option in str(caught.value)


def test_seeds_out_of_range():
    for bad in ("bf16:stochastic,seed=18446744073709551616", Format("bf16", "stochastic", -1)):
        with pytest.raises(ValueError, match=r"seed must be between 0 and 2\*\*64 - 1"):
            get_format(bad)


@pytest.mark.parametrize("spec", [None, 16, b"bf16", ["bf16"]])
def test_a_format_is_a_string(spec):
    with pytest.raises(TypeError, match="a format is a string such as 'bf16'"):
        get_format(spec)


def test_a_format_object_is_checked_too():
    with pytest.raises(ValueError, match=r"unknown format f16:truncate; there are bf16,"):
        get_format(Format("f16", "truncate"))


def test_names_and_rounding_rules():
    names = format_names()
    assert names[0] == "bf16" and "f16" in names and len(set(names)) == len(names)
    assert [str(get_format(name)).split(",")[0] for name in names] == names
    assert roundings("bf16") == ["nearest-even", "nearest-even-ftz", "truncate", "nearest-away", "stochastic"]
    assert roundings("f16") == ["nearest-even"]
    assert roundings("bf17") == []


@given(name=st.sampled_from(format_names()), seed=st.integers(0, 2**64 - 1))
def test_text_round_trip(name, seed):
    fmt = get_format(name)
    assert get_format(str(fmt)) == fmt
    if fmt.rounding == "stochastic":
        seeded = fmt.with_seed(seed)
        assert get_format(str(seeded)) == seeded == Format(fmt.name, "stochastic", seed)


def test_formats_are_values():
    fmt = get_format("bf16:stochastic,seed=3")
    assert {fmt: 1}[Format("bf16", "stochastic", 3)] == 1
    assert fmt != fmt.with_seed(4) and fmt.seed == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", format_names())
def test_each_name_reaches_its_own_kernel(name):
    # a tie, a value near the next step, a subnormal: no two rules agree on all of them
    bits = [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F80C000, 0x00018000, 0x3F801000]
    x = np.tile(np.array(bits, np.uint32).view(np.float32), 8)
    got = {other: round_trip(x, other).tobytes() for other in format_names()}
    assert got[name] == reference.round_trip(x, name).tobytes()
    assert list(got.values()).count(got[name]) == 1
