"""Prebuilt ggml through ctypes: the oracle that the kernels must equal bit for bit."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path

import numpy as np


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


@lru_cache
def _ggml() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    import libggml

    folder = next(Path(libggml.__file__).parent.glob("lib*/libggml-base.so")).parent
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    base.ggml_init.restype = c_void_p
    base.ggml_init.argtypes = [_InitParams]
    base.ggml_free.argtypes = [c_void_p]
    for name, argtypes in {
        "ggml_new_tensor_2d": [c_void_p, c_int, c_int64, c_int64],
        "ggml_rms_norm": [c_void_p, c_void_p, c_float],
        "ggml_mul": [c_void_p, c_void_p, c_void_p],
        "ggml_get_data": [c_void_p],
        "ggml_new_graph": [c_void_p],
    }.items():
        function = getattr(base, name)
        function.restype, function.argtypes = c_void_p, argtypes
    base.ggml_build_forward_expand.argtypes = [c_void_p, c_void_p]
    base.ggml_fp32_to_bf16_row_ref.argtypes = [POINTER(c_float), c_void_p, c_int64]
    cpu.ggml_graph_compute_with_ctx.argtypes = [c_void_p, c_void_p, c_int]
    cpu.ggml_cpu_init()
    return base, cpu


def _array(base, tensor, shape):
    pointer = ctypes.cast(base.ggml_get_data(tensor), POINTER(c_float))
    return np.ctypeslib.as_array(pointer, shape=shape)


def rms_norm(x: np.ndarray, eps: float, weight: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """ggml_rms_norm of (rows, n) float32, times (n,) weight if given."""
    base, cpu = _ggml()
    rows, n = x.shape
    ctx = base.ggml_init(_InitParams(4 * x.size * 4 + (1 << 22), None, False))
    try:
        source = base.ggml_new_tensor_2d(ctx, 0, n, rows)
        _array(base, source, x.shape)[:] = x
        result = base.ggml_rms_norm(ctx, source, eps)
        if weight is not None:
            w = base.ggml_new_tensor_2d(ctx, 0, n, 1)
            _array(base, w, (n,))[:] = weight
            result = base.ggml_mul(ctx, result, w)
        graph = base.ggml_new_graph(ctx)
        base.ggml_build_forward_expand(graph, result)
        cpu.ggml_graph_compute_with_ctx(ctx, graph, threads)
        return _array(base, result, x.shape).copy()
    finally:
        base.ggml_free(ctx)


def float_to_bf16(x: np.ndarray) -> np.ndarray:
    """ggml_fp32_to_bf16_row_ref of (n,) float32 -> (n,) uint16."""
    base, _ = _ggml()
    out = np.empty(x.shape, np.uint16)
    base.ggml_fp32_to_bf16_row_ref(x.ctypes.data_as(POINTER(c_float)), out.ctypes.data_as(c_void_p), x.size)
    return out
