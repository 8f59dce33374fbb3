"""The noise controls: the error's length in each row, or its size in each element, and nothing else of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq
from format_specs import SPECS
from report_store import cells_for, data_of, layers, run_of
from strategies import assert_same_bits

from fq.report.data import groups_of
from fq_kernels import Executor, get_format, register_format, round_trip
from fq_kernels.formats import unregister_format
from fq_kernels.formats.noise import PREFIXES

SOME = ["bf16", "int4", "bf16:truncate", "int8:group=32", "nvfp4:row", "bf16:dither,seed=3"]


def error(spec: str, x: np.ndarray) -> np.ndarray:
    return get_format(spec).quantise(x).values.astype(np.float64) - x


@pytest.mark.parametrize("spec", SOME)
def test_gaussian_noise_is_as_long_as_a_rows_error(spec):
    x = np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32)
    x[7] = 0  # which every format keeps, but for dither
    x[8, 3] = np.nan
    rounding, noise = error(spec, x), error(f"noise_{spec}", x)
    assert noise[7].any() <= rounding[7].any()
    assert np.isnan(noise[8]).any()
    rows = np.delete(np.arange(40), [7, 8])
    lengths = np.linalg.norm(noise, axis=1), np.linalg.norm(rounding, axis=1)
    np.testing.assert_allclose(lengths[0][rows], lengths[1][rows], rtol=1e-3)
    # not the rounding's direction, and not another row's
    directions = [e[rows] / length[rows, None] for e, length in zip((noise, rounding), lengths, strict=True)]
    assert abs((directions[0] * directions[1]).sum(axis=1)).max() < 0.25
    assert abs(directions[0] @ directions[0].T - np.eye(len(rows))).max() < 0.25


@pytest.mark.parametrize("spec", SOME)
def test_random_signs_keep_each_elements_error(spec):
    x = np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32)
    x[7] = 0
    x[8, 3] = np.nan
    rounding, signs = error(spec, x), error(f"signs_{spec}", x)
    assert signs[7].any() <= rounding[7].any()
    assert np.array_equal(np.isnan(signs), np.isnan(rounding))
    rows = np.delete(np.arange(40), [7, 8])
    # but for the float32 that x - e is rounded to
    np.testing.assert_allclose(np.abs(signs[rows]), np.abs(rounding[rows]), rtol=0, atol=1e-6)
    clear = np.abs(rounding) > 1e-4
    clear[[7, 8]] = False
    same = np.where(clear, np.sign(signs) == np.sign(rounding), 0.5)[rows]
    assert 0.48 < same.mean() < 0.52
    # neither a row's nor an element's own
    assert 0.3 < same.mean(axis=1).min() and same.mean(axis=1).max() < 0.7
    assert 0.1 < same.mean(axis=0).min() and same.mean(axis=0).max() < 0.9
    assert_same_bits(
        get_format(f"signs_{spec}").quantise(x).values[rows][same == 1],
        get_format(spec).quantise(x).values[rows][same == 1],
    )


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("spec", [*SPECS, "bf16:dither,seed=3", "int8:group=32,dither"])
def test_every_format_has_both_with_its_options(prefix, spec):
    fmt = get_format(prefix + spec)
    assert str(fmt) == prefix + str(get_format(spec)) and get_format(str(fmt)) == fmt
    assert (fmt.whole_tensor, fmt.seeded) == (get_format(spec).whole_tensor, get_format(spec).seeded)
    assert fmt.kernel.quant == 0 and not fmt.idempotent and fmt.bits_per_value == 32
    x = np.random.default_rng(1).standard_normal((90, 64)).astype(np.float32)
    whole = fmt.quantise(x).values
    assert (whole != x).mean() > 0.3
    if not fmt.whole_tensor:
        for i in (8, 0, 3):
            assert_same_bits(fmt.quantise(x[i : i + 1]).values[0], whole[i])
    with Executor(2) as executor:
        assert_same_bits(round_trip(x, fmt, executor=executor), whole)


@pytest.mark.parametrize("spec", ["noise_bf16:dither", "signs_bf16:dither", "signs_bf16:stochastic"])
def test_another_seed_is_other_noise(spec):
    x = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    one, other = (error(f"{spec},seed={seed}", x).ravel() for seed in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    # nor is it the dither's own error
    rounding = error(f"{spec.partition('_')[2]},seed=1", x).ravel()
    assert abs(np.corrcoef(one, rounding)[0, 1]) < 0.05


def test_aliases_and_case():
    assert str(get_format(" Noise_FP8_E4M3 ")) == "noise_fp8_e4m3fn"
    assert str(get_format("signs_q8_K")) == "signs_q8_k"


def test_of_ones_own_format():
    register_format("mine", np.rint)
    try:
        x = np.array([[0.3, 1.4]], np.float32)
        np.testing.assert_allclose(np.abs(error("signs_mine", x)), [[0.3, 0.4]], rtol=1e-6)
        with pytest.raises(ValueError, match="there is a format noise_mine already"):
            register_format("noise_mine", np.rint)
    finally:
        unregister_format("mine")
    with pytest.raises(ValueError, match="unknown format 'signs_mine'"):
        get_format("signs_mine")


@pytest.mark.parametrize("spec", ["noise_", "noise_bf17", "noise_noise_bf16", "signs_noise_bf16"])
def test_noise_of_nothing(spec):
    with pytest.raises(ValueError, match=f"unknown format '{spec}'"):
        get_format(spec)


@pytest.mark.parametrize("spec", ["bf16", "int8:group=32,first-call"])
def test_the_command_and_what_it_keeps(spec, tiny_path, tmp_path):
    store = tmp_path / "store.sqlite"
    sweep = ["sweep", "-m", tiny_path, "-c", 32, "--chunks", 2, "--noise", "--format", spec]
    data = json.loads(fq(*sweep, "--store", store, "--json", "-")[0])
    groups = [f"ffn_norm[*].raw={prefix}{spec}" for prefix in ("", *PREFIXES)]
    assert [group["name"] for group in data["groups"]] == groups
    for group in data["groups"][1:]:
        assert 0.1 < group["kld_together"] / data["groups"][0]["kld_together"] < 10
    cells = {cell["name"]: cell["sites"] for cell in data["cells"]}
    (own,), *controls = (cells[f"ffn_norm[0].raw={prefix}{spec}"] for prefix in ("", *PREFIXES))
    for (site,) in controls:
        assert site["sqnr_db"] == pytest.approx(own["sqnr_db"], abs=0.01)
    assert json.loads(fq("results", 1, "--store", store, "--json", "-")[0]) == data


def test_a_report_finds_a_formats_controls():
    specs = [prefix + spec for spec in ("bf16", "int8:group=32,first-call") for prefix in ("", *PREFIXES)]
    run = run_of(cells_for(layers(2), specs), [("ffn_norm", i) for i in range(2)], 2)
    groups = groups_of(data_of(run, lambda cell: np.full(2, 1e-6)))
    assert [group.spec for group in groups if group.control is None] == [specs[0], specs[3]]
    for i in (0, 3):
        assert [groups[i].noise, groups[i].signs] == [groups[i + 1], groups[i + 2]]


def test_no_noise_of_noise(tiny_path, tmp_path):
    _, err = fq("sweep", "-m", tiny_path, "--noise", "--format", "signs_bf16", status=2)
    assert err == "fq: error: --noise: the format signs_bf16 is noise itself\n"
