"""The commands of the tutorial, and of other pages, print what the pages say that they print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # last: an installed package goes before the sources

from bench import tutorial
from bench.tutorial import ROOT, Step, steps_of

# The model is looked for in the cache of this process.
PAGES = [
    page
    for page in [
        ROOT / "docs/tutorial.md",
        ROOT / "docs/python.md",
        *sorted((ROOT / "docs/how-to").glob("*.md")),
    ]
    if "```console\n" in page.read_text("utf-8")
]


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_says(page, smollm2_path, tmp_path):
    ran = list(tutorial.run_page(page.read_text("utf-8"), tmp_path))
    assert ran
    wrong = [
        tutorial.difference(step, printed) for step, printed in ran if not tutorial.matches(step, printed)
    ]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_text_quotes_what_is_printed(page):
    """*of 435 pairs the order of 4 is resolved*: written anew, an output may say another number."""
    text = page.read_text("utf-8")
    printed = " ".join(" ".join(re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)).split())
    prose = re.sub(r"^```.*?^```$|`[^`]*`", "", text, flags=re.M | re.S)
    quoted = [" ".join(words.split()) for words in re.findall(r"(?<![*\w])\*([^*]+)\*(?![*\w])", prose)]
    assert [words for words in quoted if re.search(r"\d", words) and words not in printed] == []


def test_the_tutorial_answers_its_question():
    """A page without the commands that it is about would pass the test above."""
    steps = [
        step
        for block in re.findall(r"^```console\n(.*?)^```$", tutorial.PAGE.read_text("utf-8"), re.M | re.S)
        for step in steps_of(block)
    ]
    commands = {" ".join(step.command.split()[:2]) for step in steps}
    assert commands >= {"fq perplexity", "fq sweep", "fq results", "fq sensitivity", "fq plan", "fq report"}
    assert any("control (baseline against itself)" in step.output for step in steps)
    bare = [step.command for step in steps if not step.output and "report" not in step.command]
    assert not bare, "commands whose output is not shown"


def test_blocks_are_taken_apart():
    assert steps_of("$ a \\\n  b\n1\n\n2\n$ c\n") == [Step("a \\\n  b", "1\n\n2\n"), Step("c", "")]
    with pytest.raises(ValueError, match="begins with no command: 'fq'"):
        steps_of("fq\n")


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ("time 2 s\nKL 1.5\n", True),
        ("time ... s\nKL 1.5\n", True),
        ("...\nKL 1.5\n", True),
        ("time 2 s\nKL 1.4\n", False),
        ("time ... s\nKL 1.4\n", False),
        ("KL 1.5\n", False),
        ("", False),
    ],
)
def test_an_output_is_compared_as_it_stands(said, same):
    assert tutorial.matches(Step("c", said), "time 2 s\nKL 1.5\n") is same


PAGE = """before
```console
$ printf 'time   2 s, 2 threads\\nKL 1\\n'
{}$ seq 6
{}```
```sh
$ never run
```
"""


def test_a_page_is_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("KL 2\n", "1\n0\n...\n6\n"))
    assert tutorial.main([str(page), "--check"]) == 1
    assert page.read_text() == PAGE.format("KL 2\n", "1\n0\n...\n6\n")
    assert tutorial.main([str(page)]) == 0
    made = PAGE.format("time   ... s, ... threads\nKL 1\n", "1\n2\n...\n6\n")
    assert page.read_text() == made
    assert tutorial.main([str(page), "--check"]) == 0
    assert tutorial.main([str(page)]) == 0
    assert page.read_text() == made


def test_the_same_command_twice(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo x >> f; cat f\n$ echo x >> f; cat f\n```\n")
    assert tutorial.main([str(page)]) == 0
    assert page.read_text() == "```console\n$ echo x >> f; cat f\nx\n$ echo x >> f; cat f\nx\nx\n```\n"


def test_files_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    script = "<!-- script: a.py -->\n```python\nimport fq\nprint(fq.__name__)\n```\n"
    page.write_text(f"{script}```console\n$ python a.py\n```\n")
    assert tutorial.main([str(page)]) == 0
    assert page.read_text() == f"{script}```console\n$ python a.py\nfq\n```\n"


def test_what_fq_refuses_is_an_output(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ fq inspect none.gguf\n```\n")
    assert tutorial.main([str(page)]) == 0
    assert "\nfq: error: none.gguf: no such file" in page.read_text()


@pytest.mark.parametrize("command", ["ls nowhere", "fq perplexity --chunks nothing", "exit 2"])
def test_a_command_that_fails_is_named(tmp_path, capsys, command):
    page = tmp_path / "page.md"
    page.write_text(before := f"```console\n$ {command}\n```\n")
    assert tutorial.main([str(page)]) == 2
    assert f"$ {command}\nexit status 2" in capsys.readouterr().err
    assert page.read_text() == before
