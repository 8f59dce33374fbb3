"""Noise controls: as large an error as a format's rounding makes, without part of its structure.

``noise_bf16`` adds to each row Gaussian noise of the length that bf16's error has in it: the size
is kept, and not which elements carry it. ``signs_bf16`` keeps each element's error but for its sign,
which is random. A row's noise is a function of its bits: the same wherever and in whatever company
it comes. Options are the format's: ``signs_int8:group=32``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .arrays import Floats, Rounded
from .dither import random_bits
from .format import Family, Format

GAUSSIAN, SIGNS = "noise_", "signs_"

_OTHER_NUMBERS = 0x7369676E73  # than the dither of the same seed draws


def _gaussian(x: Floats, rounded: Floats, seed: int) -> Floats:
    length = np.linalg.norm(rounded.astype(np.float64) - x, axis=1)
    values: Floats = x.copy()
    for i in np.flatnonzero(length):
        row = zlib.crc32(x[i])
        noise = np.random.default_rng([row, seed] if seed else row).standard_normal(x.shape[1])
        values[i] += noise * (length[i] / np.linalg.norm(noise))
    return values


def _signs(x: Floats, rounded: Floats, seed: int) -> Floats:
    kept = random_bits(x, (seed + _OTHER_NUMBERS) % 2**64) >> np.uint64(63) == 1
    return np.where(kept, rounded, (2 * x.astype(np.float64) - rounded).astype(np.float32))


_KINDS: dict[str, tuple[Callable[[Floats, Floats, int], Floats], str]] = {
    GAUSSIAN: (_gaussian, "Gaussian noise as long as {}'s error in each row"),
    SIGNS: (_signs, "{}'s errors with random signs"),
}
PREFIXES = tuple(_KINDS)


def without_noise(name: str) -> str:
    """The name of the format that a control is of; any other stays."""
    return next((name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)), name)


def noise_family(name: str, find: Callable[[str], Family | None]) -> Family | None:
    """The family ``name``, if it is the noise of one that ``find`` finds."""
    plain = without_noise(name)
    of = find(plain) if plain != name else None
    if of is None or of.noise:
        return None
    make, note = _KINDS[name.removesuffix(plain)]

    def quantise(x: Floats, fmt: Format) -> Rounded:
        rounding = replace(fmt, name=of.name)
        if fmt.rounding == "stochastic":  # which counts elements from the first row of a call
            seeds = random_bits(x, fmt.seed)[:, 0].tolist()
            rows = [
                rounding.with_seed(seed).quantise(row[np.newaxis]).values
                for row, seed in zip(x, seeds, strict=True)
            ]
            return make(x, np.concatenate(rows), fmt.seed), None
        return make(x, rounding.quantise(x).values, fmt.seed), None

    return replace(
        of,
        name=name,
        quantise=quantise,
        kernel=None,
        tensor_kernel=None,
        bits=32,
        largest=None,
        smallest_normal=None,
        smallest_subnormal=None,
        idempotent=False,
        aliases=(),
        noise=True,
        note=note.format(of.name),
    )
