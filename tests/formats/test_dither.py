"""Dither: errors as rounding makes them, fallen anew for each seed."""

from __future__ import annotations

import numpy as np
import pytest
from format_specs import DIRECTED, SCALED, WITH_DITHER, block_size
from hypothesis import given, note, settings
from hypothesis import strategies as st
from strategies import assert_same_bits, float_arrays

from fq_kernels import (
    Executor,
    formats,
    get_format,
    register_format,
    rms_norm_f32,
    round_trip,
)
from fq_kernels.formats.dither import uniform
from fq_kernels.rules import FakeQuant, Place, Value

SEEDS = 12
NOT_EVEN = ("mx", "nv", "iq4", "fp4", "fp6", "q5_0", "q4_0")  # much clipped, or steps of several lengths
EVEN = [spec for spec in WITH_DITHER if get_format(spec).rounding not in DIRECTED]
matrices = float_arrays(st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 33, 257])))


def dithered(spec: str, seed: int) -> str:
    return f"{spec}{',' if ':' in spec else ':'}dither,seed={seed}"


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((160, 512)).astype(np.float32)


@pytest.fixture(scope="module")
def errors(x):
    """spec -> (SEEDS, rows, n) float64, and rounding's own."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def of(spec: str) -> tuple[np.ndarray, np.ndarray]:
        if spec not in found:
            own, *each = (
                get_format(s).quantise(x).values.astype(np.float64) - x
                for s in (spec, *(dithered(spec, seed) for seed in range(SEEDS)))
            )
            found[spec] = np.array(each), own
        return found[spec]

    return of


@pytest.mark.parametrize("spec", WITH_DITHER)
def test_errors_are_as_large_as_roundings(spec, x, errors):
    each, own = errors(spec)
    assert np.square(each).mean() == pytest.approx(np.square(own).mean(), rel=0.03)
    if get_format(spec).bits_per_value > 7 and spec != "int8:tensor":
        # not in the sum alone: also where x is large, and where it is small
        for part in (np.abs(x) > 1, np.abs(x) < 0.25):
            assert np.square(each[:, part]).mean() == pytest.approx(np.square(own[part]).mean(), rel=0.06)
    assert each.mean() == pytest.approx(own.mean(), abs=0.02 * own.std())


@pytest.mark.parametrize("spec", EVEN)
def test_errors_fall_anew(spec, x, errors):
    each, own = errors(spec)
    within = np.abs(x) < (get_format(spec).largest or np.inf)  # what is cut to the range has no dither
    each, own = each[:, within], own[within]
    # what sets a scale stays, and what is clipped
    alike = 0.3 if spec.startswith(("mx", "nv", "int4:asymmetric,group=7")) else 0.06
    assert abs(np.corrcoef(each[0].ravel(), own.ravel())[0, 1]) < alike
    assert abs(np.corrcoef(each[0].ravel(), each[1].ravel())[0, 1]) < alike


@pytest.mark.parametrize(
    "spec",
    [s for s in WITH_DITHER if not s.startswith(NOT_EVEN) and get_format(s).rounding not in DIRECTED],
)
def test_an_elements_errors_fill_a_step_evenly(spec, x, errors):
    each, _ = errors(spec)
    fmt = get_format(spec)
    step = fmt.family.spacing(x, fmt).step
    free = step > 0
    parts = each[:, free] / step[free]
    # 2 in 100: where the step changes, at a power of two or at a block's end
    assert (np.abs(parts) > 0.501).mean() < 0.02
    counts = np.histogram(parts, 10, (-0.5, 0.5))[0] / parts.size
    assert np.allclose(counts, 0.1, atol=0.006)
    # of each element too: mean 0 within 5 standard errors, but for those by a change of step
    assert (np.abs(parts.mean(axis=0)) < 5 * np.sqrt(1 / 12 / SEEDS)).mean() > 0.995


def test_truncation_keeps_its_direction(x, errors):
    each, _ = errors("bf16:truncate")
    far = np.abs(x) > 1e-3
    assert (each[:, far] * np.sign(x[far]) <= 0).all()
    assert each[0].tobytes() != each[1].tobytes()


@settings(max_examples=25)
@given(x=matrices)
def test_what_is_not_finite_is_rounded_as_ever(x):
    for spec in WITH_DITHER:
        note(spec)
        plain, (values, clipped) = get_format(spec).quantise(x), get_format(dithered(spec, 5)).quantise(x)
        assert np.array_equal(np.isfinite(values), np.isfinite(plain.values))
        assert_same_bits(values[~np.isfinite(values)], plain.values[~np.isfinite(values)])
        if plain.clipped is not None:
            assert clipped[plain.clipped].all()
            assert_same_bits(values[plain.clipped], plain.values[plain.clipped])


@pytest.mark.parametrize("spec", [spec for spec in WITH_DITHER if spec in SCALED])
def test_what_sets_a_scale_stays(spec, x):
    """And the scale with it: another would change what stays."""
    if spec.startswith("mx"):  # the exponent alone sets it
        return
    fmt = get_format(spec)
    stays = fmt.family.spacing(x, fmt).step == 0
    for i in range(0, x.shape[1], block_size(spec, x.shape[1])):
        assert stays[:, i : i + block_size(spec, x.shape[1])].any(axis=None if fmt.whole_tensor else 1).all()
    value = get_format(dithered(spec, 1)).quantise(x).values
    if spec != "iq4_nl":  # whose scale follows all of its codes
        assert_same_bits(value[stays], fmt.quantise(x).values[stays])


@pytest.mark.parametrize(
    ("spec", "x", "result"),
    [
        ("f16:dither", 65521, np.inf),
        ("f16:dither", -65519, -65504),
        ("fp8_e4m3fn:no-saturate,dither", 470, np.nan),
        ("fp8_e4m3fn:dither", 463, 448),
    ],
)
def test_the_ranges_end_is_where_it_was(spec, x, result):
    x = np.full((1, 500), x, np.float32)
    values, _ = get_format(spec).quantise(x)
    over = ~np.isin(values, [np.float32(result)]) & ~np.isnan(values)
    if np.isfinite(result):  # what stayed below it has an error of its own
        assert 0.1 < over.mean() < 0.9 and (np.abs(values - x) < np.abs(x) / 8).all()
    else:
        assert not over.any()


@pytest.mark.parametrize("spec", WITH_DITHER)
def test_the_seed_and_the_row_decide(spec, x, monkeypatch):
    fmt = get_format(dithered(spec, 3))
    once = fmt.quantise(x).values
    assert_same_bits(get_format(fmt).quantise(np.asfortranarray(x)).values, once)
    assert (fmt.with_seed(4).quantise(x).values != once).mean() > 0.5
    monkeypatch.setattr(formats.format, "_PIECE", 1025)
    assert_same_bits(fmt.quantise(x).values, once)
    if not fmt.whole_tensor:
        order = np.random.default_rng(0).permutation(len(x))
        assert_same_bits(fmt.quantise(x[order]).values, once[order])


@pytest.mark.parametrize("spec", ["bf16:dither,seed=3", "int8:group=32,dither,seed=3"])
def test_threads_and_norms(spec, x):
    once = get_format(spec).quantise(x).values
    weight = np.linspace(0.5, 2, x.shape[1], dtype=np.float32)
    norm = rms_norm_f32(x, quant=spec, weight=weight)
    for threads in (1, 3):
        with Executor(threads) as executor:
            assert_same_bits(round_trip(x, spec, executor=executor), once)
            assert_same_bits(rms_norm_f32(x, quant=spec, weight=weight, executor=executor), norm)
    plain = rms_norm_f32(x, weight=weight)
    assert 0 < np.abs(norm - plain).max() < 0.05


def test_each_site_draws_numbers_of_its_own(x):
    norms = [Place("ffn_norm", 0), Place("ffn_norm", 1)]
    outs = {}
    for seed in (1, 2):
        context = FakeQuant(map(Value, norms), f"*=bf16:dither,seed={seed}")
        for norm in norms:
            out = np.empty_like(x)
            context.rms_norm(norm, x, eps=1e-5, weight=np.ones(x.shape[1], np.float32), out=out)
            outs[seed, norm] = out.tobytes()
    assert len(set(outs.values())) == 4


def test_random_numbers():
    x = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    u = uniform(x, 0)
    assert 0 <= u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1
    assert np.allclose(np.histogram(u, 20, (0, 1))[0] / u.size, 0.05, atol=0.003)
    assert abs(np.corrcoef(u) - np.eye(len(u))).max() < 0.35
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    for seed in (1, 2**64 - 1):
        assert abs(np.corrcoef(uniform(x, seed).ravel(), u.ravel())[0, 1]) < 0.02


def test_ones_own_format_has_none():
    register_format("mine", np.rint)
    try:
        with pytest.raises(ValueError, match="format mine has no dither: how far apart its values lie"):
            get_format("mine:dither")
    finally:
        formats.unregister_format("mine")
