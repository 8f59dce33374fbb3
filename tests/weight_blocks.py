"""Packed weights of any type that can be unpacked: random bytes, but for the scales."""

from __future__ import annotations

import gguf
import numpy as np

# where a block holds float16 scales; of two, the second is that of the minimum
SCALES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0],
    "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
}  # fmt: skip
# how many bytes at a block's start are scales, and between which codes weights are near 1/16
BYTE_SCALES = {"MXFP4": (1, 121, 123), "NVFP4": (4, 8, 16)}


def set_scales(blocks: np.ndarray, name: str, *scales: np.ndarray | float) -> None:
    """Write float16 scales, each a number or one of every block, into blocks (n, bytes)."""
    codes = [np.broadcast_to(np.float16(scale), len(blocks)).copy().view(np.uint16) for scale in scales]
    if name == "IQ1_M":  # four bits in each of the last four words
        words = blocks[:, 48:].copy().view("<u2")
        for i in range(4):
            words[:, i] = words[:, i] & 0x0FFF | (codes[0] >> 4 * i & 15) << 12
        blocks[:, 48:] = words.view(np.uint8)
        return
    for at, code in zip(SCALES[name], codes, strict=True):
        blocks[:, at : at + 2] = code[:, np.newaxis].view(np.uint8)


def random_matrix(name: str, rows: int, n_in: int, seed: int = 0) -> np.ndarray:
    """(rows, row_bytes) uint8: weights of mean near zero and a spread near 1/sqrt(n_in)."""
    type_ = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rng = np.random.default_rng(seed)
    if block == 1:
        values = (rng.standard_normal((rows, n_in)) / n_in**0.5).astype(np.float32)
        return gguf.quants.quantize(values, type_).view(np.uint8)
    blocks = rng.integers(0, 256, (rows * n_in // block, size), np.uint8)
    if name in BYTE_SCALES:
        count, low, high = BYTE_SCALES[name]
        blocks[:, :count] = rng.integers(low, high, (len(blocks), count))
        return blocks.reshape(rows, -1)
    n_scales = len(SCALES.get(name, [0]))
    unit = [1.0, 0.0][:n_scales]
    means = []
    for i in range(n_scales):  # weights are linear in the scales
        set_scales(blocks, name, *np.roll(unit, i))
        means.append(gguf.quants.dequantize(blocks, type_).mean())
    balanced = [1.0] if n_scales == 1 else [1.0, -means[0] / means[1]]
    set_scales(blocks, name, *balanced)
    d = rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1, 1], len(blocks)) / n_in**0.5
    d /= gguf.quants.dequantize(blocks, type_).std()
    set_scales(blocks, name, *(scale * d for scale in balanced))
    return blocks.reshape(rows, -1)
