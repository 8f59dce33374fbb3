"""Next tokens drawn from the model's own distribution."""

from __future__ import annotations

import hashlib

import numpy as np

from fq_kernels import Executor, default_fpu, log_softmax

ROWS = 16  # of float64 at a time


@default_fpu()
def sampled_labels(logits: np.ndarray, n: int, seed: int, chunk: int, executor: Executor) -> np.ndarray:
    """n tokens for each row of logits (rows, n_vocab), int64 (n, rows); the same on every machine.

    A number's place in a row's distribution is the SHA-256 of "seed:chunk:sample:row": no library's generator
    has a say in it, and a row's sample depends on nothing beside it.
    """
    labels = np.empty((n, len(logits)), np.int64)
    for begin in range(0, len(logits), ROWS):
        some = np.ascontiguousarray(logits[begin : begin + ROWS])
        log_p, p = np.empty((2, *some.shape))
        log_softmax(some, log_p=log_p, p=p, executor=executor)
        for i, row in enumerate(p):
            up_to = np.cumsum(row)
            at = [_uniform(f"{seed}:{chunk}:{sample}:{begin + i}") * up_to[-1] for sample in range(n)]
            labels[:, begin + i] = np.minimum(np.searchsorted(up_to, at, side="right"), len(row) - 1)
    return labels


def _uniform(what: str) -> float:
    """From 0 up to but not 1."""
    return (int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") >> 11) / 2.0**53
