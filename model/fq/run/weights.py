"""Packed weights in the mapped file, and products with them that never unpack a whole tensor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fq_kernels import MATVEC_MAX_TOKENS, MATVECS_MAX, PACKED_TYPES, Executor, dequantize, matvecs
from fq_kernels import mul_mat as packed_mul_mat

from ..gguf.types import GGMLType
from .activations import Rounded, minimums

# Elements of one unpacked panel: 1.5 MB, so that a panel stays in L2 between unpacking and
# multiplying.
PANEL_ELEMENTS = 384 * 1024
MIN_PANEL_ROWS, MAX_PANEL_ROWS = 96, 512

FLOAT32 = 0  # ggml's number of the type

_scratch = threading.local()


@dataclass(frozen=True)
class Weight:
    """A 2-D tensor: packed (n_out, row_bytes) uint8, rows of n_in elements."""

    packed: np.ndarray
    type: GGMLType
    n_in: int

    @property
    def n_out(self) -> int:
        return self.packed.shape[0]

    def cut(self, begin: int, end: int) -> Weight:
        """Some of its rows; nothing is copied."""
        return Weight(self.packed[begin:end], self.type, self.n_in)

    def unpack(self, rows: Any, out: np.ndarray | None = None) -> np.ndarray:
        """The rows (a slice or an index array) as float32 (k, n_in)."""
        packed = self.packed[rows]
        if self.type.id in PACKED_TYPES:
            return dequantize(packed, self.type.id, out=out)
        from gguf import GGMLQuantizationType, quants

        values = quants.dequantize(packed, GGMLQuantizationType(self.type.id))
        if out is None:
            return values
        out[:] = values
        return out


def can_unpack(type_: GGMLType) -> bool:
    """Whether rows of this type can be unpacked: by our kernels or by gguf-py."""
    if type_.id in PACKED_TYPES:
        return True
    from gguf.quants import _type_traits

    return type_.id in {int(t) for t in _type_traits}


def _panel_buffer(rows: int, n_in: int) -> np.ndarray:
    """This thread's scratch as (rows, n_in) float32."""
    size = rows * n_in
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _scratch.buffer = np.empty(size, np.float32)
    return buffer[:size].reshape(rows, n_in)


def mul_mat(
    x: np.ndarray | Rounded, weight: Weight, executor: Executor, out: np.ndarray, *, decoding: bool = False
) -> np.ndarray:
    """x (n_tokens, n_in) @ weight.T into out (n_tokens, n_out), float32, C-contiguous.

    decoding: few tokens are added up in another order, which is faster (src/matvec/contract.h). The bits
    depend on nothing else, neither the instruction set nor the number of tokens or threads.
    """
    sum_error = None
    if isinstance(x, Rounded):
        x, sum_error = x
    if len(x) == 0:
        return out
    if weight.type.id not in PACKED_TYPES:
        _mul_mat_by_panels(x, weight, executor, out)
    elif decoding and can_decode(weight, len(x)):
        matvecs(x, [(weight.packed, weight.type.id)], [out], executor=executor)
    else:
        packed_mul_mat(x, weight.packed, weight.type.id, out=out, executor=executor)
    if sum_error is not None:
        more = np.empty_like(out)
        out += _times_float32(sum_error, minimums(weight.packed, weight.type), more, executor)
    return out


def decode_together(
    x: np.ndarray, weights: Sequence[Weight], executor: Executor, outs: Sequence[np.ndarray]
) -> None:
    """mul_mat of one x with several weights, decoding: the threads share them as if they were one."""
    for i in range(0, len(weights), MATVECS_MAX):
        some = [(w.packed, w.type.id) for w in weights[i : i + MATVECS_MAX]]
        matvecs(x, some, outs[i : i + MATVECS_MAX], executor=executor)


def can_decode(weight: Weight, n_tokens: int) -> bool:
    """Whether so many tokens have a kernel of their own with this type."""
    return weight.type.id in PACKED_TYPES and 0 < n_tokens <= MATVEC_MAX_TOKENS


def _times_float32(x: np.ndarray, rows: np.ndarray, out: np.ndarray, executor: Executor | None) -> np.ndarray:
    return packed_mul_mat(x, rows.view(np.uint8), FLOAT32, out=out, executor=executor)


def _mul_mat_by_panels(x: np.ndarray, weight: Weight, executor: Executor, out: np.ndarray) -> None:
    """Of a type that the kernels do not unpack; a panel at a time is unpacked to float32."""
    panel = min(max(PANEL_ELEMENTS // weight.n_in // 32 * 32, MIN_PANEL_ROWS), MAX_PANEL_ROWS)

    def multiply(i: int) -> None:
        rows = slice(i * panel, min((i + 1) * panel, weight.n_out))
        with np.errstate(all="ignore"):  # each thread has its own
            values = weight.unpack(rows, _panel_buffer(rows.stop - rows.start, weight.n_in))
            _times_float32(x, values, out[:, rows], None)

    executor.map(multiply, -(-weight.n_out // panel))
