"""Sampling and the token loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fq import Context, FqError, Sampler, Timings
from fq.run.generation import generate
from fq_kernels.rules import FakeQuant, Rule

# in order of likelihood: 4, 1, 3, 0, 2
LOGITS = np.log(np.array([0.08, 0.25, 0.02, 0.15, 0.5])).astype(np.float32)


def candidates(sampler, logits=LOGITS, draws=400):
    return {sampler.sample(logits) for _ in range(draws)}


class TestSampler:
    def test_temperature_zero_is_argmax(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            logits = rng.standard_normal(50).astype(np.float32)
            assert Sampler().sample(logits) == logits.argmax()

    def test_greedy_takes_the_first_of_equals(self):
        assert Sampler().sample(np.array([0, 2, 1, 2], np.float32)) == 1

    def test_the_same_seed_draws_the_same(self):
        def draw(seed):
            sampler = Sampler(temp=1.0, seed=seed)
            return [sampler.sample(LOGITS) for _ in range(50)]

        assert draw(3) == draw(3)
        assert draw(3) != draw(4)

    def test_top_k_1_is_greedy(self):
        assert candidates(Sampler(temp=5.0, top_k=1, top_p=1)) == {4}

    @pytest.mark.parametrize(
        "top_k, support",
        [
            (2, {4, 1}),
            (3, {4, 1, 3}),
            (0, {0, 1, 2, 3, 4}),
            (99, {0, 1, 2, 3, 4}),
        ],
    )
    def test_top_k(self, top_k, support):
        assert candidates(Sampler(temp=3.0, top_k=top_k, top_p=1)) == support

    @pytest.mark.parametrize(
        "top_p, support",
        [
            (0.01, {4}),
            (0.49, {4}),
            (0.51, {4, 1}),
            (0.74, {4, 1}),
            (0.8, {4, 1, 3}),
            (0.95, {4, 1, 3, 0}),
            (1.0, {0, 1, 2, 3, 4}),
        ],
    )
    def test_top_p_keeps_the_fewest_tokens_that_reach_it(self, top_p, support):
        """Whatever the temperature, which comes after it."""
        assert candidates(Sampler(temp=3.0, top_k=0, top_p=top_p)) == support

    def test_top_p_is_of_what_top_k_left(self):
        # of {0.5, 0.25, 0.15} renormalised the first two hold 0.83
        assert candidates(Sampler(temp=3.0, top_k=3, top_p=0.8)) == {4, 1}

    def test_a_high_temperature_flattens_and_a_low_one_sharpens(self):
        def share(temp):
            sampler = Sampler(temp=temp, top_k=0, top_p=1)
            return sum(sampler.sample(LOGITS) == 4 for _ in range(400)) / 400

        assert share(0.05) == 1.0
        assert share(100.0) < 0.35  # 0.2 in the limit

    @pytest.mark.parametrize("temp", [1e-320, 1e-30])
    def test_a_tiny_temperature_is_greedy(self, temp):
        assert candidates(Sampler(temp=temp), LOGITS * 100, draws=20) == {4}

    def test_minus_infinity_is_never_drawn(self):
        logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
        assert candidates(Sampler(temp=1.0)) != candidates(Sampler(temp=1.0), logits) == {1, 3}

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"temp": -0.1}, "temperature"),
            ({"temp": math.nan}, "temperature"),
            ({"temp": math.inf}, "temperature"),
            ({"top_k": -1}, "top-k"),
            ({"top_p": 0.0}, "top-p"),
            ({"top_p": 1.01}, "top-p"),
            ({"top_p": math.nan}, "top-p"),
            ({"seed": -1}, "seed"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(FqError, match=message):
            Sampler(**options)


@pytest.fixture(scope="module")
def prompt(tiny):
    return tiny.tokenizer.encode("Hello world, the answer is")


@pytest.fixture
def context(tiny, executor):
    return Context(tiny, 32, executor)


def test_greedy_is_the_argmax_of_the_whole_sequence(tiny, context, executor, prompt):
    tokens = list(generate(context, prompt, 8, Sampler()))
    assert len(tokens) == 8
    fresh = Context(tiny, 32, executor)
    logits = fresh.eval([*prompt, *tokens], slice(None))
    assert tokens == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()


@pytest.mark.parametrize("batch", [1, 2, 3, 512])
def test_batches_of_the_prompt_change_neither_tokens_nor_counts(tiny, executor, prompt, batch):
    def run(batch):
        counted = FakeQuant(tiny.values, [Rule("bf16")])
        context = Context(tiny, 32, executor, counted)
        tokens = list(generate(context, prompt, 6, Sampler(), batch=batch))
        return tokens, [counter.rows_seen for counter in counted.counters.values()][:3]

    assert run(batch) == run(512)


def test_a_batch_size_gives_pieces_of_that_size(context, prompt, monkeypatch):
    sizes, plain = [], context.eval

    def counted(ids, *rest, **options):
        sizes.append(len(ids))
        return plain(ids, *rest, **options)

    monkeypatch.setattr(context, "eval", counted)
    list(generate(context, prompt, 3, Sampler(), batch=4))
    whole, rest = divmod(len(prompt), 4)
    assert sizes == [4] * whole + [rest] * (rest > 0) + [1, 1]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(tiny, executor, prompt):
    tokens = list(generate(Context(tiny, 32, executor), prompt, 8, Sampler()))
    stop = tokens[5]
    got = list(generate(Context(tiny, 32, executor), prompt, 8, Sampler(), stop={stop}))
    assert got == tokens[: tokens.index(stop)]


def test_the_last_token_needs_no_evaluation(context, prompt):
    timings = Timings()
    tokens = list(generate(context, prompt, 5, Sampler(), timings=timings))
    assert len(tokens) == 5
    assert (timings.prompt_n, timings.eval_n) == (len(prompt), 4)
    assert context.n_past == len(prompt) + 4
    assert timings.prompt_ms > 0 and timings.eval_ms > 0


def test_a_stopped_text_counts_the_evaluation_that_found_the_stop(tiny, executor, prompt):
    tokens = list(generate(Context(tiny, 32, executor), prompt, 8, Sampler()))
    timings = Timings()
    context = Context(tiny, 32, executor)
    got = list(generate(context, prompt, 8, Sampler(), stop={tokens[-1]}, timings=timings))
    assert timings.eval_n == len(got)


def test_no_tokens(context, prompt):
    timings = Timings()
    assert list(generate(context, prompt, 0, Sampler(), timings=timings)) == []
    assert timings.prompt_n == len(prompt) and timings.eval_n == 0


@pytest.mark.parametrize("n", [-1, 1000])
def test_a_full_context_ends_the_text(context, prompt, n):
    """The last token is drawn from the last place in the context and not evaluated."""
    tokens = list(generate(context, prompt, n, Sampler()))
    assert len(tokens) == 32 - len(prompt) + 1
    assert context.n_past == 32


def test_a_prompt_that_does_not_fit_after_others_is_refused_at_once(tiny, executor, prompt):
    context = Context(tiny, len(prompt) + 1, executor)
    list(generate(context, prompt[:3], 1, Sampler()))
    with pytest.raises(FqError, match=rf"has {len(prompt)} tokens after 3 others, the context"):
        generate(context, prompt, 1, Sampler())


def test_a_prompt_that_fills_the_context(tiny, executor, prompt):
    context = Context(tiny, len(prompt), executor)
    assert len(list(generate(context, prompt, -1, Sampler()))) == 1


def test_sampling_is_reproducible(tiny, executor, prompt):
    def run(seed):
        return list(generate(Context(tiny, 32, executor), prompt, 12, Sampler(temp=1.0, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    "tokens, batch, message",
    [
        ([], 512, "the prompt is empty"),
        ([1] * 33, 512, "33 tokens, the context 32"),
        ([1], 0, "batch size"),
    ],
)
def test_errors_come_before_any_token(context, tokens, batch, message):
    """At the call, so that nothing has been printed yet."""
    with pytest.raises(FqError, match=message):
        generate(context, tokens, 1, Sampler(), batch=batch)
    assert context.n_past == 0
