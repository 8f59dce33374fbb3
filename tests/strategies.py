"""Shared hypothesis strategies for kernel inputs, and the comparisons that go with them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from fq_kernels import force_isa, isa, supported_isas
from fq_kernels.rules import RowStat

# Around the vector widths, the kernels' span of 512, and the models' row lengths.
WIDTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 511, 512, 513, 576, 2048)
ROW_KINDS = (
    "normal", "any exponent", "subnormal", "subnormal squares", "huge", "overflowing sum", "zero",
    "signed zeros", "sparse", "infinite", "nan",
)  # fmt: skip
MAX_ROWS = 24

widths = st.sampled_from(WIDTHS)
seeds = st.integers(0, 2**32 - 1)
epsilons = st.one_of(
    st.sampled_from([0.0, 1e-45, 1e-40, 1e-12, 1e-6, 1e-5, 1.0, 1e30, 3e38]),
    st.floats(0, 1, width=32),
)


def some_of(items: list[int]) -> list[int]:
    """In CI all of them, else a sixteenth, others on each run."""
    return items if settings.default.derandomize else random.sample(items, len(items) // 16)


def every_isa() -> Iterator[str]:
    """Each instruction set in turn, forced for the body of the loop.

    For tests whose reference takes longer than the kernel: it is computed once for all sets.
    """
    before = isa()
    try:
        for name in supported_isas():
            force_isa(name)
            yield name
    finally:
        force_isa(before)


def make_row(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) float32 of one of ROW_KINDS."""
    row = rng.standard_normal(n).astype(np.float32)
    if kind == "any exponent":
        row = np.copysign(rng.integers(0, 0x7F800000, n, np.uint32).view(np.float32), row)
    elif kind == "subnormal":
        row = rng.integers(0, 0x00800000, n, np.uint32).view(np.float32)
        row[rng.random(n) < 0.5] = 1e-45
    elif kind == "subnormal squares":
        row *= np.float32(1e-21)
    elif kind == "huge":
        row = np.copysign(rng.uniform(1e20, 3e38, n).astype(np.float32), row)  # each square is infinite
    elif kind == "overflowing sum":
        row = np.full(n, 1.8e19, np.float32)  # squares are finite, their sum is no float32
    elif kind == "zero":
        row[:] = 0
    elif kind == "signed zeros":
        row = np.copysign(np.float32(0), row)
    elif kind == "sparse":
        row[rng.random(n) < 0.9] = -0.0
    elif kind == "infinite":
        row[rng.integers(n)] = rng.choice([np.inf, -np.inf])
    elif kind == "nan":
        row[rng.integers(n)] = np.nan
    return row


@st.composite
def shapes(draw, min_dims: int = 1, max_dims: int = 4, n=widths) -> tuple[int, ...]:
    outer: list[int] = []
    for _ in range(draw(st.integers(min_dims, max_dims)) - 1):
        outer.append(draw(st.integers(1, max(1, min(7, MAX_ROWS // max(1, int(np.prod(outer))))))))
    return (*outer, draw(n))


@st.composite
def float_arrays(draw, shape=None, kinds=ROW_KINDS) -> np.ndarray:
    """(..., n) float32, C-contiguous; each row of a kind of its own."""
    shape = draw(shapes() if shape is None else shape)
    rng = np.random.default_rng(draw(seeds))
    rows = int(np.prod(shape[:-1]))
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=rows, max_size=rows))
    x = np.array([make_row(kind, shape[-1], rng) for kind in chosen], np.float32)
    return x.reshape(shape)


class Layout(NamedTuple):
    """How an array lies in memory: outer axes in any order and step, rows with gaps."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    before: int
    after: int

    def place(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(memory, view): the view holds ``values``, the memory around it a pattern."""
        *outer, n = values.shape
        sizes = [size * abs(step) for size, step in zip(outer, self.steps, strict=True)]
        memory = np.empty([*(sizes[i] for i in self.order), self.before + n + self.after], values.dtype)
        memory.view(np.uint8).fill(0xA5)
        view = memory.transpose(*np.argsort(self.order).tolist(), len(outer))
        view = view[(*(slice(None, None, step) for step in self.steps), slice(self.before, self.before + n))]
        view[...] = values
        return memory, view


@st.composite
def layouts(draw, ndim: int) -> Layout:
    """Layouts for arrays of ``ndim`` axes."""
    return Layout(
        tuple(draw(st.permutations(range(ndim - 1)))),
        tuple(draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in range(ndim - 1)),
        draw(st.sampled_from([0, 1, 5, 16])),
        draw(st.sampled_from([0, 1, 3, 17])),
    )


def assert_same_bits(got: np.ndarray, expected: np.ndarray, where: str = "") -> None:
    """The same float32 bits; a NaN where a NaN is, of any payload. ``where`` is said if not."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == np.float32
    got, expected = np.ascontiguousarray(got), np.ascontiguousarray(expected)
    different = (got.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(got) & np.isnan(expected))
    if different.any():
        at = tuple(int(i[0]) for i in np.nonzero(different))
        raise AssertionError(
            f"{where} {int(different.sum())} differ; at {at} {got[at]!r}, expected {expected[at]!r}"
        )


def assert_row_stats(
    got: np.ndarray, value: np.ndarray, result: np.ndarray, clipped: np.ndarray | None = None
) -> None:
    """``got`` is what row_stats must hold for rows (rows, n) that rounding made ``result``.

    clipped: elements out of range, as Quantised has them; None: the finite ones that are no more.
    """
    if clipped is None:
        clipped = np.isfinite(value) & ~np.isfinite(result)
    changed = (value.view(np.uint32) != result.view(np.uint32)) & ~(np.isnan(value) & np.isnan(result))
    finite = np.isfinite(value) & np.isfinite(result)
    assert np.array_equal(got[:, RowStat.CHANGED], changed.sum(axis=1))
    assert np.array_equal(got[:, RowStat.NOT_FINITE], (~finite).sum(axis=1))
    assert np.array_equal(got[:, RowStat.OUT_OF_RANGE], clipped.sum(axis=1))
    assert np.array_equal(got[:, RowStat.TO_ZERO], ((value != 0) & (result == 0)).sum(axis=1))
    with np.errstate(invalid="ignore"):
        error = result.astype(np.float64) - value.astype(np.float64)
    for row, e, v, kept in zip(got, error, value.astype(np.float64), finite, strict=True):
        ends = row[[RowStat.FIRST_ERROR, RowStat.LAST_ERROR]]
        assert np.array_equal(ends, np.abs(e[[0, -1]]), equal_nan=True)
        e, v = e[kept], v[kept]
        size = math.fsum(np.abs(e))
        assert row[RowStat.MAX_ABS_ERROR] == np.abs(e).max(initial=0)
        assert math.isclose(row[RowStat.SUM_ABS_ERROR], size, rel_tol=1e-12)
        assert abs(row[RowStat.SUM_ERROR] - math.fsum(e)) <= 1e-12 * size
        assert math.isclose(row[RowStat.SUM_SQ_ERROR], math.fsum(e * e), rel_tol=1e-12)
        assert math.isclose(row[RowStat.SUM_SQ_VALUE], math.fsum(v * v), rel_tol=1e-12)
