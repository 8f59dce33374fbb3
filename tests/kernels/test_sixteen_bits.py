"""Arrays of 16 bits, and other libraries' tensors, in and out of the norm and the round trip."""

from __future__ import annotations

import gc
import itertools

import ml_dtypes
import numpy as np
import pytest
from dlpack_tensors import GPU, Tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same_bits, epsilons, float_arrays

from fq_kernels import (
    Executor,
    add_rms_norm_f32,
    bf16_to_float,
    float_to_bf16,
    force_isa,
    rms_norm_f32,
    round_trip,
    supported_isas,
)
from fq_kernels._kernels import N_STATS

F32 = np.float32
BF16 = ml_dtypes.bfloat16
TYPES = {"float16": np.float16, "bfloat16": BF16, "uint16": np.uint16, "float32": F32}


def as_type(values: np.ndarray, name: str) -> np.ndarray:
    if name == "uint16":
        return float_to_bf16(values)
    with np.errstate(all="ignore"):
        return values.astype(TYPES[name])


def as_float(array: np.ndarray) -> np.ndarray:
    return bf16_to_float(array) if array.dtype == np.uint16 else array.astype(F32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@given(x=float_arrays(), eps=epsilons, point=st.sampled_from(["raw", "weighted"]))
@pytest.mark.parametrize(("of", "into"), [*itertools.product(TYPES, TYPES)])
def test_the_norm_is_that_of_the_widened_values(of, into, x, eps, point):
    x = as_type(x, of)
    weight = as_type(normal(x.shape[-1]), of)
    options = {"eps": eps, "quant": "fp8_e4m3fn", "point": point}
    rows = x.size // x.shape[-1]
    ours, theirs = np.empty((rows, N_STATS)), np.empty((rows, N_STATS))
    expected = rms_norm_f32(as_float(x), weight=as_float(weight), **options, row_stats=theirs)
    out = np.empty(x.shape, TYPES[into])
    assert rms_norm_f32(x, weight=weight, out=out, **options, row_stats=ours) is out
    assert_same_bits(as_float(out), as_float(as_type(expected, into)))
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("quant", ["bf16:stochastic", "int8", "int8:tensor", "mxfp4"])
def test_many_rows_by_threads_have_the_bits_of_one_call(name, threads, quant):
    x = as_type(normal(700, 192), name)
    options = {"quant_rows": (3, 650), "first_row": 2**64 - 100}
    expected_stats, stats = np.empty((700, N_STATS)), np.empty((700, N_STATS))
    expected = round_trip(as_float(x), quant, **options, row_stats=expected_stats)
    with Executor(threads) as executor:
        out = round_trip(x, quant, executor=executor, **options, row_stats=stats)
        assert out.dtype == x.dtype
        assert_same_bits(as_float(out), as_float(as_type(expected, name)))
        assert stats.tobytes() == expected_stats.tobytes()
        normed = rms_norm_f32(x, quant=quant, executor=executor, **options)
    assert_same_bits(
        as_float(normed), as_float(as_type(rms_norm_f32(as_float(x), quant=quant, **options), name))
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "uint16"])
def test_the_sum_is_normed_as_it_is_kept(name):
    x, residual = as_type(normal(300, 160), name), as_type(normal(300, 160, seed=1), name)
    out, total = add_rms_norm_f32(x, residual)
    expected = as_type(as_float(x) + as_float(residual), name)
    assert total.dtype == out.dtype == x.dtype
    assert_same_bits(as_float(total), as_float(expected))
    assert_same_bits(as_float(out), as_float(as_type(rms_norm_f32(as_float(expected)), name)))
    wide = np.empty(x.shape, F32)
    out, total = add_rms_norm_f32(x, residual, total=wide)
    assert total is wide
    assert_same_bits(wide, as_float(x) + as_float(residual))
    assert_same_bits(as_float(out), as_float(as_type(rms_norm_f32(wide), name)))


def test_rows_far_outside_are_none():
    """Of more rows than are taken at a time."""
    x = normal(40000, 4).astype(BF16)
    for some, wanted in (((-(2**63), 5), (0, 5)), ((39990, 2**63 - 1), (39990, 40000))):
        found, expected = (rms_norm_f32(x, quant="fp8_e4m3fn", quant_rows=r) for r in (some, wanted))
        assert_same_bits(found.astype(F32), expected.astype(F32))


