"""Rotary embedding: the angles of the positions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fq_kernels import cos, exp, log, sin

from ..arch.graph import RopeAttributes, Yarn


class RopeTables:
    """cos and sin of the angles, made once for all layers that turn alike.

    n_ctx    how many positions there may be
    vectors  the model's, among them the factors
    """

    def __init__(self, n_ctx: int, vectors: Mapping[str, np.ndarray]) -> None:
        self.n_ctx, self.vectors = n_ctx, vectors
        self._tables: dict[RopeAttributes, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, rope: RopeAttributes, now: slice) -> tuple[np.ndarray, np.ndarray]:
        """Of positions ``now``, float32 (n, n_rot / 2) each."""
        tables = self._tables.get(rope)
        if tables is None or now.stop > len(tables[0]):
            # of the positions up to twice as far, so that they are seldom made again
            tables = self._tables[rope] = self._make(rope, min(self.n_ctx, 2 * now.stop))
        return tables[0][now], tables[1][now]

    def _make(self, rope: RopeAttributes, n: int) -> tuple[np.ndarray, np.ndarray]:
        powers = np.arange(0, rope.n_rot, 2, dtype=np.float64) / rope.n_rot
        freq = exp(-powers * log(rope.freq_base))
        is_long = rope.long_factors is not None and self.n_ctx > rope.n_ctx_orig
        if factors := rope.long_factors if is_long else rope.factors:
            freq /= self.vectors[factors]
        kept = 0.0 if rope.yarn is None else _kept_by_yarn(rope.n_rot, rope.freq_base, rope.yarn)
        freq = freq * rope.freq_scale * (1 - kept) + freq * kept
        angles = np.arange(n, dtype=np.float64)[:, None] * freq
        turned = cos(angles) * rope.magnitude, sin(angles) * rope.magnitude
        return turned[0].astype(np.float32), turned[1].astype(np.float32)


def _kept_by_yarn(n_rot: int, freq_base: float, yarn: Yarn) -> np.ndarray:
    """How much of each pair's angle keeps the scale 1, (n_rot / 2,)."""

    def pair_of(turns: float) -> float:
        """The pair, as a real number, that makes so many turns in the original context."""
        return n_rot * log(yarn.n_ctx_orig / (turns * 2 * math.pi)) / (2 * log(freq_base))

    low = min(max(0, math.floor(pair_of(yarn.beta_fast))), n_rot)
    high = min(n_rot - 1, math.ceil(pair_of(yarn.beta_slow)))
    ramp = (np.arange(n_rot // 2) - low) / max(0.001, high - low)
    return (1 - np.clip(ramp, 0, 1)) * yarn.mix
