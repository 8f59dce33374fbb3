"""rms_norm_unit: each step as its contract has it, on every instruction set, at any thread count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same_bits, epsilons, every_isa, float_arrays, layouts, make_row, shapes

from fq_kernels import Executor, NormUnit, get_format, reference, rms_norm_f32, rms_norm_unit, round_trip

F32 = np.float32
LENGTHS = (1, 2, 3, 7, 16, 31, 63, 64, 65, 511, 512, 513, 576, 1023, 1024, 1100, 1537, 8200)
UNITS = [
    "",
    "acc=f32",
    "acc=bf16",
    "acc=bf16:truncate",
    "acc=fp8_e5m2:up",
    "acc=e8m10:stochastic,seed=3",
    "acc=f32;order=lanes=512",
    "acc=bf16;order=lanes=16",
    "acc=bf16:stochastic,seed=5;order=lanes=8",
    "acc=f32;order=tree",
    "acc=f16:stochastic,seed=1;order=tree",
    "acc=bf16;order=chunk=7",
    "acc=bf16:stochastic;order=chunk=100",
    "acc=bf16;order=chunk=8,f32",
    "acc=f32;order=torch",
    "acc=f16:stochastic,seed=6;order=torch",
    "acc=f32;order=chunk=50,bf16:stochastic,seed=4",
    "x=bf16;square=bf16;mean=bf16;rsqrt=bf16;raw=bf16;weight=bf16;out=bf16",
    "x=fp8_e4m3;square=f16;acc=bf16;order=tree;out=fp8_e4m3:stochastic,seed=2",
    "x=bf16:stochastic;raw=bf16:stochastic;mean=e8m3:stochastic,seed=8;rsqrt=e8m5:stochastic",
    "eps=outside;rsqrt=bf16",
    "rsqrt=lut=1",
    "rsqrt=lut=5",
    "rsqrt=lut=16,linear,bf16",
    "rsqrt=newton=1",
    "rsqrt=newton=2,lut=4,f16",
    "gain=1+w,bf16;weight=bf16",
    "acc=hif8;order=lanes=4;out=int8:scale=0.02",
]


def weight_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).uniform(0.5, 2, n).astype(F32)


def rows_of(n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    kinds = ("normal", "subnormal squares", "overflowing sum", "zero", "sparse", "nan", "infinite", "huge")
    return np.array([make_row(kind, n, rng) for kind in kinds])


@pytest.mark.parametrize("unit", UNITS)
class TestEverySet:
    def test_equals_the_reference(self, unit):
        slow = "hif8" in unit or not any(order in unit for order in ("lanes", "tree", "torch"))
        for n in LENGTHS[:-6] if slow and "acc=" in unit else LENGTHS:
            x, weight = rows_of(n), weight_of(n)
            expected = reference.rms_norm_unit(x, unit, eps=1e-6, weight=weight, first_row=5)
            for isa in every_isa():
                got = rms_norm_unit(x, unit, eps=1e-6, weight=weight, first_row=5)
                assert_same_bits(got, expected, isa)


@given(data=st.data(), unit=st.sampled_from(UNITS), eps=epsilons)
def test_any_layout_in_place_or_not(isa, data, unit, eps):
    values = data.draw(float_arrays(shapes(n=st.sampled_from([1, 5, 33, 130]))))
    weight = weight_of(values.shape[-1])
    expected = reference.rms_norm_unit(values, unit, eps=eps, weight=weight)
    memory, x = data.draw(layouts(values.ndim)).place(values)
    before = memory.copy()
    assert_same_bits(rms_norm_unit(x, unit, eps=eps, weight=weight), expected)
    assert memory.tobytes() == before.tobytes()
    assert rms_norm_unit(x, unit, eps=eps, weight=weight, out=x) is x
    assert_same_bits(x, expected)


@given(x=float_arrays(), eps=epsilons)
def test_a_unit_without_steps_is_the_norm_itself(isa, x, eps):
    weight = weight_of(x.shape[-1])
    assert_same_bits(rms_norm_unit(x, "", eps=eps, weight=weight), rms_norm_f32(x, eps=eps, weight=weight))
    assert_same_bits(rms_norm_unit(x, "acc=f64;x=f32", eps=eps), rms_norm_f32(x, eps=eps))


@pytest.mark.threads
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_and_parts_change_nothing(unit, threads):
    x, weight = np.random.default_rng(0).standard_normal((50, 70)).astype(F32), weight_of(70)
    whole = rms_norm_unit(x, unit, weight=weight)
    with Executor(threads) as executor:
        assert_same_bits(rms_norm_unit(x, unit, weight=weight, executor=executor), whole)
    parts = [
        rms_norm_unit(x[:17], unit, weight=weight),
        rms_norm_unit(x[17:], unit, weight=weight, first_row=17),
    ]
    assert_same_bits(np.concatenate(parts), whole)


# ---------------------------------------------------------------- steps, by hand


def scale(x: list[float], unit: str, eps: float = 0.0) -> float:
    """What a row is multiplied by."""
    row = np.array([x], F32)
    return float(rms_norm_unit(row, unit, eps=eps)[0, 0] / row[0, 0])


ONES = [16.0] + [1.0] * 255  # squares: 256, and 255 ones


@pytest.mark.parametrize(
    ("unit", "total"),
    [
        ("acc=f32", 511),
        ("acc=bf16", 256),  # 256 + 1 is a tie, of which the even one is 256
        ("acc=bf16:up", 1020),  # 128 ones add a step of 2 each, 127 one of 4
        ("acc=bf16;order=tree", 510),  # 257 is a tie: 256; all that is added after it is exact
        ("acc=bf16;order=lanes=2", 256 + 128),  # 256 stays; the other lane has 128
        ("acc=bf16;order=chunk=16", 256 + 15 * 16),  # the first chunk stays at 256
        ("acc=f32;order=chunk=16,bf16", 512),  # 271 is a tie to 272; then 15 times 16
        ("acc=bf16;order=chunk=255,f32", 256 + 1),
    ],
)
def test_orders_of_the_sum(unit, total):
    assert math.isclose(256 / scale(ONES, unit) ** 2, total, rel_tol=1e-6)


def test_lanes_are_folded_in_halves_and_a_tree_adds_neighbours():
    # squares 256 and 1: 256 + 1 is a tie to 256, but 1 + 1 is kept
    for x, lanes, tree in (([16, 1, 0, 1], 258, 256), ([16, 0, 1, 1], 256, 258)):
        for order, total in (("lanes=4", lanes), ("tree", tree)):
            mean = 1 / scale(x, f"acc=bf16;order={order}") ** 2
            assert math.isclose(4 * mean, total, rel_tol=1e-6), (x, order)


def test_an_odd_one_is_carried_up_as_it_is():
    # 1 + 1, and 257, which is no bf16 number: 259 lies between 258 and 260, 256 + 2 would be 258
    assert round(3 / scale([1, 1, math.sqrt(257)], "acc=bf16;order=tree") ** 2) == 260


def test_squares_means_and_roots_are_rounded():
    # 1.0625^2 = 1.12890625, in e8m2 1.25; mean 1.25; out of bf16's steps each in turn
    assert math.isclose(scale([1.0625], "square=e8m2"), 1 / math.sqrt(1.25), rel_tol=1e-6)
    assert math.isclose(scale([1.0625], "mean=e8m1"), 1.0, rel_tol=1e-6)
    assert scale([1.0625], "rsqrt=e8m1") == 1.0
    assert scale([3.0], "rsqrt=e8m2") == 0.3125


def test_eps_is_added_before_the_mean_is_rounded_again_or_outside():
    # 1 + 0.25 in e8m1 is 1; in e8m2 1.25
    assert scale([1.0], "mean=e8m1", 0.25) == 1.0
    assert math.isclose(scale([1.0], "mean=e8m2", 0.25), 1 / math.sqrt(1.25), rel_tol=1e-6)
    assert scale([2.0], "eps=outside", 2.0) == 0.25
    assert math.isclose(scale([2.0], "eps=inside", 2.0), 1 / math.sqrt(6), rel_tol=1e-6)


def test_what_is_read_is_what_is_multiplied():
    x = np.array([[1.01, 2.03]], F32)
    y = rms_norm_unit(x, "x=e8m2", eps=0)
    assert_same_bits(y, rms_norm_f32(round_trip(x, "e8m2"), eps=0))


def test_raw_weight_gain_and_out_round_one_after_the_other():
    x, weight = np.random.default_rng(0).standard_normal((4, 32)).astype(F32), weight_of(32)
    plain = rms_norm_f32(x)
    raw = round_trip(plain, "e8m3")
    assert_same_bits(rms_norm_unit(x, "raw=e8m3", weight=weight), raw * weight)
    assert_same_bits(rms_norm_unit(x, "weight=e8m3", weight=weight), plain * round_trip(weight, "e8m3"))
    assert_same_bits(rms_norm_unit(x, "out=e8m3", weight=weight), round_trip(plain * weight, "e8m3"))
    assert_same_bits(rms_norm_unit(x, "out=e8m3"), raw)
    stored = round_trip(weight - F32(1), "e8m3")
    assert_same_bits(rms_norm_unit(x, "gain=1+w;weight=e8m3", weight=weight), plain * (F32(1) + stored))
    gain = round_trip(F32(1) + stored, "e8m2")
    assert_same_bits(rms_norm_unit(x, "gain=1+w,e8m2;weight=e8m3", weight=weight), plain * gain)
    assert not np.array_equal(gain, F32(1) + stored) and not np.array_equal(raw, plain)


def root(v: float, unit: str) -> float:
    return float(reference.inverse_root(F32(v), NormUnit.parse(unit)))


def test_a_table_of_inverse_roots():
    # four entries: [1, 1.5), [1.5, 2), [2, 3), [3, 4)
    for v in (1.0, 1.49):
        assert math.isclose(root(v, "rsqrt=lut=2"), 2 / (1 + math.sqrt(1.5)), rel_tol=1e-7)
    for v in (2.0, 2.9):
        assert math.isclose(root(v, "rsqrt=lut=2"), 2 / (math.sqrt(2) + math.sqrt(3)), rel_tol=1e-7)
    assert root(4 * 2.9, "rsqrt=lut=2") == root(2.9, "rsqrt=lut=2") / 2
    assert root(2.9 / 2**20, "rsqrt=lut=2") == root(2.9, "rsqrt=lut=2") * 2**10
    assert math.isclose(root(1.25, "rsqrt=lut=2,linear"), (1 + 1 / math.sqrt(1.5)) / 2, rel_tol=1e-7)


@pytest.mark.parametrize("bits", [1, 4, 8, 12])
def test_how_far_a_table_is_off(bits):
    v = np.geomspace(1e-20, 1e20, 999).astype(F32)
    # a cell is 2^(1 - bits) wide at 1
    for unit, bound in (
        (f"rsqrt=lut={bits}", 0.5 * 0.5**bits),
        (f"rsqrt=lut={bits},linear", 0.375 * 0.25**bits),
    ):
        off = [abs(root(x, unit) * math.sqrt(x) - 1) for x in v]
        assert bound / 2.1 < max(off) < bound + 2e-7


def test_newtons_steps():
    # the well-known first guess and step for 4
    assert root(4.0, "rsqrt=newton=1") == pytest.approx(0.49915358, abs=1e-8)
    v = np.geomspace(1e-20, 1e20, 999).astype(F32)
    for unit, bound in (("newton=1", 1.76e-3), ("newton=2", 4.8e-6), ("newton=1,lut=6", 1.5 / 128**2)):
        off = [abs(root(x, f"rsqrt={unit}") * math.sqrt(x) - 1) for x in v]
        assert bound / 3 < max(off) < bound


def test_steps_draw_random_numbers_of_their_own():
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(F32)
    unit = NormUnit.parse("x=bf16:stochastic;out=bf16:stochastic").seeded("ffn_norm[3]")
    formats = unit.formats
    assert formats["x"].seed != formats["out"].seed
    assert unit.seeded("a").formats["x"].seed != unit.seeded("b").formats["x"].seed
    for order in ("lanes=8", "tree", "chunk=8"):  # folds and the elements' additions too
        fmt = "e8m3:stochastic,seed=1"
        means = 1 / np.square(rms_norm_unit(x, f"acc={fmt};order={order}", eps=0)[:, 0] / x[:, 0])
        exact = np.square(x.astype(np.float64)).mean(axis=1)
        ratio = means / exact
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / 8 and ratio.std() > 0.01, "unbiased, and random"


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"unit": 3}, TypeError, "unit must be a NormUnit or a string"),
        ({"unit": "acc=bf17"}, ValueError, "step acc: unknown format 'bf17'"),
        ({"eps": -1}, ValueError, "eps must be >= 0"),
        ({"eps": "a"}, TypeError, "eps must be a number"),
        ({"weight": np.ones(3, F32)}, ValueError, "weight has shape"),
        ({"weight": np.ones(4)}, TypeError, "weight must have dtype float32"),
        ({"x": np.ones((2, 4))}, TypeError, "x must have dtype float32"),
        ({"out": np.ones((2, 3), F32)}, ValueError, "out"),
        ({"first_row": "a"}, ValueError, "first_row"),
    ],
)
def test_bad_arguments(arguments, error, message):
    given_ = {"x": np.ones((2, 4), F32), "unit": "acc=bf16"} | arguments
    with pytest.raises(error, match=message):
        rms_norm_unit(given_.pop("x"), given_.pop("unit"), **given_)


def test_no_rows_and_a_weight_that_is_out():
    assert rms_norm_unit(np.empty((0, 4), F32), "acc=bf16").shape == (0, 4)
    weight = np.ones(4, F32)
    with pytest.raises(ValueError, match="overlap"):
        rms_norm_unit(np.ones((1, 4), F32), "acc=bf16", weight=weight, out=weight.reshape(1, 4))


def test_a_format_without_a_kernel_serves_too():
    x = np.random.default_rng(0).standard_normal((3, 20)).astype(F32)
    y = rms_norm_unit(x, "out=hif8")
    assert_same_bits(y, get_format("hif8").quantise(rms_norm_f32(x)).values)
