"""Tasks: which tokens are scored, what is the likeliest answer, and what a rule changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from changed_models import OVERFLOWS, overflowing

from fq import Context, FqError, NotFiniteError
from fq.measure.likelihood import Continuation, Likelihoods
from fq.measure.proportions import mcnemar_p, tango_interval, wilson_interval
from fq.measure.statistics import score
from fq.measure.tasks import SCORES, Encoded, Tasks, chosen, encoded
from fq.text.items import Item

COARSE = "*[*].raw=fp4_e2m1"


def question(context, *answers, right=(0,)):
    return Item("file: line 1", (context,) * len(answers), tuple(f" {a}" for a in answers), frozenset(right))


def after(context, choices, rest, right=(0,)):
    return Item(
        "file: line 1", tuple(context + c for c in choices), (rest,) * len(choices), frozenset(right), True
    )


class Words:
    """A word is a token."""

    add_bos, bos_id = True, 0

    def __init__(self):
        self.known = {}

    def encode(self, text, *, add_special):
        assert not add_special
        return [self.known.setdefault(word, len(self.known) + 1) for word in text.split()]


def test_what_is_scored_of_an_answer():
    """By tokens from where the texts differ on, as llama-perplexity; the sum from the answer's beginning."""
    one = encoded(question("a b c", "the cat sat", "the dog"), Words())
    assert one.sequences == ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 7)) or one.sequences == (
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 7],
    )
    assert one.by_token == ((5, 7), (5, 6)) and one.begins == (4, 4) and one.first == (4, 4)
    assert one.longest == 7


@pytest.mark.parametrize("end", ["\n", "\t", ":\n\n"])
def test_a_question_that_ends_in_white_space(tiny, end):
    """It is the answer's, as lm-eval has it."""
    one = encoded(question(f"Hello world{end}", "of the", "and"), tiny.tokenizer)
    stripped = f"Hello world{end}".rstrip()
    assert one.begins == (len(tiny.tokenizer.encode(stripped)),) * 2


def test_a_question_that_ends_in_a_space(tiny):
    """The space is the answer's, as lm-eval has it."""
    spaced, plain = (
        Item("f", (question,) * 2, rests, frozenset({0}))
        for question, rests in (("Hello world ", ("of the", "and")), ("Hello world", (" of the", " and")))
    )
    one, other = encoded(spaced, tiny.tokenizer), encoded(plain, tiny.tokenizer)
    assert (one.sequences, one.begins, one.first) == (other.sequences, other.begins, other.first)
    assert one.begins == (len(tiny.tokenizer.encode("Hello world")),) * 2


@pytest.mark.parametrize(
    ("answers", "by_token", "begins"),
    [
        (("x", "y"), ((2, 3), (2, 3)), (2, 2)),
        (("x", "x y"), ((2, 3), (2, 4)), (2, 2)),  # one begins the other: a token of each is left
        (("x", "x"), ((2, 3), (2, 3)), (2, 2)),
    ],
)
def test_texts_that_hardly_differ(answers, by_token, begins):
    one = encoded(question("a", *answers), Words())
    assert one.by_token == by_token and one.begins == begins


def test_without_bos_the_first_token_is_never_scored():
    words = Words()
    words.add_bos = False
    one = encoded(Item("f", ("a", "b"), (" c", " c"), frozenset({0})), words)
    assert one.by_token == ((1, 2), (1, 2)) and one.first == (1, 1)
    with pytest.raises(FqError, match="f: a text of one token has nothing to score"):
        encoded(Item("f", ("a", "b"), ("", ""), frozenset({0})), words)


def test_what_is_scored_of_what_follows_a_choice():
    """What follows it but for the text's last token; all from where the texts differ where little follows."""
    long = encoded(after("a b ", ("he", "she it"), " c d e f g"), Words())
    assert long.by_token == ((4, 8), (5, 9)) and long.begins == (4, 5)
    short = encoded(after("a b ", ("he", "she it"), " c d"), Words())
    assert short.by_token == ((3, 5), (3, 6))
    last = encoded(after("a b ", ("he", "she"), " c d e"), Words())  # 3 follow it, 4 with itself
    assert last.by_token == ((4, 6), (4, 6))


def continuations(*ln_p):
    return [Continuation(np.array(one), False, True) for one in ln_p]


def test_what_is_likeliest():
    item = question("q", "long answer of many words", "no", right=(1,))
    one = Encoded(item, ([0] * 6, [0] * 4), (2, 2), ((3, 6), (3, 4)), (2, 2))
    found = chosen(one, continuations([-1.0, -2.0, -1.0, -1.5], [-1.5, -2.5]))
    assert found["acc_token"] == (0, [-1.5, -2.5])
    assert found["acc"] == (1, [-5.5, -4.0])
    assert found["acc_norm"][0] == 0 and found["acc_norm"][1] == pytest.approx([-5.5 / 25, -4.0 / 2])
    equal = chosen(one, continuations([-1.0, -1.0, -1.0, -1.0], [-3.0, -1.0]))
    assert equal["acc_token"][0] == 0 and equal["acc"][0] == 0  # the first of equals
    # wherever it is that they are not finite
    lost = chosen(
        one, [replace(part, finite=i > 0) for i, part in enumerate(continuations([-1.0] * 4, [-9.0] * 2))]
    )
    assert {name: choice for name, (choice, _) in lost.items()} == dict.fromkeys(SCORES, -1)


