"""Packed weights in the mapped file, and products with them that never unpack a whole tensor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fq_kernels import MATVEC_MAX_TOKENS, PACKED_TYPES, Executor, dequantize, has_mul_mat, matvec
from fq_kernels import mul_mat as packed_mul_mat

from ..gguf.types import GGMLType
from .activations import Rounded, minimums

# Elements of one unpacked panel: 1.5 MB, so that a panel stays in L2 between unpacking and
# multiplying.
PANEL_ELEMENTS = 384 * 1024
MIN_PANEL_ROWS, MAX_PANEL_ROWS = 96, 512

# Bytes of a product that are made at a time: logits of a large vocabulary take as much as a small model.
MAX_PRODUCT = 64 << 20
MIN_BLOCK_ROWS = 16

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


def row_blocks(n_tokens: int, n_out: int) -> list[slice]:
    """The rows of a product that are made at a time: alike in number, fewer last; all if it is not large.

    A block alone has the bits that it has in the whole product.
    """
    n = max(min(-(-4 * n_tokens * n_out // MAX_PRODUCT), n_tokens // MIN_BLOCK_ROWS), 1)
    edges = [-(-n_tokens * i // n) for i in range(n + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def mul_mat(x: np.ndarray | Rounded, weight: Weight, executor: Executor, out: np.ndarray) -> np.ndarray:
    """x (n_tokens, n_in) @ weight.T into out (n_tokens, n_out), float32, C-contiguous.

    By our own kernel where the instruction set and the type have one. Else BLAS multiplies
    unpacked panels, which are cut by the weight's shape alone, on one thread per panel. So the
    bits do not depend on the number of threads.
    """
    sum_error = None
    if isinstance(x, Rounded):
        x, sum_error = x
    n_tokens = x.shape[0]
    if n_tokens == 0:
        return out
    if n_tokens <= MATVEC_MAX_TOKENS and weight.type.id in PACKED_TYPES:
        matvec(x, weight.packed, weight.type.id, out=out, executor=executor)
        if sum_error is not None:
            out += sum_error @ minimums(weight.packed, weight.type).T
        return out
    own_kernel = has_mul_mat() and weight.type.id in PACKED_TYPES
    if own_kernel:
        packed_mul_mat(x, weight.packed, weight.type.id, out=out, executor=executor)
        if sum_error is None:
            return out
    blocks = row_blocks(n_tokens, weight.n_out)
    panel = min(max(PANEL_ELEMENTS // weight.n_in // 16 * 16, MIN_PANEL_ROWS), MAX_PANEL_ROWS)

    def multiply(i: int) -> None:
        rows = slice(i * panel, min((i + 1) * panel, weight.n_out))
        with np.errstate(all="ignore"):  # each thread has its own
            if not own_kernel:
                values = weight.unpack(rows, _panel_buffer(rows.stop - rows.start, weight.n_in))
                for block in blocks:
                    np.matmul(x[block], values.T, out=out[block, rows])
            if sum_error is not None:
                out[:, rows] += sum_error @ minimums(weight.packed[rows], weight.type).T

    executor.map(multiply, -(-weight.n_out // panel))
    return out


class _BlasThreads:
    """Holds BLAS to one thread while any evaluation runs: the executor's threads are the only ones."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.controller: Any = None
        self.limit: Any = None

    @contextmanager
    def single(self) -> Iterator[None]:
        with self.lock:
            if self.controller is None:
                from threadpoolctl import ThreadpoolController

                self.controller = ThreadpoolController()
            if self.users == 0:
                self._free_control()
                self.limit = self.controller.limit(limits=1, user_api="blas")
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self._free_control()
                    self.limit.restore_original_limits()
                    self._free_control()

    @staticmethod
    def _free_control() -> None:
        """Let any thread set OpenBLAS's limit next.

        From threadpoolctl 3.8 on, the first thread to set it is the only one that can, without an
        error for the others, but the last evaluation to end need not be on the thread of the first.
        """
        from threadpoolctl import OpenBLASController

        clear = getattr(OpenBLASController, "clear_controlling_thread", None)
        if clear is not None:
            clear(force=True)


blas_threads = _BlasThreads()
