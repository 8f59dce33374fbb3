"""Logits have the same bits on every instruction set and machine, however a sequence is cut."""

from __future__ import annotations

import hashlib

import numpy as np

from fq import Context

IDS = np.array([504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 657, 436, 5345, 284, 253, 3116])
DIGEST = "921bd9c1d0932b3b"


def digest(logits: np.ndarray) -> str:
    return hashlib.sha256(logits.tobytes()).hexdigest()[:16]


def test_logits_of_smollm2(isa, smollm2, executor):
    assert digest(Context(smollm2, 16, executor).eval(IDS, slice(None))) == DIGEST


def test_in_pieces(smollm2, executor):
    context = Context(smollm2, 16, executor)
    parts = [context.eval(part, slice(None)) for part in np.split(IDS, [1, 6, 8])]
    assert digest(np.concatenate(parts)) == DIGEST
    # decoding adds in another order
    assert digest(Context(smollm2, 16, executor).eval(IDS[:7], slice(None), decoding=True)) != digest(
        Context(smollm2, 16, executor).eval(IDS[:7], slice(None))
    )