def test_in_place_and_with_strides():
    x = normal(6, 5, 64).astype(BF16)
    expected = rms_norm_f32(x)
    views = np.empty((5, 6, 64), BF16).transpose(1, 0, 2), np.empty((6, 5, 128), BF16)[..., :64]
    for view in views:
        view[:] = x
        assert rms_norm_f32(view, out=view) is view
        assert_same_bits(view.astype(F32), expected.astype(F32))
    a, b = x.copy(), normal(6, 5, 64, seed=1).astype(BF16)
    apart = add_rms_norm_f32(a, b)
    out, total = add_rms_norm_f32(a, b, out=a, total=b)
    assert out is a and total is b
    for found, wanted in zip((out, total), apart, strict=True):
        assert_same_bits(found.astype(F32), wanted.astype(F32))


def test_is_the_same_on_every_instruction_set():
    x = normal(40, 200).astype(BF16)
    found = set()
    for isa in supported_isas():
        force_isa(isa)
        found.add(rms_norm_f32(x, quant="f16", weight=x[0]).tobytes())
    force_isa(supported_isas()[-1])
    assert len(found) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": np.zeros((2, 9), BF16)}, "out has shape"),
        ({"out": "x[::-1]"}, "out overlaps x in part"),
        ({"out": np.zeros((1, 8), BF16).repeat(2, 0)[:, ::-1]}, "last axis of out"),
        ({"weight": np.zeros(9, BF16)}, "weight has shape"),
        ({"weight": np.zeros(16, BF16)[::2]}, "last axis of weight"),
        ({"executor": 5}, "executor"),
        ({"eps": -1}, "eps must be >= 0"),
        ({"quant": "int9"}, "int9"),
        ({"quant_rows": 5}, "quant_rows"),
        ({"first_row": -1}, "first_row"),
        ({"row_stats": np.zeros((2, 3))}, "row_stats"),
        ({"out": np.zeros((2, 8), np.int16)}, "out must have dtype float32"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_written(change, message):
    x = normal(2, 8).astype(BF16)
    before = x.copy()
    if isinstance(change.get("out"), str):
        change = {"out": x[::-1]}
    out = change.get("out", np.full((2, 8), 7, BF16))
    kept = out.copy()
    with pytest.raises((ValueError, TypeError), match=message):
        rms_norm_f32(x, **{"out": out, **change})
    assert x.tobytes() == before.tobytes() and out.tobytes() == kept.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, F32])
@pytest.mark.parametrize("over", ["x", "residual", "out", "total", "weight"])
def test_row_stats_over_another_array_are_refused(dtype, over):
    """They are written before the others are read."""
    room = np.zeros((2, N_STATS))
    arrays = {name: normal(2, N_STATS).astype(dtype) for name in ("x", "residual", "out", "total")}
    arrays["weight"] = normal(N_STATS).astype(dtype)
    of_room = room.reshape(-1).view(dtype)[: arrays[over].size].reshape(arrays[over].shape)
    of_room[:] = arrays[over]
    arrays[over] = of_room
    before = {name: array.tobytes() for name, array in arrays.items()}
    with pytest.raises(ValueError, match="overlaps"):
        add_rms_norm_f32(arrays.pop("x"), arrays.pop("residual"), **arrays, row_stats=room)
    assert all(array.tobytes() == before[name] for name, array in arrays.items())
    assert over in arrays or of_room.tobytes() == before[over]


@pytest.mark.parametrize("dtype", [np.float16, F32])
@pytest.mark.parametrize("written", ["out", "total"])
def test_what_is_written_over_the_weight_is_refused(dtype, written):
    x, residual, room = (normal(4000, 64, seed=seed).astype(dtype) for seed in range(3))
    before = room.tobytes()
    with pytest.raises(ValueError, match=f"{written} overlaps weight"):
        add_rms_norm_f32(x, residual, weight=room[0], **{written: room})
    assert room.tobytes() == before


@pytest.mark.parametrize("residual", [None, [1.0, 2.0]])
def test_a_residual_that_is_none_is_an_error(residual):
    for dtype in (np.float16, F32):
        with pytest.raises(TypeError, match="residual must be a numpy array"):
            add_rms_norm_f32(normal(2, 8).astype(dtype), residual)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.uint16])
def test_the_other_byte_order_is_refused(dtype):
    x = np.zeros((2, 8), np.dtype(dtype).newbyteorder())
    with pytest.raises(TypeError, match="x must have dtype float32"):
        rms_norm_f32(x)


