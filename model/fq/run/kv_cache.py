"""Keys and values of the tokens so far."""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np


class KVCache:
    """Float32 (n_head_kv, n_ctx, d) for each layer, ``keys[layer]`` and ``values[layer]``."""

    def __init__(self, n_layer: int, n_head_kv: int, n_ctx: int, d: int) -> None:
        self.keys = pages((n_layer, n_head_kv, n_ctx, d))
        self.values = pages((n_layer, n_head_kv, n_ctx, d))


def pages(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, float32, whose memory is taken as they are written to, by the smallest page.

    numpy asks for pages of 2 MB, which for the keys of many heads, each a stretch of its own, would
    be all of the cache from the first token on. It begins at a page, so at a cache line: attention at
    one token reads it at full width. Raises MemoryError.
    """
    try:
        memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise MemoryError(f"no room for an array of shape {shape}") from None
    with contextlib.suppress(OSError, AttributeError):  # where there are no other pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
