"""Prebuilt ggml through ctypes: the oracle that the kernels must equal bit for bit."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import lru_cache, partial
from pathlib import Path

import numpy as np


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


class _PoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("from_float", c_void_p),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int),
        ("nrows", c_int64),
    ]


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
        "ggml_rms_norm_inplace": [c_void_p, c_void_p, c_float],
        "ggml_mul": [c_void_p, c_void_p, c_void_p],
        "ggml_mul_mat": [c_void_p, c_void_p, c_void_p],
        "ggml_get_data": [c_void_p],
        "ggml_new_graph": [c_void_p],
    }.items():
        function = getattr(base, name)
        function.restype, function.argtypes = c_void_p, argtypes
    base.ggml_build_forward_expand.argtypes = [c_void_p, c_void_p]
    base.ggml_fp32_to_bf16_row_ref.argtypes = [POINTER(c_float), c_void_p, c_int64]
    base.ggml_threadpool_params_default.restype = _PoolParams
    base.ggml_threadpool_params_default.argtypes = [c_int]
    cpu.ggml_threadpool_new.restype = c_void_p
    cpu.ggml_threadpool_new.argtypes = [POINTER(_PoolParams)]
    for name in ("ggml_threadpool_free", "ggml_threadpool_pause", "ggml_threadpool_resume"):
        getattr(cpu, name).argtypes = [c_void_p]
    cpu.ggml_graph_plan.restype = _Plan
    cpu.ggml_graph_plan.argtypes = [c_void_p, c_int, c_void_p]
    cpu.ggml_graph_compute_with_ctx.argtypes = [c_void_p, c_void_p, c_int]
    cpu.ggml_graph_compute.argtypes = [c_void_p, POINTER(_Plan)]
    cpu.ggml_cpu_fp32_to_bf16.argtypes = [c_void_p, c_void_p, c_int64]
    cpu.ggml_cpu_bf16_to_fp32.argtypes = [c_void_p, c_void_p, c_int64]
    cpu.ggml_get_type_traits_cpu.restype = POINTER(_TypeTraits)
    cpu.ggml_get_type_traits_cpu.argtypes = [c_int]
    cpu.ggml_cpu_init()
    return base, cpu


def _array(base, tensor, shape):
    pointer = ctypes.cast(base.ggml_get_data(tensor), POINTER(c_float))
    return np.ctypeslib.as_array(pointer, shape=shape)


def _next_on_page(base, ctx):
    """Fill ctx up until the next tensor's data starts a page.

    As large arrays do: where out lies a little further into its page than x, loads of x wait
    for stores to out, and what is timed is that.
    """
    a, b = (base.ggml_get_data(base.ggml_new_tensor_2d(ctx, 0, 4, 1)) for _ in range(2))
    header = b - a - 16
    base.ggml_new_tensor_2d(ctx, 0, (-(b + 16 + 2 * header) % 4096 or 4096) // 4, 1)


class PreparedRmsNorm:
    """ggml_rms_norm's graph, built and planned once: ``compute()`` does nothing but compute it.

    ``x`` (rows, n), ``weight`` (n,) or None, and ``out`` (rows, n) are ggml's own memory, to be
    filled and read by the caller; in place, ``out`` is ``x``. The threads are started here too,
    and poll for work between two computations; ``pause()`` until ``resume()`` makes them sleep.
    Use it in a ``with`` block: the arrays end with it.
    """

    def __init__(
        self,
        rows: int,
        n: int,
        eps: float,
        *,
        weighted: bool = False,
        in_place: bool = False,
        threads: int = 1,
    ):
        base, cpu = _ggml()
        self._cpu = cpu
        self._free = base.ggml_free
        # a tensor each for x, the norm and its product with the weight; the rest for graph and padding
        self._ctx = base.ggml_init(_InitParams((2 + weighted) * rows * n * 4 + (1 << 20), None, False))
        _next_on_page(base, self._ctx)
        source = base.ggml_new_tensor_2d(self._ctx, 0, n, rows)
        _next_on_page(base, self._ctx)
        result = (base.ggml_rms_norm_inplace if in_place else base.ggml_rms_norm)(self._ctx, source, eps)
        self.x = _array(base, source, (rows, n))
        self.weight = None
        if weighted:
            w = base.ggml_new_tensor_2d(self._ctx, 0, n, 1)
            self.weight = _array(base, w, (n,))
            _next_on_page(base, self._ctx)
            result = base.ggml_mul(self._ctx, result, w)
        self.out = _array(base, result, (rows, n))
        graph = base.ggml_new_graph(self._ctx)
        base.ggml_build_forward_expand(graph, result)
        params = base.ggml_threadpool_params_default(threads)
        self._pool = cpu.ggml_threadpool_new(ctypes.byref(params))
        plan = cpu.ggml_graph_plan(graph, threads, self._pool)
        self._work = ctypes.create_string_buffer(plan.work_size)
        plan.work_data = ctypes.cast(self._work, c_void_p)
        self.compute = partial(cpu.ggml_graph_compute, graph, ctypes.byref(plan))
        self.pause = partial(cpu.ggml_threadpool_pause, self._pool)
        self.resume = partial(cpu.ggml_threadpool_resume, self._pool)

    def __enter__(self) -> PreparedRmsNorm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.resume()
        self._cpu.ggml_threadpool_free(self._pool)
        self._free(self._ctx)


def rms_norm(x: np.ndarray, eps: float, weight: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """ggml_rms_norm of (rows, n) float32, times (n,) weight if given."""
    with PreparedRmsNorm(*x.shape, eps, weighted=weight is not None, threads=threads) as ggml:
        ggml.x[:] = x
        if weight is not None:
            ggml.weight[:] = weight
        ggml.compute()
        return ggml.out.copy()


def float_to_bf16(x: np.ndarray) -> np.ndarray:
    """ggml_fp32_to_bf16_row_ref of (n,) float32 -> (n,) uint16."""
    base, _ = _ggml()
    out = np.empty(x.shape, np.uint16)
    base.ggml_fp32_to_bf16_row_ref(x.ctypes.data_as(POINTER(c_float)), out.ctypes.data_as(c_void_p), x.size)
    return out


def bf16_conversions() -> tuple:
    """ggml's own float32 -> bf16 and bf16 -> float32 of (from, to, n): addresses and a length."""
    _, cpu = _ggml()
    return cpu.ggml_cpu_fp32_to_bf16, cpu.ggml_cpu_bf16_to_fp32


