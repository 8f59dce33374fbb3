"""Rotary embedding: the angles of the positions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..arch.graph import RopeAttributes


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
        cos, sin = tables
        return cos[now], sin[now]

    def _make(self, rope: RopeAttributes, n: int) -> tuple[np.ndarray, np.ndarray]:
        freq = rope.freq_base ** (-np.arange(0, rope.n_rot, 2, dtype=np.float64) / rope.n_rot)
        freq *= rope.freq_scale
        if rope.factors is not None:
            freq /= self.vectors[rope.factors]
        angles = np.arange(n, dtype=np.float64)[:, None] * freq
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
