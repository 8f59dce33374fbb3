from collections.abc import Callable, Iterable, Sequence
from mmap import mmap
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from .formats import Format
from .units import NormUnit

_F = TypeVar("_F", bound=Callable[..., Any])
_Bf16Rounding: TypeAlias = Literal[
    "nearest-even", "nearest-even-ftz", "truncate", "nearest-away", "stochastic", "up", "down", "odd"
]

class _DLPack(Protocol):
    def __dlpack__(self, **kwargs: Any) -> Any: ...

# bfloat16 of ml_dtypes has no type that numpy's stubs know
_Float32: TypeAlias = npt.NDArray[np.float32]
_Floats: TypeAlias = npt.NDArray[Any] | _DLPack
_Out = TypeVar("_Out", bound=_Floats)

N_STATS: int
ATTENTION_MAX_DIM: int
"""The longest head, in elements, up to which ``attention`` adds up in one order for any number of tokens."""
MAX_GRADS: int
"""The most gradients that ``error_products`` takes at a time."""
MATVEC_MAX_TOKENS: int
"""The most tokens that ``matvec`` takes; with more ``mul_mat`` is faster."""
MATVECS_MAX: int
"""The most weights that ``matvecs`` and ``mul_mats`` take at a time."""
PACKED_TYPES: dict[int, tuple[int, int]]
"""ggml's number of a tensor type that kernels read -> values and bytes of a block."""

def supported_isas() -> list[str]: ...
def get_include() -> str: ...
def isa() -> str: ...
def force_isa(name: str) -> None: ...

class default_fpu:
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...
    def __call__(self, fn: _F) -> _F: ...

class Executor:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    def map(self, fn: Callable[[int], object], n: int) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

