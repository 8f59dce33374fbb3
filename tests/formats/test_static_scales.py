"""Scales that other values have given: int and fp8 under them, and the files that say them by site."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, note
from strategies import assert_row_stats, assert_same_bits, every_isa, float_arrays

from fq_kernels import get_format, rms_norm_f32, round_trip
from fq_kernels._kernels import N_STATS
from fq_kernels.rules import Calibration, FakeQuant, Place, Site, Value, calibrations_of

F32 = np.float32
NORM = Place("ffn_norm", 0)
FORMATS = ["int8", "int4", "fp8_e4m3fn", "fp8_e5m2", "e3m2finite"]


def with_scales(name: str, scales: list[float]):
    fmt = get_format(f"{name}{',' if ':' in name else ':'}scale=1")
    top = fmt.family.static_top
    return fmt.with_ranges(np.array(scales, F32) * F32(top(fmt) if callable(top) else top))


def write(path, sites, **changes) -> str:
    data = {
        "kind": "fq static scales", "version": 1, "model": {"file": "m", "sha256": "cd"},
        "text": {"name": "a", "sha256": "ab"}, "method": "largest", "per": "tensor", "format": None,
        "sites": sites,
    }  # fmt: skip
    path.write_text(json.dumps(data | changes))
    return str(path)


@pytest.mark.parametrize(
    ("name", "per"),
    [(name, per) for name in FORMATS for per in ("tensor", "channel")]
    + [("nvfp4", "tensor"), ("nvfp4:four-over-six", "tensor")],
)
class TestEverySet:
    @given(x=float_arrays())
    def test_equals_the_reference(self, name, per, x):
        n = x.shape[-1]
        fmt = with_scales(name, np.geomspace(0.01, 3, n).tolist() if per == "channel" else [0.0137])
        rows = x.reshape(-1, n)
        values, clipped = fmt.quantise(rows)
        for isa in every_isa():
            note(isa)
            stats = np.full((len(rows), N_STATS), np.nan)
            assert_same_bits(round_trip(rows, fmt, row_stats=stats), values)
            assert_row_stats(stats, rows, values, np.zeros(rows.shape, bool) if clipped is None else clipped)


def test_int_codes_by_hand():
    fmt = get_format("int8:scale=0.5")
    x = np.array([[0.2, 0.25, 0.75, -0.3, 63.4, 63.7, 63.8, -64, -np.inf, np.nan]], F32)
    values, clipped = fmt.quantise(x)
    assert values[0, :9].tolist() == [0, 0, 1, -0.5, 63.5, 63.5, 63.5, -63.5, -63.5] and np.isnan(
        values[0, 9]
    )
    assert clipped[0].tolist() == [False] * 6 + [True] * 3 + [False]
    assert not np.signbit(fmt.quantise(np.array([[-0.2]], F32)).values).any()


def test_fp8_is_the_cast_of_what_the_scale_divides():
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(F32) * 3
    scale = F32(0.011)
    values, clipped = get_format(f"fp8_e4m3:scale={scale}").quantise(x)
    plain = get_format("fp8_e4m3").quantise(x / scale)
    assert_same_bits(values, plain.values * scale)
    assert (clipped == plain.clipped).all() and clipped.any()


def test_the_largest_code_stands_for_the_range():
    x = np.array([[1.5, 3.0, -6.0]], F32)
    fmt = get_format("int8:scale=1").with_ranges(np.array([3.0], F32))
    top = F32(3.0) / F32(127) * F32(127)
    assert fmt.quantise(x).values[0, 1:].tolist() == [top, -top]


def test_nvfp4_under_its_own_outer_scale_is_what_it_makes_of_a_tensor():
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(F32)
    for options in ("", "four-over-six,"):
        fmt = get_format(f"nvfp4:{options}scale=1").with_ranges(np.abs(x).max(keepdims=True).ravel())
        assert_same_bits(fmt.quantise(x).values, get_format(f"nvfp4:{options}").quantise(x).values)
        alone = fmt.quantise(x[1:2]).values  # other rows do not matter
        assert not fmt.whole_tensor and get_format(f"nvfp4:{options}").whole_tensor
        assert_same_bits(alone, fmt.quantise(x).values[1:2])


def test_nvfp4_cuts_blocks_that_are_beyond_its_largest_scale():
    x = np.zeros((1, 32), F32)
    x[0, 0], x[0, 16] = 6 * 448, 6 * 448 * 2
    values, clipped = get_format("nvfp4:scale=1").quantise(x)
    assert values[0, [0, 16]].tolist() == [6 * 448, 6 * 448]
    assert np.flatnonzero(clipped).tolist() == [16]


def test_nvfp4_has_one_static_scale_for_all_channels():
    with pytest.raises(ValueError, match="nvfp4:scale=1 has one static scale for a tensor, not one for each"):
        get_format("nvfp4:scale=1").with_ranges(np.ones(64, F32))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nvfp4:scale=1,row", "a static scale of format nvfp4 does not go with option row"),
        ("nvfp4:scale=1,had=32", "a static scale of format nvfp4 does not go with option had=32"),
        ("int8:scale=0", "a static scale is a number from 2\\^-126 to below 2\\^128, or @ and a file"),
        ("int8:scale=1_0", "a static scale is a number"),
        ("int8:scale= 1", "a static scale is a number"),
        ("int8:scale=\u0663", "a static scale is a number"),
        ("int8:scale=1e-38", "a static scale is a number"),
        ("int8:scale=3.5e38", "a static scale is a number"),
        ("int8:scale=x", "a static scale is a number"),
        ("int8:scale=inf", "a static scale is a number"),
        ("int8:scale=nan", "a static scale is a number"),
        ("int8:scale=1,scale=2", "two static scales"),
        ("int8:scale=1,tensor", "a static scale of format int8 does not go with option tensor"),
        ("int8:scale=1,asymmetric", "does not go with option asymmetric"),
        ("int8:scale=1,had=32", "does not go with option had=32"),
        ("fp8_e4m3:scale=1,truncate", "does not go with option truncate"),
        ("fp8_e4m3:scale=1,no-saturate", "does not go with option no-saturate"),
        ("bf16:scale=1", "unknown option 'scale=1'"),
        ("mxfp4:scale=1", "unknown option 'scale=1'"),
    ],
)
def test_what_a_static_scale_does_not_go_with(spec, message):
    with pytest.raises(ValueError, match=message):
        get_format(spec)


@pytest.mark.parametrize("scale", ["3e38", "3.4028235e+38", "1.2e-38", "+2", ".5", "3.", "1E-3"])
def test_numbers_that_are_static_scales(scale):
    assert get_format(f"int8:scale={scale}").scales == (float(F32(scale)),)


def test_a_file_waits_for_a_site_and_its_name_keeps_its_case():
    fmt = get_format("INT8:scale=@Folder/Cal.json")
    assert str(fmt) == "int8:scale=@Folder/Cal.json" and fmt.calibration == "Folder/Cal.json"
    for use in (lambda: round_trip(np.ones((1, 4), F32), fmt), lambda: fmt.quantise(np.ones((1, 4), F32))):
        with pytest.raises(ValueError, match="its scale is one of a site's, which a rule names"):
            use()


def test_scales_of_other_rows_are_refused():
    fmt = with_scales("int8", [1.0, 2.0, 3.0])
    for use in (
        lambda: round_trip(np.ones((1, 4), F32), fmt),
        lambda: rms_norm_f32(np.ones((1, 4), F32), quant=fmt),
        lambda: fmt.quantise(np.ones((1, 4), F32)),
    ):
        with pytest.raises(ValueError, match="has scales for rows of 3 values, not of 4"):
            use()
    assert round_trip(np.ones((1, 3), F32), fmt).shape == (1, 3)


def test_each_site_has_its_scale(tmp_path):
    file = write(tmp_path / "cal.json", {"ffn_norm[0].weighted": 2.54, "k[0]": [1.27, 2.54, 12.7]})
    rules = FakeQuant(
        [Value(NORM), Value(Place("k", 0))], [f"*[*].weighted=int8:scale=@{file}", f"k=int8:scale=@{file}"]
    )
    k = np.array([[0.014, 0.03, 0.26]], F32)
    rules.round([Value(Place("k", 0))], k)
    np.testing.assert_allclose(k, [[0.01, 0.04, 0.3]], rtol=1e-6)
    x = np.random.default_rng(1).standard_normal((3, 16)).astype(F32)
    y = np.empty_like(x)
    rules.rms_norm(NORM, x, eps=1e-5, weight=np.ones(16, F32), out=y)
    assert_same_bits(y, round_trip(rms_norm_f32(x, eps=1e-5), f"int8:scale={F32(2.54) / F32(127)}"))
    counter = rules.counters[Site(NORM, "weighted")]
    assert counter.as_dict()["format"] == f"int8:scale=@{file}"
    assert calibrations_of(rules.rules, "ab")[0]["same_text"]
    assert not calibrations_of(rules.rules, "other")[0]["same_text"]


def test_a_site_that_the_file_lacks_is_an_error(tmp_path):
    file = write(tmp_path / "cal.json", {"ffn_norm[0].raw": 1})
    with pytest.raises(ValueError, match=r"cal.json has no scale for ffn_norm\[0\].weighted"):
        FakeQuant([Value(NORM)], f"ffn_norm[*].weighted=int8:scale=@{file}")


def test_scales_that_are_best_for_another_format_are_refused(tmp_path):
    file = write(tmp_path / "cal.json", {"ffn_norm[0].raw": 1}, format="int4")
    with pytest.raises(ValueError, match="has the scales that are best for int4, not for int8"):
        FakeQuant([Value(NORM)], f"ffn_norm[*].raw=int8:scale=@{file}")
    FakeQuant([Value(NORM)], f"ffn_norm[*].raw=int4:scale=@{file}")
    FakeQuant([Value(NORM)], f"ffn_norm[*].raw=signs_int4:scale=@{file}")  # its control's scales are its own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100000, "is not JSON"),
        ("\xff", "is not JSON"),
        ("[]", "is no file of static scales, which fq calibrate writes"),
        ("{}", "is no file of static scales"),
        ('{"kind": "fq static scales", "version": 2}', "is of another version than 1"),
        ('{"kind": "fq static scales", "version": 1, "sites": {"a": 1}}', "model.file is missing"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "cal.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"cal.json: {message}"):
        Calibration.load(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"sha256": "cd"}}, "model.file is missing"),
        ({"model": {"file": "m"}}, "model.sha256 is missing"),
        ({"model": "m"}, "model.file is missing"),
        ({"text": {"sha256": "ab"}}, "text.name is missing"),
        ({"text": {"name": "a", "sha256": 1}}, "text.sha256 must be a string"),
        ({"method": None}, "method is missing"),
        ({"per": ["tensor"]}, "per must be a string"),
    ],
)
def test_files_that_do_not_say_what_is_shown_of_them(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"cal.json: {message}"):
        Calibration.load(write(tmp_path / "cal.json", {"k[0]": 1}, **changes))


def test_a_file_does_not_say_what_it_is_itself(tmp_path):
    file = write(tmp_path / "cal.json", {"k[0]": 1}, same_text=False, file="other", sha256="00")
    rules = FakeQuant([Value(Place("k", 0))], f"k=int8:scale=@{file}").rules
    (found,) = calibrations_of(rules, "ab")
    assert (found["file"], found["same_text"]) == (file, True) and len(found["sha256"]) == 64


@pytest.mark.parametrize(
    "scale", [0, -1, "1", None, True, [], [1, 0], 1e39, float("nan"), float("inf"), 1e-60, {}]
)
def test_scales_that_are_none(tmp_path, scale):
    file = write(tmp_path / "cal.json", {"k[0]": scale})
    with pytest.raises(
        ValueError, match=r"the scale of k\[0\] must be a number above 0, or one for each channel"
    ):
        Calibration.load(file)


def test_a_file_that_changes_is_read_again(tmp_path):
    file = write(tmp_path / "cal.json", {"k[0]": 1})
    before = Calibration.load(file)
    write(tmp_path / "cal.json", {"k[0]": 2, "k[1]": 2})
    after = Calibration.load(file)
    assert (before.ranges["k[0]"][0], after.ranges["k[0]"][0]) == (1, 2) and before.sha256 != after.sha256
