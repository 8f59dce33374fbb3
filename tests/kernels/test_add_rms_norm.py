"""The fused residual add: the bits of the addition, and then of the norm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same_bits, epsilons, every_isa, float_arrays, seeds

from fq_kernels import Executor, add_rms_norm_f32, rms_norm_f32
from fq_kernels._kernels import N_STATS

F32 = np.float32
FORMATS = [None, "bf16", "fp8_e4m3fn", "int8", "mxfp4", "int8:tensor"]


PLACES = [
    ("x", None), ("residual", None), ("x", "residual"), ("residual", "x"), (None, "x"), (None, "residual"),
    ("own", "own"),
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@given(x=float_arrays(), eps=epsilons, seed=seeds, point=st.sampled_from(["raw", "weighted"]))
@pytest.mark.parametrize("quant", FORMATS)
def test_is_the_addition_and_then_the_norm(quant, x, eps, seed, point):
    residual, weight = normal(*x.shape, seed=seed), normal(x.shape[-1], seed=seed + 1)
    with np.errstate(all="ignore"):
        expected = x + residual
    rows = expected.size // expected.shape[-1]
    theirs, ours = np.empty((rows, N_STATS)), np.empty((rows, N_STATS))
    options = {"eps": eps, "weight": weight, "quant": quant, "point": point}
    for isa in every_isa():
        wanted = rms_norm_f32(expected, **options, row_stats=theirs)
        out, total = add_rms_norm_f32(x, residual, **options, row_stats=ours)
        assert_same_bits(total, expected, isa)
        assert_same_bits(out, wanted, isa)
        assert ours.tobytes() == theirs.tobytes(), isa


def test_where_the_sum_and_the_norm_go():
    a, b = normal(70, 96), normal(70, 96, seed=1)
    total = a + b
    out = rms_norm_f32(total)
    for total_in, out_in in PLACES:
        x, residual = a.copy(), b.copy()
        places = {"x": x, "residual": residual, None: None}
        into = places[total_in] if total_in != "own" else np.empty_like(x)
        to = places[out_in] if out_in != "own" else np.empty_like(x)
        found_out, found_total = add_rms_norm_f32(x, residual, total=into, out=to)
        assert_same_bits(found_total, total)
        assert_same_bits(found_out, out)
        assert into is None or found_total is into
        assert to is None or found_out is to
        for name, array, before in (("x", x, a), ("residual", residual, b)):
            if name not in (total_in, out_in):
                assert_same_bits(array, before)


@pytest.mark.threads
def test_at_any_number_of_threads_and_of_any_layout():
    x, residual = normal(300, 64), normal(300, 128, seed=1)[:, 32:96]
    out, total = add_rms_norm_f32(x, residual, quant="bf16")
    for threads in (2, 3):
        with Executor(threads) as executor:
            again = add_rms_norm_f32(x, residual, quant="bf16", executor=executor)
        assert_same_bits(again[0], out)
        assert_same_bits(again[1], total)
    turned = add_rms_norm_f32(x[::-1], residual[::-1], quant="bf16")
    assert_same_bits(turned[0], out[::-1])


def test_errors_name_the_argument():
    x = np.ones((2, 8), F32)
    memory = np.ones((3, 8), F32)
    with pytest.raises(ValueError, match=r"residual has shape \(3, 8\), x has \(2, 8\)"):
        add_rms_norm_f32(x, memory)
    with pytest.raises(TypeError, match=r"residual must have dtype float32"):
        add_rms_norm_f32(x, x.astype(np.float64))
    with pytest.raises(ValueError, match=r"total has shape \(3, 8\), x has \(2, 8\)"):
        add_rms_norm_f32(x, x, total=memory)
    with pytest.raises(ValueError, match="total overlaps residual in part"):
        add_rms_norm_f32(x, memory[:2], total=memory[1:])
    with pytest.raises(ValueError, match="total overlaps x in part"):
        add_rms_norm_f32(memory[:2], x, total=memory[1:])
    with pytest.raises(ValueError, match="out overlaps residual in part"):
        add_rms_norm_f32(x, memory[:2], out=memory[1:])
    with pytest.raises(ValueError, match="out overlaps x in part"):
        add_rms_norm_f32(memory[:2], x, out=memory[1:])
    with pytest.raises(ValueError, match="out overlaps total"):
        add_rms_norm_f32(x, memory[:2], total=x, out=x)
    assert (x == 1).all() and (memory == 1).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty(shape):
    x = np.empty(shape, F32)
    out, total = add_rms_norm_f32(x, x)
    assert out.shape == total.shape == shape