@overload
def rms_norm_f32(
    x: _Float32,
    *,
    eps: float = 1e-5,
    weight: _Floats | None = None,
    quant: str | Format | None = None,
    point: Literal["raw", "weighted"] = "raw",
    out: None = None,
    executor: Executor | None = None,
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
    row_stats: npt.NDArray[np.float64] | None = None,
    result_quant: str | Format | None = None,
) -> _Float32: ...
@overload
def rms_norm_f32(
    x: _Floats,
    *,
    eps: float = 1e-5,
    weight: _Floats | None = None,
    quant: str | Format | None = None,
    point: Literal["raw", "weighted"] = "raw",
    out: _Out,
    executor: Executor | None = None,
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
    row_stats: npt.NDArray[np.float64] | None = None,
    result_quant: str | Format | None = None,
) -> _Out: ...
@overload
def rms_norm_f32(
    x: _Floats,
    *,
    eps: float = 1e-5,
    weight: _Floats | None = None,
    quant: str | Format | None = None,
    point: Literal["raw", "weighted"] = "raw",
    out: _Floats | None = None,
    executor: Executor | None = None,
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
    row_stats: npt.NDArray[np.float64] | None = None,
    result_quant: str | Format | None = None,
) -> Any: ...
def rms_norm_unit(
    x: _Float32,
    unit: NormUnit,
    *,
    eps: float = 1e-5,
    weight: _Float32 | None = None,
    out: _Float32 | None = None,
    executor: Executor | None = None,
    first_row: int = 0,
) -> _Float32: ...
def unit_gains(unit: NormUnit, weight: _Float32) -> _Float32: ...
def add_rms_norm_f32(
    x: _Floats,
    residual: _Floats,
    *,
    eps: float = 1e-5,
    weight: _Floats | None = None,
    quant: str | Format | None = None,
    point: Literal["raw", "weighted"] = "raw",
    out: _Floats | None = None,
    total: _Floats | None = None,
    executor: Executor | None = None,
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
    row_stats: npt.NDArray[np.float64] | None = None,
) -> tuple[Any, Any]: ...
@overload
def round_trip(
    x: _Float32,
    quant: str | Format,
    *,
    out: None = None,
    executor: Executor | None = None,
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
    row_stats: npt.NDArray[np.float64] | None = None,
) -> _Float32: ...
@overload
def round_trip(
    x: _Floats,
    quant: str | Format,
    *,
    out: _Out,
    executor: Executor | None = None,
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
    row_stats: npt.NDArray[np.float64] | None = None,
) -> _Out: ...
@overload
def round_trip(
    x: _Floats,
    quant: str | Format,
    *,
    out: _Floats | None = None,
    executor: Executor | None = None,
    quant_rows: tuple[int, int] | None = None,
    first_row: int = 0,
    row_stats: npt.NDArray[np.float64] | None = None,
) -> Any: ...
def bf16_round_trip(
    x: npt.NDArray[np.float32],
    *,
    rounding: _Bf16Rounding = "nearest-even",
    seed: int = 0,
    out: npt.NDArray[np.float32] | None = None,
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def float_to_bf16(
    x: npt.NDArray[np.float32],
    *,
    rounding: _Bf16Rounding = "nearest-even",
    seed: int = 0,
    executor: Executor | None = None,
) -> npt.NDArray[np.uint16]: ...
def bf16_to_float(
    bits: npt.NDArray[np.uint16], *, executor: Executor | None = None
) -> npt.NDArray[np.float32]: ...
def dequantize(
    packed: npt.NDArray[np.uint8],
    ggml_type: int,
    *,
    out: npt.NDArray[np.float32] | None = None,
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def matvec(
    x: npt.NDArray[np.float32],
    packed: npt.NDArray[np.uint8],
    ggml_type: int,
    *,
    out: npt.NDArray[np.float32] | None = None,
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def matvecs(
    x: npt.NDArray[np.float32],
    weights: Sequence[tuple[npt.NDArray[np.uint8], int]],
    outs: Sequence[npt.NDArray[np.float32] | None] | None = None,
    *,
    executor: Executor | None = None,
) -> list[npt.NDArray[np.float32]]: ...
def mul_mat(
    x: npt.NDArray[np.float32],
    packed: npt.NDArray[np.uint8],
    ggml_type: int,
    *,
    out: npt.NDArray[np.float32],
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def mul_mats(
    x: npt.NDArray[np.float32],
    weights: Sequence[tuple[npt.NDArray[np.uint8], int]],
    outs: Sequence[npt.NDArray[np.float32]],
    *,
    executor: Executor | None = None,
) -> list[npt.NDArray[np.float32]]: ...
def rope(
    x: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
    *,
    neox: bool = False,
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def swiglu(
    gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32], *, executor: Executor | None = None
) -> npt.NDArray[np.float32]: ...
def geglu(
    gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32], *, executor: Executor | None = None
) -> npt.NDArray[np.float32]: ...
def soft_cap(
    x: npt.NDArray[np.float32], cap: float, *, executor: Executor | None = None
) -> npt.NDArray[np.float32]: ...
def attention(
    q: npt.NDArray[np.float32],
    k: npt.NDArray[np.float32],
    v: npt.NDArray[np.float32],
    k_cache: npt.NDArray[np.float32],
    v_cache: npt.NDArray[np.float32],
    n_past: int,
    *,
    scale: float | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    out: npt.NDArray[np.float32],
    decoding: bool = False,
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def error_products(
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32],
    grads: npt.NDArray[np.float32],
    *,
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def error_columns(
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32],
    centre: npt.NDArray[np.float32],
    *,
    executor: Executor | None = None,
) -> npt.NDArray[np.float32]: ...
def format_errors(
    x: npt.NDArray[np.float32],
    formats: Iterable[Format | str],
    weights: npt.NDArray[np.float32],
    grads: npt.NDArray[np.float32],
    *,
    centre: npt.NDArray[np.float32] | None = None,
    first_row: int = 0,
    executor: Executor | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]: ...
def causal_exp(x: npt.NDArray[np.float32], n_first: int, window: int = 0) -> npt.NDArray[np.float32]: ...
def log_sum_exp(
    x: npt.NDArray[np.float32], *, executor: Executor | None = None
) -> npt.NDArray[np.float64]: ...
def log_softmax(
    x: npt.NDArray[np.float32],
    *,
    log_p: npt.NDArray[np.float64],
    p: npt.NDArray[np.float64],
    executor: Executor | None = None,
) -> None: ...
@overload
def exp(x: float) -> float: ...
@overload
def exp(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...
@overload
def log(x: float) -> float: ...
@overload
def log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...
@overload
def cos(x: float) -> float: ...
@overload
def cos(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...
@overload
def sin(x: float) -> float: ...
@overload
def sin(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...

class GGUFStrings(Sequence[str]):
    @property
    def longest(self) -> int: ...
    @property
    def end(self) -> int: ...
    def __init__(self, data: bytes | bytearray | memoryview | mmap, start: int, count: int) -> None: ...
    @classmethod
    def of(cls, strings: Iterable[str]) -> Self: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: int, /) -> str: ...
    @overload
    def __getitem__(self, key: slice, /) -> list[str]: ...
    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int: ...
    def count(self, value: Any) -> int: ...
    def hashes(self) -> npt.NDArray[np.uint64]: ...
    def find(self, wanted: Iterable[str]) -> dict[str, int]: ...

def kl_divergence(
    x: npt.NDArray[np.float32],
    log_p: npt.NDArray[np.float64],
    p: npt.NDArray[np.float64],
    *,
    executor: Executor | None = None,
) -> npt.NDArray[np.float64]: ...
