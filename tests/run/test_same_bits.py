"""Logits have the same bits on every instruction set and machine, however a sequence is cut."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

import fq_kernels
from fq import Context, Executor, Model, Perplexity
from fq.gguf.synthetic import SAMPLE_TEXT
from fq_kernels.rules import FakeQuant

IDS = np.array([504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 657, 436, 5345, 284, 253, 3116])
DIGEST = "921bd9c1d0932b3b"
TINY_FIGURES = "a0cc33aa725032c1"
SMOLLM2_FIGURES = "79edebef2fa382b9"


def digest(logits: np.ndarray) -> str:
    return hashlib.sha256(logits.tobytes()).hexdigest()[:16]


def test_logits_of_smollm2(isa, smollm2, executor):
    assert digest(Context(smollm2, 16, executor).eval(IDS, slice(None))) == DIGEST


def figures(model: Model, executor: Executor, rules: str | list[str], **settings: int) -> str:
    """The digest of all that a run of the sample text's chunks finds, as written to JSON."""
    tokens = model.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))
    run = Perplexity(
        model, tokens, fake_quant=FakeQuant(model.values, rules), executor=executor, control=True, **settings
    )
    for _ in run:
        pass
    result = run.result()
    found = [result[key] for key in ("chunks", "ppl", "ppl_se", "fake_quant", "comparison", "control")]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("threads", "batch"), [(1, 5), (3, 32), (2, 512)])
def test_figures_of_a_tiny_model(isa, tiny, threads, batch):
    with Executor(threads) as executor:
        rules = ["ffn_norm=bf16", "attn_norm[1].raw=fp8_e4m3fn", "k=int8", "ffn_out[0]=bf16:stochastic"]
        assert figures(tiny, executor, rules, n_ctx=64, chunks=5, batch=batch) == TINY_FIGURES


def test_figures_of_smollm2(smollm2, executor):
    """By the machine's best set; the scalar one takes minutes."""
    assert fq_kernels.isa() == fq_kernels.supported_isas()[-1]
    assert figures(smollm2, executor, "ffn_norm=bf16", n_ctx=512, chunks=1) == SMOLLM2_FIGURES


def test_in_pieces(smollm2, executor):
    context = Context(smollm2, 16, executor)
    parts = [context.eval(part, slice(None)) for part in np.split(IDS, [1, 6, 8])]
    assert digest(np.concatenate(parts)) == DIGEST
    # decoding adds in another order
    assert digest(Context(smollm2, 16, executor).eval(IDS[:7], slice(None), decoding=True)) != digest(
        Context(smollm2, 16, executor).eval(IDS[:7], slice(None))
    )
