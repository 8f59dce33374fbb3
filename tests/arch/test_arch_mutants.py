"""Damaged files of every architecture: one error of one line each, or a model that can be evaluated."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from tiny_models import TINY, some_tokens, write_tiny

from fq import Context, FqError, Model

# of each file; FQ_MUTANTS asks for more
N = int(os.environ.get("FQ_MUTANTS", "40"))
# the 64-layer file takes long and has nothing that the others have not
NAMES = [name for name in TINY if TINY[name].n_layer < 64]


def mutants(raw: bytes, start: int, rng: random.Random):
    """Numbers and bytes of the metadata and of the tensors' records changed; start: where weights begin."""
    numbers = [0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32 - 1]
    while True:
        changed = bytearray(raw)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.randrange(start - 4)
            kind = rng.random()
            if kind < 0.5:
                changed[at : at + 4] = rng.choice(numbers).to_bytes(4, "little")
            elif kind < 0.8:
                changed[at] = rng.randrange(256)
            else:  # a float: NaN, infinity, 0 or huge
                changed[at : at + 4] = np.float32(rng.choice([np.nan, np.inf, -1, 0, 1e38])).tobytes()
        yield bytes(changed)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(tmp_path, executor, name):
    raw = write_tiny(tmp_path / "whole.gguf", TINY[name]).read_bytes()
    model = Model(tmp_path / "whole.gguf")
    start = min(info.offset for info in model.file.tensors.values())
    keys = raw.index(f"{TINY[name].arch}.block_count".encode()), raw.index(b"tokenizer.ggml")
    rng, path = random.Random(name), tmp_path / "m.gguf"
    made = mutants(raw, start, rng)
    # most of a file's head is its vocabulary: half of the mutants change the architecture's keys alone
    of_keys = mutants(raw[keys[0] : keys[1]], keys[1] - keys[0], rng)
    refused = 0
    for i in range(N):
        path.write_bytes(next(made) if i % 2 else raw[: keys[0]] + next(of_keys) + raw[keys[1] :])
        try:
            damaged = Model(path)
            n_ctx = min(damaged.hparams.n_ctx_train, 16)
            Context(damaged, n_ctx, executor).eval(some_tokens(min(9, n_ctx)) % damaged.hparams.n_vocab)
        except FqError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000
    assert refused > N // 10
