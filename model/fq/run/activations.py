"""What ggml does to the input of a matrix product, which is most of what a deployed model rounds.

Its CPU code rounds the input of every product with a quantised weight to 8 bits, in a format
that the weight's type decides. Here the rounded input is widened again and multiplied in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fq_kernels import Executor, round_trip

from ..gguf.types import GGMLType

ACTIVATIONS = ("exact", "ggml")

# vec_dot_type in ggml-cpu.c; the types that are not here have Q8_K. Where ggml's x86 code and its
# reference round differently, x86.
_FORMATS = {
    **dict.fromkeys(
        ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0", "Q2_0"), "q8_0:nearest-even"
    ),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1"), "q8_1:nearest-even"),
    "F16": "f16",
    "BF16": "bf16",
}

Q8_1_BLOCK = 32


def ggml_format(type_: GGMLType) -> str | None:
    """The format that the input of a product with such a weight is rounded to; None for none."""
    return None if type_.name == "F32" else _FORMATS.get(type_.name, "q8_k")


class Rounded(NamedTuple):
    """An input as ggml rounds it.

    values     float32 (n_tokens, n_in)
    sum_error  float32 (n_tokens, n_in / 32) for Q8_1, else None. Beside its values a block keeps
               their sum, which is multiplied by the weight's minimum, and rounds it: this is what
               that is off by
    """

    values: np.ndarray
    sum_error: np.ndarray | None


def round_as_ggml(x: np.ndarray, fmt: str, out: np.ndarray, executor: Executor) -> Rounded:
    """x float32 (n_tokens, n_in) rounded to ``fmt``, one of ``ggml_format``, into out of x's shape."""
    values = round_trip(x, fmt, out=out, executor=executor)
    if not fmt.startswith("q8_1"):
        return Rounded(values, None)
    d = np.abs(x).reshape(len(x), -1, Q8_1_BLOCK).max(axis=2) / np.float32(127)
    stored_d = d.astype(np.float16).astype(np.float32)
    # exact: codes have 7 bits, a scale 11
    sums = values.reshape(len(x), -1, Q8_1_BLOCK).sum(axis=2)
    codes = np.divide(sums, stored_d, out=np.zeros_like(sums), where=stored_d != 0)
    return Rounded(values, (d * codes).astype(np.float16).astype(np.float32) - sums)


def minimums(packed: np.ndarray, type_: GGMLType) -> np.ndarray:
    """The minimums of packed rows of Q4_1 or Q5_1: (k, row_bytes) uint8 -> float32 (k, n_in / 32)."""
    blocks = packed.reshape(len(packed), -1, type_.type_size)
    minima: np.ndarray = blocks[:, :, 2:4].copy().view(np.float16)[:, :, 0]
    return minima.astype(np.float32)
