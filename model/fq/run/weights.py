"""Packed weights in the mapped file, and products with them that never unpack a whole tensor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fq_kernels import MATVEC_MAX_TOKENS, MATVECS_MAX, PACKED_TYPES, Executor, dequantize, matvecs
from fq_kernels import mul_mats as packed_mul_mats

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

    @cached_property
    def n_out(self) -> int:
        return len(self.packed)

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
    if can_share(weight):
        mul_mats(x, [weight], executor, [out], decoding=decoding)
    else:
        _mul_mat_by_panels(x, weight, executor, out)
    if sum_error is not None:
        more = np.empty_like(out)
        out += times_float32(sum_error, minimums(weight.packed, weight.type), more, executor)
    return out


def can_share(weight: Weight) -> bool:
    """Whether the kernels unpack its type, which `mul_mats` needs."""
    return weight.type.id in PACKED_TYPES


def mul_mats(
    x: np.ndarray,
    weights: Sequence[Weight],
    executor: Executor,
    outs: Sequence[np.ndarray],
    *,
    decoding: bool = False,
) -> None:
    """mul_mat of one x with several weights that it can: the threads share them as if they were one."""
    products = matvecs if decoding and len(x) <= MATVEC_MAX_TOKENS else packed_mul_mats
    for i in range(0, len(weights), MATVECS_MAX):
        some = [(w.packed, w.type.id) for w in weights[i : i + MATVECS_MAX]]
        products(x, some, outs[i : i + MATVECS_MAX], executor=executor)


def times_float32(x: np.ndarray, rows: np.ndarray, out: np.ndarray, executor: Executor | None) -> np.ndarray:
    """x (n_tokens, n_in) @ rows.T into out (n_tokens, n_out), rows (n_out, n_in) C-contiguous, float32."""
    return packed_mul_mats(x, [(rows.view(np.uint8), FLOAT32)], [out], executor=executor)[0]


def _mul_mat_by_panels(x: np.ndarray, weight: Weight, executor: Executor, out: np.ndarray) -> None:
    """Of a type that the kernels do not unpack; a panel at a time is unpacked to float32."""
    panel = min(max(PANEL_ELEMENTS // weight.n_in // 32 * 32, MIN_PANEL_ROWS), MAX_PANEL_ROWS)

    def multiply(i: int) -> None:
        rows = slice(i * panel, min((i + 1) * panel, weight.n_out))
        with np.errstate(all="ignore"):  # each thread has its own
            values = weight.unpack(rows, _panel_buffer(rows.stop - rows.start, weight.n_in))
            times_float32(x, values, out[:, rows], None)

    executor.map(multiply, -(-weight.n_out // panel))
