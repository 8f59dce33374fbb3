"""Likelihoods of sequences: those of an evaluation of its own, whatever is asked for beside them."""

from __future__ import annotations

import numpy as np
import pytest
from changed_models import OVERFLOWS, overflowing

from fq import Context, FqError
from fq.measure.likelihood import Likelihoods, common_prefix
from fq.measure.statistics import score

RULE = "ffn_norm[*].raw=fp8_e4m3fn"


def alone(model, executor, ids, first, rule=None):
    """By one evaluation in a context of its own: -ln p, and the likeliest tokens."""
    logits = Context(model, 128, executor, rule).eval(ids[:-1], slice(first - 1, None))
    targets = np.array(ids[first:])
    return score(logits, targets, executor), logits.argmax(axis=1)


@pytest.fixture
def sequences(tiny):
    rng = np.random.default_rng(2)
    most = tiny.hparams.n_vocab - 1
    begin = rng.integers(0, most, 20).tolist()
    return [begin + rng.integers(0, most, n).tolist() for n in (1, 9, 30)]


@pytest.mark.parametrize("rule", [None, RULE, "l_out[*]=int8:tensor"])
@pytest.mark.parametrize("batch", [7, 512])
def test_each_is_as_if_it_were_alone(tiny, executor, sequences, rule, batch):
    likelihoods = Likelihoods(tiny, 128, executor, rule, batch=batch)
    first = [20, 17, 22]
    others = [[token + 1 for token in ids] for ids in sequences]
    for some in (sequences, others, sequences):  # nothing is left of what came before
        for found, ids, at in zip(likelihoods.of(some, first), some, first, strict=True):
            nll, likeliest = alone(tiny, executor, ids, at, rule)
            assert found.log_p.tolist() == (-nll).tolist() and found.finite
            assert found.greedy == (likeliest.tolist() == ids[at:])


def test_what_is_shared_is_run_once(tiny, executor, sequences):
    likelihoods = Likelihoods(tiny, 128, executor, RULE)
    steps = []
    likelihoods.on_step = lambda: steps.append(1)
    likelihoods.of(sequences, [20] * 3)
    # 19 tokens, and of each sequence what follows but its last, of whose prediction nothing is asked
    place = next(value.place for value in tiny.values if value.place.kind == "ffn_norm")
    assert likelihoods.context.fake_quant.rows_seen(place) == 19 + 1 + 9 + 30 and len(steps) == 3


def test_greedy(tiny, executor):
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(Context(tiny, 128, executor).eval(ids).argmax()))
    vocab = tiny.hparams.n_vocab
    last, first = [*ids[:-1], (ids[-1] + 1) % vocab], [*ids[:3], (ids[3] + 1) % vocab, *ids[4:]]
    for batch in (2, 512):
        likelihoods = Likelihoods(tiny, 128, executor, batch=batch)
        assert [one.greedy for one in likelihoods.of([ids, last], [3, 3])] == [True, False]
        # what follows another token is the likeliest there
        found = first[:4]
        while len(found) < len(ids):
            found.append(int(Context(tiny, 128, executor).eval(found).argmax()))
        assert [one.greedy for one in likelihoods.of([found], [3])] == [False]


def test_logits_that_are_not_finite(tmp_path, executor):
    (found,) = Likelihoods(overflowing(tmp_path / "m.gguf"), 128, executor, OVERFLOWS).of([[1, 2, 3]], [1])
    assert not found.finite


def test_what_cannot_be_scored(tiny, executor):
    likelihoods = Likelihoods(tiny, 16, executor)
    assert len(likelihoods.of([[3] * 17], [1])[0].log_p) == 16
    with pytest.raises(FqError, match="18 tokens does not fit a context of 16"):
        likelihoods.of([[3] * 18], [1])
    for ids, first in (([3, 4], 2), ([3, 4], 0), ([3], 1)):
        with pytest.raises(FqError, match="none to score"):
            likelihoods.of([ids], [first])
    with pytest.raises(FqError, match="batch size"):
        Likelihoods(tiny, 16, executor, batch=0)


def test_common_prefix():
    assert common_prefix([np.array([1, 2, 3]), np.array([1, 2, 4, 5])]) == 2
    assert common_prefix([np.array([1, 2]), np.array([1, 2, 4])]) == 2
    assert common_prefix([np.array([2]), np.array([1, 2])]) == 0