def features() -> list[str]:
    """The instruction sets that this build of ggml was made for, of those that matter here."""
    _, cpu = _ggml()
    names = ("sse3", "avx", "avx2", "fma", "avx512", "avx512_bf16", "neon", "sve")
    return [name for name in names if getattr(cpu, f"ggml_cpu_has_{name}")()]


# name -> (ggml's number of the type, values per block, bytes per block, suffix of its functions)
BLOCK_FORMATS = {
    "q4_0": (2, 32, 18, "q4_0"),
    "q4_1": (3, 32, 20, "q4_1"),
    "q5_0": (6, 32, 22, "q5_0"),
    "q5_1": (7, 32, 24, "q5_1"),
    "q8_0": (8, 32, 34, "q8_0"),
    "q8_1": (9, 32, 36, "q8_1"),
    "q8_k": (15, 256, 292, "q8_K"),
    "iq4_nl": (20, 32, 18, "iq4_nl"),
}


def quantize(name: str, x: np.ndarray) -> np.ndarray:
    """quantize_row_*_ref of (k, block) float32 -> (k, bytes) uint8."""
    base, _ = _ggml()
    _, size, n_bytes, suffix = BLOCK_FORMATS[name]
    packed = np.zeros((x.size // size, n_bytes), np.uint8)
    function = getattr(base, f"quantize_row_{suffix}_ref")
    function.argtypes = [c_void_p, c_void_p, c_int64]
    function(x.ctypes.data, packed.ctypes.data, x.size)
    return packed


def block_round_trip(name: str, x: np.ndarray) -> np.ndarray:
    """What ggml stores of (k, block) float32, and reads back: quantize_row_*_ref, dequantize_row_*."""
    base, _ = _ggml()
    _, size, _, suffix = BLOCK_FORMATS[name]
    packed = quantize(name, x)
    if name == "q8_1":  # is only ever multiplied: ggml has no function that unpacks it
        d = packed[:, :2].copy().view(np.float16).astype(np.float32)
        with np.errstate(invalid="ignore"):
            return packed[:, 4:].view(np.int8) * d
    out = np.empty((len(packed), size), np.float32)
    function = getattr(base, f"dequantize_row_{suffix}")
    function.argtypes = [c_void_p, c_void_p, c_int64]
    function(packed.ctypes.data, out.ctypes.data, x.size)
    return out


def vec_dot_type(type_id: int) -> int:
    """What ggml's CPU code rounds the input of a product with a weight of this type to."""
    return _ggml()[1].ggml_get_type_traits_cpu(type_id).contents.vec_dot_type


def mul_mat(x: np.ndarray, packed: np.ndarray, type_id: int) -> np.ndarray:
    """ggml_mul_mat of x (n_tokens, n_in) float32 and packed weights (n_out, row_bytes) uint8."""
    base, cpu = _ggml()
    n_tokens, n_in = x.shape
    n_out = len(packed)
    ctx = base.ggml_init(
        _InitParams(packed.nbytes + 8 * (x.nbytes + n_out * n_tokens * 4) + (1 << 20), None, False)
    )
    try:
        w = base.ggml_new_tensor_2d(ctx, type_id, n_in, n_out)
        a = base.ggml_new_tensor_2d(ctx, 0, n_in, n_tokens)
        for tensor, data in ((w, np.ascontiguousarray(packed)), (a, np.ascontiguousarray(x, np.float32))):
            ctypes.memmove(base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
        result = base.ggml_mul_mat(ctx, w, a)
        graph = base.ggml_new_graph(ctx)
        base.ggml_build_forward_expand(graph, result)
        assert cpu.ggml_graph_compute_with_ctx(ctx, graph, 1) == 0
        return _array(base, result, (n_tokens, n_out)).copy()
    finally:
        base.ggml_free(ctx)