def test_a_read_only_array_is_refused_as_out():
    x = normal(2, 8).astype(np.float16)
    x.flags.writeable = False
    rms_norm_f32(x)
    with pytest.raises(ValueError, match="out is read-only"):
        rms_norm_f32(x, out=x)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_tensors_go_in_and_out_where_they_are(name):
    values = as_type(normal(12, 64), "uint16" if name == "bfloat16" else name)
    residual = as_type(normal(12, 64, seed=1), "uint16" if name == "bfloat16" else name)
    wanted, wanted_total = add_rms_norm_f32(values, residual, weight=values[0], quant="bf16")
    room = np.empty_like(values)
    x, out = Tensor(values, name), Tensor(room, name)
    r, total = Tensor(residual, name), Tensor(residual.copy(), name)
    weight = Tensor(values[0], name)
    found = add_rms_norm_f32(x, r, weight=weight, quant="bf16", out=out, total=total)
    assert found[0] is out and found[1] is total
    assert room.tobytes() == wanted.tobytes() and total.array.tobytes() == wanted_total.tobytes()
    expected = rms_norm_f32(values)
    assert rms_norm_f32(x).tobytes() == expected.tobytes()
    assert rms_norm_f32(x, out=x) is x  # in place
    assert values.tobytes() == expected.tobytes()
    assert round_trip(x, "fp8_e5m2", out=out) is out
    assert room.tobytes() == round_trip(values, "fp8_e5m2").tobytes()
    gc.collect()
    for tensor in (x, r, weight, out, total):
        assert tensor.given == tensor.back > 0


def test_a_tensors_strides_and_offset():
    room = normal(9, 64).astype(np.float16)
    every_second = Tensor(room[::2], "float16")
    assert rms_norm_f32(every_second).tobytes() == rms_norm_f32(room[::2].copy()).tobytes()
    later = Tensor(room[1:], "float16", offset=room[:1].nbytes, without_strides=True)
    assert rms_norm_f32(later).tobytes() == rms_norm_f32(room[1:]).tobytes()
    none = Tensor(np.empty((0, 64), F32), "float32")
    assert rms_norm_f32(none).shape == (0, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": GPU}, "x is not in the processor's memory"),
        ({"dtype": "float64"}, "x must have elements of float32, float16 or bfloat16"),
        ({"major": 2}, "x is of another version of DLPack"),
    ],
)
def test_other_tensors_are_refused(options, message):
    tensor = Tensor(np.zeros((2, 8)), **{"dtype": "float32", **options})
    with pytest.raises(TypeError, match=message):
        rms_norm_f32(tensor)


@pytest.mark.parametrize("options", [{"read_only": True}, {"copied": True}, {"major": 0}])
def test_a_tensor_that_may_not_be_written_is_refused_as_out(options):
    """A library of before versions cannot say that it may be."""
    array = normal(2, 8)
    before = array.tobytes()
    tensor = Tensor(array, "float32", **options)
    assert rms_norm_f32(tensor).tobytes() == rms_norm_f32(array).tobytes()
    with pytest.raises(ValueError, match="out is read-only"):
        rms_norm_f32(tensor, out=tensor)
    assert array.tobytes() == before
    gc.collect()
    assert tensor.given == tensor.back > 0


@pytest.mark.parametrize("result", [None, "used"])
def test_what_is_no_capsule_is_an_error(result):
    class Broken:
        def __dlpack__(self, **options):
            return result

    with pytest.raises(TypeError, match="x does not give its memory: no capsule"):
        rms_norm_f32(Broken())


@pytest.mark.parametrize("shape", [(1 << 62, 8), (1 << 61, 1), (-1, 8), (1 << 31, 1 << 31)])
def test_shapes_that_no_array_can_have_are_an_error(shape):
    tensor = Tensor(normal(2, 8), "float32", shape=shape)
    with pytest.raises(TypeError, match="x: no array has"):
        rms_norm_f32(tensor)
    gc.collect()
    assert tensor.given == tensor.back == 1


def test_what_a_library_says_of_its_tensor_is_passed_on():
    class Tracked:
        def __dlpack__(self, **options):
            raise BufferError("it needs a gradient")

    with pytest.raises(TypeError, match="residual does not give its memory: it needs a gradient"):
        add_rms_norm_f32(normal(2, 8), Tracked())
