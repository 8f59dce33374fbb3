"""Labels drawn from logits: their distribution, and that nothing but the seed has a say in them."""

from __future__ import annotations

import numpy as np

from fq import Executor
from fq.measure.labels import sampled_labels

LABELS = [[298, 191, 162, 64, 287], [286, 144, 122, 57, 269]]


def test_frequencies_are_the_distribution(executor):
    p = np.array([0.5, 0.25, 0.125, 0.125])
    logits = np.tile(np.log(p).astype(np.float32) + 3, (4000, 1))
    labels = sampled_labels(logits, 4, 0, 7, executor)
    assert labels.shape == (4, 4000)
    counts = np.bincount(labels.ravel(), minlength=4)
    assert np.abs(counts / labels.size - p).max() < 4 * 0.5 / np.sqrt(labels.size)
    # samples of a row are independent
    agree = np.mean(labels[0] == labels[1])
    assert abs(agree - (p * p).sum()) < 0.04


def test_each_row_and_sample_stands_alone(executor):
    logits = np.random.default_rng(1).standard_normal((40, 300)).astype(np.float32)
    labels = sampled_labels(logits, 3, 5, 2, executor)
    with Executor(1) as one:
        assert (sampled_labels(logits[:17], 2, 5, 2, one) == labels[:2, :17]).all()
    for other in (sampled_labels(logits, 3, 6, 2, executor), sampled_labels(logits, 3, 5, 3, executor)):
        assert (other != labels).mean() > 0.5


def test_the_same_everywhere(isa, executor):
    logits = np.random.default_rng(1).standard_normal((5, 300)).astype(np.float32)
    assert sampled_labels(logits, 2, 0, 0, executor).tolist() == LABELS


def test_impossible_tokens_are_not_drawn(executor):
    logits = np.full((200, 50), -np.inf, np.float32)
    logits[:, [0, 49]] = 0
    logits[:100, 49] = -np.inf
    labels = sampled_labels(logits, 2, 0, 0, executor)
    assert (labels[:, :100] == 0).all() and set(labels[:, 100:].ravel()) == {0, 49}
