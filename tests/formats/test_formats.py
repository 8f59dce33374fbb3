"""Format names: what parses, to what, and what the errors say there is; the registry of one's own."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq_kernels import (
    Format,
    describe_formats,
    format_names,
    get_format,
    reference,
    register_format,
    round_trip,
)
from fq_kernels.formats import roundings, unregister_format

KERNEL_FORMATS = [name for name in format_names() if name.split(":")[0] in ("bf16", "f16", "fp8_e4m3fn")]
DOCS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")

# ---------------------------------------------------------------- parsing


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
        ("tf32:truncate", Format("tf32", "truncate")),
        ("bf16:dither", Format("bf16", options=("dither",))),
        ("bf16:seed=7,dither,truncate", Format("bf16", "truncate", 7, ("dither",))),
        ("int8:dither,group=32,seed=3", Format("int8", seed=3, options=("group=32", "dither"))),
        ("q8_K", Format("q8_k", "nearest-even")),
        ("q8_0:nearest-away", Format("q8_0")),
        ("fp8_e4m3", Format("fp8_e4m3fn")),
        ("fp8_e4m3:no-saturate", Format("fp8_e4m3fn", options=("no-saturate",))),
        ("fp8_e5m2:saturate", Format("fp8_e5m2")),
        ("mxfp8", Format("mxfp8_e4m3")),
        ("mxfp6", Format("mxfp6_e2m3")),
        ("int8:symmetric,row", Format("int8")),
        ("int8:group=032,asymmetric", Format("int8", options=("asymmetric", "group=32"))),
        ("int4:tensor,tensor", Format("int4", options=("tensor",))),
        ("nvfp4:row", Format("nvfp4", options=("row",))),
    ],
)
def test_specs(spec, expected):
    assert get_format(spec) == expected
    assert get_format(expected) is expected
    assert get_format(str(expected)) == expected


@pytest.mark.parametrize("spec", ["", "bf17", ":truncate", "bf16,truncate", "bf 16", "none", "int8group=32"])
def test_unknown_formats_name_what_there_is(spec):
    with pytest.raises(ValueError) as caught:
        get_format(spec)
    assert f"unknown format {spec!r}" in str(caught.value)
    for described in describe_formats():
        assert described["name"] in str(caught.value)


def test_close_names_are_suggested():
    with pytest.raises(ValueError, match=r"; did you mean fp8_e4m3fn or .*\?$"):
        get_format("fp8_e4m3f")
    with pytest.raises(ValueError, match=r"[^?]$"):
        get_format("roman numerals")


@pytest.mark.parametrize(
    "option",
    [
        "seed=",
        "seed=-1",
        "seed=x",
        "seed=1.5",
        "seed=\u0663",
        "sede=1",
        "=",
        "seed=0x10",
        "upwards",
        "row",
        "truncate:1",
    ],
)
def test_unknown_options(option):
    with pytest.raises(ValueError) as caught:
        get_format(f"bf16:stochastic,{option}")
    assert str(caught.value) == (
        f"unknown option {option!r} in format {f'bf16:stochastic,{option}'!r}; there are "
        "nearest-even|nearest-even-ftz|truncate|nearest-away|stochastic|up|down|odd, all-bits|random-bits=N, "
        "dither, seed=N"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "f16:ceil",
            r"unknown option 'ceil' .*; there are nearest-even.*random-bits=N, dither, seed=N$",
        ),
        ("q8_0:seed=1", "option seed=1 of format 'q8_0:seed=1' needs dither"),
        ("tf32:dither=1", r"unknown option 'dither=1' .*; there are nearest-even\|.*dither, seed=N$"),
        ("bf16:stochastic,dither", "stochastic rounding falls anew for each seed without dither"),
        (
            "int8:group",
            r"unknown option 'group' .*; there are symmetric\|asymmetric, row\|tensor\|group=N, .*, dither, ",
        ),
        ("int8:group=0", "unknown option 'group=0'"),
        ("int8:group=", "unknown option 'group='"),
        ("int8:group=1.5", "unknown option 'group=1.5'"),
        ("int8:row=3", "unknown option 'row=3'"),
        ("int8:row,tensor", "options row and tensor of format 'int8:row,tensor' exclude each other"),
        ("int8:group=2,group=3", "options group=2 and group=3 of .* exclude each other"),
        ("bf16:truncate,nearest-even", "options truncate and nearest-even of .* exclude each other"),
        ("bf16:seed=7", "option seed=7 of format 'bf16:seed=7' needs stochastic rounding or dither"),
        ("fp6_e2m3:no-saturate", "unknown option 'no-saturate'"),
    ],
)
def test_options_that_a_format_does_not_take(spec, message):
    with pytest.raises(ValueError, match=message):
        get_format(spec)


def test_seeds_out_of_range():
    for bad in ("bf16:stochastic,seed=18446744073709551616", Format("bf16", "stochastic", -1)):
        with pytest.raises(ValueError, match=r"seed must be between 0 and 2\*\*64 - 1"):
            get_format(bad)


@pytest.mark.parametrize("digits", ["2147483648", "9223372036854775808", "9" * 5000, "0" * 5000 + "9" * 12])
def test_numbers_of_options_out_of_range(digits):
    for spec in (f"int8:group={digits}", f"fp8_e4m3fn:group={digits}"):
        with pytest.raises(ValueError, match=r"^group must be between 1 and 2\*\*31 - 1, not \d{10,20}…?$"):
            get_format(spec)
    with pytest.raises(ValueError, match=r"^seed must be between 0 and 2\*\*64 - 1, not 9{20}…$"):
        get_format("bf16:stochastic,seed=" + "9" * 5000)
    assert get_format("int8:group=" + "0" * 5000 + "32") == get_format("int8:group=32")
    assert np.isfinite(round_trip(np.ones((1, 4), np.float32), "int8:group=2147483647")).all()


@pytest.mark.parametrize("spec", [None, 16, b"bf16", ["bf16"]])
def test_a_format_is_a_string(spec):
    with pytest.raises(TypeError, match="a format is a string such as 'bf16'"):
        get_format(spec)


def test_a_format_object_is_checked_too():
    with pytest.raises(ValueError, match=r"unknown option 'ceil' in format 'f16:ceil'"):
        get_format(Format("f16", "ceil"))
    with pytest.raises(ValueError, match=r"unknown format 'f17'"):
        get_format(Format("f17"))
    assert get_format(Format("fp8_e4m3")) == get_format("fp8_e4m3fn")
    assert get_format(Format("int8", options=("row", "asymmetric"))) == get_format("int8:asymmetric")


def test_names_and_rounding_rules():
    names = format_names()
    assert names[0] == "bf16" and "f16" in names and len(set(names)) == len(names)
    assert [str(get_format(name)).split(",")[0] for name in names] == names
    own = ["nearest-even", "nearest-even-ftz", "truncate", "nearest-away", "stochastic"]
    assert roundings("bf16") == [*own, "up", "down", "odd"]
    assert roundings("f16")[0] == roundings("e4m3")[0] == "nearest-even" and len(roundings("f16")) == 7
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


@pytest.mark.parametrize(
    "spec", ["bf16:stochastic,seed=3", "int8:group=32", "noise_q8_0:dither,seed=2", "int8:scale=0.1"]
)
def test_copies_and_pickles(spec):
    fmt = get_format(spec)
    x = np.linspace(-3, 3, 128, dtype=np.float32).reshape(2, 64)
    values = fmt.quantise(x).values
    pickled = pickle.loads(pickle.dumps(fmt))
    for again in (pickled, copy.copy(fmt), copy.deepcopy(fmt), dataclasses.replace(fmt)):
        assert again == fmt and hash(again) == hash(fmt)
        assert (str(again), repr(again), again.kernel.quant) == (spec, repr(fmt), fmt.kernel.quant)
        assert again.quantise(x).values.tobytes() == values.tobytes()
    assert list(dataclasses.asdict(fmt)) == ["name", "rounding", "seed", "options", "scales"]


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_each_name_reaches_its_own_kernel(name):
    # ties, values near the next step, subnormals, of both signs: no two rules agree on all of them
    bits = [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F80C000, 0x00018000, 0x3F801000]
    bits += [0x3F880000, 0x3F980000, 0x3F8FFFFF, 0x3F8C0000, 0x3A800000, 0x3F881000]
    x = np.tile(np.array(bits, np.uint32).view(np.float32), 8)
    x[::2] *= -1
    got = {other: round_trip(x, other).tobytes() for other in KERNEL_FORMATS}
    assert got[name] == reference.round_trip(x, name).tobytes()
    assert list(got.values()).count(got[name]) == 1
    assert get_format(name).quantise(x.reshape(2, -1)).values.tobytes() == got[name]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x must be a float32 array, not list"),
        (np.zeros((1, 2)), TypeError, "x must be a float32 array, not float64"),
        (np.zeros((1, 2), ">f4"), TypeError, "x must be a float32 array, not >f4"),
        (np.zeros(2, np.float32), ValueError, r"x must have two axes, rows and n, not shape \(2,\)"),
    ],
)
def test_quantise_checks_x(x, error, message):
    with pytest.raises(error, match=message):
        get_format("q8_0").quantise(x)


# ---------------------------------------------------------------- descriptions


# Bytes of the block_* structures of ggml-common.h; for MX and nvfp4 the arithmetic of their specifications.
BITS = {
    "bf16": 16, "f16": 16, "tf32": 19, "fp8_e4m3fn": 8, "fp6_e3m2": 6, "fp4_e2m1": 4, "int8": 8, "int4": 4,
    "int8:group=32": 9, "int8:asymmetric,group=32": 9.25, "int4:group=16": 6, "int4:asymmetric,group=4": 13,
    "q8_0": 34 * 8 / 32, "q8_1": 36 * 8 / 32, "q8_k": 292 * 8 / 256, "q4_0": 18 * 8 / 32, "q4_1": 20 * 8 / 32,
    "q5_0": 22 * 8 / 32, "q5_1": 24 * 8 / 32, "iq4_nl": 18 * 8 / 32,
    "mxfp8": 8.25, "mxfp6": 6.25, "mxfp4": 4.25, "mxint8": 8.25, "nvfp4": 4.5,
}  # fmt: skip


@pytest.mark.parametrize("spec", BITS)
def test_bits_per_value(spec):
    assert get_format(spec).bits_per_value == BITS[spec]


def test_descriptions():
    described = {entry["name"]: entry for entry in describe_formats()}
    assert list(described)[:3] == ["bf16", "f16", "tf32"]
    for name, entry in described.items():
        fmt = get_format(name)
        assert list(entry) == [
            "name", "aliases", "options", "bits_per_value", "largest", "smallest_normal",
            "smallest_subnormal", "rounding", "block", "note",
        ]  # fmt: skip
        for key in ("bits_per_value", "largest", "smallest_normal", "smallest_subnormal", "rounding"):
            assert entry[key] == getattr(fmt, key)
        assert (entry["block"] is None) == (entry["largest"] is not None)
        assert entry["note"]
        for alias in entry["aliases"]:
            assert get_format(alias) == fmt
        for option in entry["options"]:
            for alternative in option.split("|"):
                if alternative not in ("seed=N", "random-bits=N"):  # which need another option
                    get_format(f"{name}:{alternative.replace('=N', '=16')}")
        assert f"`{name}`" in DOCS
    assert described["int8"]["options"] == [
        "symmetric|asymmetric",
        "row|tensor|group=N",
        "unrotated|had=N",
        "scale=N|scale=@FILE",
        "dither",
        "seed=N",
    ]
    assert described["fp8_e4m3fn"]["aliases"] == ["fp8_e4m3"]


def test_flushed_subnormals_are_not_claimed():
    assert get_format("bf16:nearest-even-ftz").smallest_subnormal is None


# ---------------------------------------------------------------- one's own


@pytest.fixture
def mine():
    """Registers under the name ``mine``; gone after the test."""
    yield lambda fn, **facts: register_format("mine", fn, **facts)
    unregister_format("mine")


ONES = np.ones((2, 3), np.float32)


def test_a_registered_function_is_a_format_like_any_other(mine):
    fmt = mine(
        lambda x: np.round(x), bits_per_value=5, largest=9.0, idempotent=True, description="whole numbers"
    )
    assert get_format(" MINE ") == fmt == Format("mine") and "mine" in format_names()
    assert str(fmt) == "mine" and fmt.kernel.quant == 0 and not fmt.whole_tensor and fmt.idempotent
    x = np.array([[0.4, 1.6, -2.5]], np.float32)
    result = fmt.quantise(x)
    assert (
        result.values.tolist() == [[0, 2, -2]]
        and result.values.dtype == np.float32
        and result.clipped is None
    )
    (entry,) = [entry for entry in describe_formats() if entry["name"] == "mine"]
    assert (entry["bits_per_value"], entry["largest"], entry["note"]) == (5, 9.0, "whole numbers")


def test_what_a_registered_function_loses_is_counted(mine):
    fmt = mine(lambda x: x * np.float32(3e38))
    assert fmt.quantise(np.array([[1, 2, np.inf, np.nan]], np.float32)).clipped.tolist() == [
        [False, True, False, False]
    ]


def test_a_result_beyond_float32_is_counted(mine):
    fmt = mine(lambda x: np.where(x > 1, np.float64(1e300), x))
    values, clipped = fmt.quantise(np.array([[1, 2]], np.float32))
    assert values.tolist() == [[1, np.inf]] and clipped.tolist() == [[False, True]]


def test_a_registered_function_sees_rows_in_one_piece_and_cannot_write_them(mine):
    def fn(x):
        assert x.flags.c_contiguous
        x += 1
        return x

    fmt = mine(fn, whole_tensor=True)
    assert fmt.whole_tensor
    with pytest.raises(ValueError, match="read-only"):
        fmt.quantise(np.asfortranarray(ONES))
    with pytest.raises(ValueError, match="read-only"):
        fmt.quantise(ONES)


def test_a_registered_function_that_returns_its_argument(mine):
    fmt = mine(lambda x: x)
    assert not np.shares_memory(fmt.quantise(ONES).values, ONES)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, bool])
def test_results_that_convert_to_float32(mine, dtype):
    assert mine(lambda x: x.astype(dtype)).quantise(ONES).values.tolist() == ONES.tolist()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x[:, :2], r"format mine: its function returned shape \(2, 2\) for shape \(2, 3\)"),
        (lambda x: None, r"format mine: its function returned shape \(\) for shape \(2, 3\)"),
        (lambda x: x * 1j, "format mine: its function returned complex64, which is not float32"),
        (lambda x: x.astype(str), "format mine: its function returned <U.*, which is not float32"),
    ],
)
def test_results_that_are_no_rounding_of_x(mine, fn, message):
    with pytest.raises(ValueError, match=message):
        mine(fn).quantise(ONES)


@pytest.mark.parametrize("name", ["bf16", "mxfp8", "q8_0"])
def test_names_that_are_taken(name):
    with pytest.raises(ValueError, match=f"there is a format {name} already"):
        register_format(name, np.rint)
    with pytest.raises(ValueError, match=f"'{name}' is no registered format"):
        unregister_format(name)


@pytest.mark.parametrize("name", ["", "Mine", "my format", "mine:1", "mine,1", "a=b", "8bit", "mine\n", None])
def test_names_that_do_not_parse(name):
    with pytest.raises(ValueError, match="a format's name is lower-case letters, digits and underscores"):
        register_format(name, np.rint)


def test_a_format_needs_a_function():
    with pytest.raises(TypeError, match="format mine: fn must be a function of an array, not str"):
        register_format("mine", "rint")


def test_a_format_that_is_gone_says_so():
    fmt = register_format("mine", np.rint)
    assert get_format("mine") == fmt
    unregister_format("mine")
    for use in (lambda: get_format("mine"), lambda: get_format(fmt), lambda: fmt.quantise(ONES)):
        with pytest.raises(ValueError, match="unknown format 'mine"):
            use()


def test_a_format_that_is_gone_and_another_of_its_name():
    x = np.array([[0.6, 1.2]], np.float32)
    fmt = register_format("mine", np.floor)
    signs = get_format("signs_mine")
    for each in (fmt, signs):
        assert copy.deepcopy(each) == each
        assert copy.deepcopy(each).quantise(x).values.tobytes() == each.quantise(x).values.tobytes()
    assert round_trip(x, "mine").tolist() == [[0, 1]]
    unregister_format("mine")
    for use in (lambda: fmt.quantise(x), lambda: round_trip(x, "mine"), lambda: signs.quantise(x)):
        with pytest.raises(ValueError, match=r"unknown format '(signs_)?mine"):
            use()
    register_format("mine", np.ceil)
    try:
        assert fmt.quantise(x).values.tolist() == round_trip(x, "mine").tolist() == [[1, 2]]
        np.testing.assert_allclose(np.abs(signs.quantise(x).values - x), [[0.4, 0.8]], rtol=1e-5)
    finally:
        unregister_format("mine")


def test_the_documented_example():
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    before = format_names()
    try:
        exec(example, {})
        assert set(format_names()) > set(before)
    finally:
        for name in set(format_names()) - set(before):
            unregister_format(name)
