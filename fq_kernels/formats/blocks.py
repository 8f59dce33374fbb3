"""Rows cut into blocks that share a scale, and rotated before they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Floats, Mask, Rounded, Spacing
from .format import Format

SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
LARGEST = np.finfo(np.float32).max


def in_blocks(x: Floats, size: int) -> Floats:
    """(rows, n) -> (blocks, size); each row's last block is filled up with zeros."""
    rows, n = x.shape
    missing = -n % size
    if missing:
        filled = np.zeros((rows, n + missing), np.float32)
        filled[:, :n] = x
        x = filled
    return x.reshape(-1, size)


def under_one_scale(x: Floats, fmt: Format) -> Floats:
    """(rows, n) -> (k, size): the tensor, the groups or the rows, as the format says."""
    if "tensor" in fmt.settings:
        return x.reshape(1, -1)
    if group := fmt.number("group"):
        return in_blocks(x, min(group, x.shape[1]))
    return x


def out_of_blocks(blocks: Floats, rows: int, n: int) -> Floats:
    """What ``in_blocks`` did, undone; a view if no row was filled up."""
    return blocks.reshape(rows, -1)[:, :n]


def mask_out_of_blocks(blocks: Mask | None, rows: int, n: int) -> Mask | None:
    return None if blocks is None else blocks.reshape(rows, -1)[:, :n]


def spacing_out_of_blocks(spacing: Spacing, rows: int, n: int) -> Spacing:
    """As ``out_of_blocks``; bounds that broadcast to step's shape are spread out."""
    step, low, high = spacing
    assert low is not None and high is not None
    each = (step, np.broadcast_to(low, step.shape), np.broadcast_to(high, step.shape))
    return Spacing(*(out_of_blocks(part, rows, n) for part in each))


def below_largest(blocks: Floats, largest: Floats, step: Floats) -> Spacing:
    """Where the scale is made of the largest magnitude, (k, 1): it stays the largest."""
    below = np.nextafter(largest, np.float32(0))
    return Spacing(np.where(np.abs(blocks) == largest, np.float32(0), step), -below, below)


def between_extremes(blocks: Floats, low: Floats, high: Floats, step: Floats) -> Spacing:
    """Where the scale is made of the lowest and the highest value, (k, 1): they stay so."""
    return Spacing(np.where((blocks == low) | (blocks == high), np.float32(0), step), low, high)


def reduce_blocks(op: np.ufunc, blocks: Floats) -> Floats:
    """op.reduce over each block: (k, size) -> (k, 1). For an op whose result no order changes.

    In halves over all blocks at once: numpy's own reduction of a short axis is ten times slower.
    """
    k, size = blocks.shape
    flat: Floats = blocks.reshape(-1)
    while size % 2 == 0:
        flat = op(flat[0::2], flat[1::2])
        size //= 2
    flat = flat.reshape(k, size)
    return flat if size == 1 else op.reduce(flat, axis=1, keepdims=True)


def largest_magnitude(blocks: Floats) -> Floats:
    """Largest |x| of each block, (k, size) -> (k, 1); NaN where the block is not finite.

    A scale made of it is NaN then, and so is the whole block.
    """
    return finite_or_nan(reduce_blocks(np.maximum, np.abs(blocks)))


def finite_or_nan(x: Floats) -> Floats:
    """x with its infinities turned into NaN, in place."""
    x[np.isinf(x)] = np.nan
    return x


def within_float(x: Floats) -> Floats:
    """x, infinities turned into float32's largest numbers, in place: a scale that was rounded up, times
    the largest element, may be one step beyond them."""
    return np.clip(x, -LARGEST, LARGEST, out=x)


def signed_largest(blocks: Floats) -> Floats:
    """The element of largest magnitude, the first of several: (k, size) -> (k, 1).

    NaN where the block is not finite, +0 where it is zero.
    """
    at = np.abs(blocks).argmax(axis=1)
    largest = finite_or_nan(np.take_along_axis(blocks, at[:, np.newaxis], axis=1))
    largest += np.float32(0)
    return largest


# ---------------------------------------------------------------- rotation

ROTATIONS = ("unrotated", "had=")
_LARGEST_ROTATION = 512


def check_rotation(fmt: Format) -> None:
    size = fmt.number("had")
    if size and (size & (size - 1) or size > _LARGEST_ROTATION):
        raise ValueError(f"had={size} of format {fmt.name} must be a power of two up to {_LARGEST_ROTATION}")
    for option in ("group", "block"):
        n = fmt.number(option)
        if size and n & (n - 1):
            raise ValueError(
                f"option {option}={n} of format {fmt.name} must be a power of two beside had={size}"
            )
    if size and fmt.dither:
        raise ValueError(f"format {fmt.name} has no dither beside had={size}")


def check_length(fmt: Format, n: int) -> None:
    """Raises ValueError if rows of n values cannot be rounded to the format."""
    size = fmt.number("had")
    if size and n % size:
        raise ValueError(
            f"format {fmt} rotates {size} values together: rows of {n} cannot be cut into such parts"
        )


def rotated(x: Floats, size: int) -> Floats:
    """x (rows, n), each ``size`` values of a row times Hadamard's matrix (Sylvester's) over its size's root.

    Twice is x again, but for rounding: in float32, the additions in the usual order of butterflies.
    """
    parts: Floats = x.reshape(-1, size).copy()
    half = 1
    while half < size:
        pairs = parts.reshape(-1, size // (2 * half), 2, half)
        a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
        half *= 2
    parts *= np.float32(1) / np.sqrt(np.float32(size))
    return parts.reshape(x.shape)


def with_rotation(quantise: Callable[[Floats, Format], Rounded]) -> Callable[[Floats, Format], Rounded]:
    """``quantise`` of what option had=N rotates, rotated back; which elements are cut says of the rotated."""

    def turned(x: Floats, fmt: Format) -> Rounded:
        size = fmt.number("had")
        if not size:
            return quantise(x, fmt)
        check_length(fmt, x.shape[1])
        values, clipped = quantise(rotated(x, size), fmt)
        return rotated(values, size), clipped

    return turned