@pytest.fixture(scope="module")
def items(tiny):
    rng = np.random.default_rng(4)
    words = "Hello world the of and to in is it that was for on as with".split()

    def some(n):
        return " ".join(rng.choice(words, n))

    found = [
        question(some(6), *(some(rng.integers(1, 5)) for _ in range(4)), right=(i % 4,)) for i in range(40)
    ]
    found += [after(some(4) + " ", (some(1), some(1)), " " + some(6), right=(i % 2,)) for i in range(10)]
    return [encoded(item, tiny.tokenizer) for item in found]


def test_figures(tiny, executor, items):
    run = Tasks(items, Likelihoods(tiny, 64, executor), Likelihoods(tiny, 64, executor, COARSE))
    steps = run.steps
    assert steps == 2 * (40 * 4 + 10 * 2)
    done = []
    run.on_step = lambda: done.append(1)
    assert list(run) == list(range(50)) and len(done) == steps and run.steps == 0
    data = run.result()
    assert (data["n_items"], data["partial"], data["not_finite"]) == (50, False, [])
    assert data["chance"] == pytest.approx((40 / 4 + 10 / 2) / 50)
    for name in SCORES:
        one = data["scores"][name]
        hits = {
            which: [entry[which][name] in entry["right"] for entry in data["items"]]
            for which in ("base", "rounded")
        }
        lost = sum(a and not b for a, b in zip(hits["base"], hits["rounded"], strict=True))
        gained = sum(b and not a for a, b in zip(hits["base"], hits["rounded"], strict=True))
        assert (one["lost"], one["gained"]) == (lost, gained)
        for which in hits:
            assert one[which] == sum(hits[which]) / 50
            assert one[f"{which}_ci95"] == wilson_interval(sum(hits[which]), 50)
        assert one["difference"] == pytest.approx(one["rounded"] - one["base"])
        assert one["difference_ci95"] == tango_interval(lost, gained, 50) and one["p"] == mcnemar_p(
            lost, gained
        )
    assert run.share == data["scores"]["acc_token"]["base"]
    assert sum(one["answers_changed"] for one in data["scores"].values()), "the rule shows nothing"
    changes = [
        np.mean([entry["rounded"]["ln_p"][i] - entry["base"]["ln_p"][i] for i in entry["right"]])
        for entry in data["items"]
    ]
    assert data["ln_p_right"]["mean"] == pytest.approx(np.mean(changes))
    low, high = data["ln_p_right"]["ci95"]
    assert (high - low) / 2 == pytest.approx(2.0095752 * np.std(changes, ddof=1) / np.sqrt(50))


def test_ln_p_is_that_of_an_evaluation_of_its_own(tiny, executor, items):
    run = Tasks(items[:3], Likelihoods(tiny, 64, executor, COARSE))
    list(run)
    for entry, one in zip(run.result()["items"], items, strict=False):
        for ln_p, ids, begin in zip(entry["base"]["ln_p"], one.sequences, one.begins, strict=True):
            logits = Context(tiny, 64, executor, COARSE).eval(ids[:-1], slice(begin - 1, None))
            assert ln_p == -float(score(logits, np.array(ids[begin:]), executor).sum())


def test_the_baseline_alone(tiny, executor, items):
    run = Tasks(items[:4], Likelihoods(tiny, 64, executor))
    list(run)
    data = run.result()
    assert data["ln_p_right"] is None and set(data["scores"]["acc"]) == {"base", "base_ci95"}
    assert "rounded" not in data["items"][0]


def test_a_part_of_a_run(tiny, executor, items):
    run = Tasks(items, Likelihoods(tiny, 64, executor))
    for position in run:
        if position == 2:
            break
    assert run.result()["n_items"] == 3 and run.result()["partial"] and run.done == 3
    assert next(iter(run)) == 3


def test_what_is_not_finite(tmp_path, executor, items):
    model = overflowing(tmp_path / "m.gguf")
    run = Tasks(items[:2], Likelihoods(model, 64, executor), Likelihoods(model, 64, executor, OVERFLOWS))
    list(run)
    data = run.result()
    assert data["not_finite"] == ["file: line 1"] * 2 and data["scores"]["acc"]["rounded"] == 0
    assert data["ln_p_right"] == {"mean": None, "ci95": None, "n_items": 0}
    assert data["items"][0]["rounded"]["acc"] == -1
    with pytest.raises(
        NotFiniteError, match="baseline, file: line 1: the logits are not finite; the first node"
    ):
        list(Tasks(items[:2], Likelihoods(model, 64, executor, OVERFLOWS)))


def test_what_is_not_finite_leaves_the_others_figures(tiny, executor, items):
    run = Tasks(items[:6], Likelihoods(tiny, 64, executor), Likelihoods(tiny, 64, executor, COARSE))
    list(run)
    whole = run.result()["ln_p_right"]
    run._found[2][1]["acc"] = (-1, [float("nan")] * 4)
    left = run.result()["ln_p_right"]
    assert whole["n_items"] == 6 and left["n_items"] == 5 and np.isfinite(left["mean"]) and left != whole


def test_a_text_that_is_none_is_named(tiny):
    with pytest.raises(FqError, match="file: line 1: the text holds lone surrogates"):
        encoded(question("\ud800", "a", "b"), tiny.tokenizer)


def test_an_item_that_does_not_fit(tiny, executor, items):
    with pytest.raises(FqError, match=r"file: line 1: \d+ tokens do not fit a context of 8"):
        Tasks(items, Likelihoods(tiny, 8, executor))
