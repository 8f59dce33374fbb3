"""fq tasks and fq divergence as a user has them."""

from __future__ import annotations

import json

import pytest
from changed_models import OVERFLOWS, overflowing
from command_line import fq

from fq.errors import NOT_FINITE

RULE = "*[*].raw=fp8_e4m3fn"
QUESTION = {"question": "Hello world of the", "choices": ["world", "of the", "and is", "it"], "answer": 1}


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    lines = [QUESTION | {"question": f"{QUESTION['question']} {i}", "answer": i % 4} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_tasks(tiny_path, items, tmp_path):
    out, _ = fq(
        "tasks",
        "--multiple-choice",
        "-f",
        items,
        "-m",
        tiny_path,
        "--fake-quant",
        RULE,
        "--json",
        tmp_path / "j",
    )
    data = json.loads((tmp_path / "j").read_text())
    assert data["kind"] == "multiple-choice" and data["n_items"] == data["n_items_file"] == 12
    assert data["fake_quant"]["rules"] and data["numerics"]["threads"] >= 1 and not data["partial"]
    assert (
        "12, by chance 25.00 %" in out and "gained" in out and "ln p of the right answer, mean change" in out
    )
    for name, one in data["scores"].items():
        row = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert f"{100 * one['base']:.2f} %" in row and f"{100 * one['difference']:+.2f} %" in row


def test_some_of_the_tasks_without_a_rule(tiny_path, items, tmp_path):
    def some(*options):
        fq("tasks", "--multiple-choice", "-f", items, "-m", tiny_path, "--json", tmp_path / "j", *options)
        return [one["where"] for one in json.loads((tmp_path / "j").read_text())["items"]]

    every = some()
    five, three, other = some("--tasks", 5), some("--tasks", 3), some("--tasks", 5, "--tasks-seed", 1)
    assert five[:3] == three and len(five) == 5 and set(five) < set(every) and five != other
    out, _ = fq("tasks", "--multiple-choice", "-f", items, "-m", tiny_path, "--tasks", 5)
    assert "5 of 12" in out and "gained" not in out


def test_the_baseline_may_have_rules_and_be_another_file(tiny_path, items, tmp_path):
    def difference(*options):
        command = "tasks", "--multiple-choice", "-f", items, "-m", tiny_path, "--json", tmp_path / "j"
        fq(*command, *options)
        data = json.loads((tmp_path / "j").read_text())
        return data["ln_p_right"]["mean"]

    assert difference("--base-model", tiny_path) == 0
    assert difference("--fake-quant", RULE, "--base-fake-quant", RULE) == 0
    assert difference("--base-fake-quant", RULE) == -difference("--fake-quant", RULE) != 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "-1"], "--tasks must be >= 0"),
        (["--tasks-seed", "1"], "--tasks-seed is of the order of some"),
        (["--tasks", "1", "--tasks-seed", "-1"], "--tasks-seed must be from 0"),
        (["-c", "5"], "do not fit a context of 5"),
        (["-b", "0"], "batch size must be at least 1"),
        (["--json", "{items}"], "is the items"),
        (["--base-model", "/nonexistent"], "/nonexistent"),
    ],
)
def test_bad_options_of_tasks(tiny_path, items, options, words):
    options = [option.format(items=items) for option in options]
    _, err = fq("tasks", "--multiple-choice", "-f", items, "-m", tiny_path, *options, status=2)
    assert words in err and err.count("\n") == 1


def test_a_form_must_be_named(tiny_path, items):
    _, err = fq("tasks", "-f", items, "-m", tiny_path, status=2)
    assert "--hellaswag --winogrande --multiple-choice is required" in err


def test_items_that_are_not_finite(tmp_path, items):
    model = overflowing(tmp_path / "m.gguf").path
    out, _ = fq(
        "tasks", "--multiple-choice", "-f", items, "-m", model, "--fake-quant", OVERFLOWS, status=NOT_FINITE
    )
    assert "NOT FINITE: the rounded model's logits at 12 items, first items.jsonl: line 1" in out


def test_fewer_items_than_asked_for(tiny_path, items):
    _, err = fq("tasks", "--multiple-choice", "-f", items, "-m", tiny_path, "--tasks", 100)
    assert f"{items} has 12 items, not 100" in err


def test_divergence(tiny_path, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("Hello world\r\n\nThe answer is\nIt was\n")
    options = "-m", tiny_path, "-n", 12, "--fake-quant", "ffn_norm[*].raw=mxfp4", "--json", tmp_path / "j"
    out, _ = fq("divergence", "--prompts-file", lines, *options)
    data = json.loads((tmp_path / "j").read_text())
    assert data["n_prompts"] == 3 and data["n_predict"] == 12
    assert [row.split()[0] for row in out.split("first tokens")[1].splitlines()[1:6]] == [
        "1",
        "2",
        "4",
        "8",
        "12",
    ]
    assert f"{data['left']} of 3 texts leave the baseline's" in out
    fq("divergence", "--prompts-file", lines, "--prompts", 2, *options)
    assert json.loads((tmp_path / "j").read_text())["prompts"] == data["prompts"][:2]


def test_divergence_of_chunks_and_another_file(tiny_path, tmp_path):
    options = "-m", tiny_path, "-n", 4, "--prompts", 3, "--prompt-tokens", 7, "--base-model", tiny_path
    out, _ = fq("divergence", *options, "--json", tmp_path / "j")
    data = json.loads((tmp_path / "j").read_text())
    assert [one["n_prompt"] for one in data["prompts"]] == [7] * 3 and data["left"] == 0
    assert "0 of 3 texts leave the baseline's" in out and "base " in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is nothing to compare"),
        (["--fake-quant", RULE, "-n", "0"], "at least, not 0"),
        (["--fake-quant", RULE, "--prompts", "0"], "--prompts must be positive"),
        (["--fake-quant", RULE, "--prompt-tokens", "0"], "--prompt-tokens must be at least 1"),
        (
            ["--fake-quant", RULE, "--prompts-file", "x", "--prompt-tokens", "9"],
            "--prompt-tokens is of chunks",
        ),
        (["--fake-quant", RULE, "-n", "999"], "do not fit a context of 128"),
    ],
)
def test_bad_options_of_divergence(tiny_path, options, words):
    _, err = fq("divergence", "-m", tiny_path, *options, status=2)
    assert words in err and err.count("\n") == 1
