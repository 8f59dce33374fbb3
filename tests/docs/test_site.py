"""The docs site: links as they hold in the repository hold in it, and the reference leaves nothing out."""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import types
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the docs extra is not installed")

from broken_links import problems
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from reference import MissingDocstring, blocks, commands_page, plain, python_page

import fq
import fq_kernels
from fq.cli import COMMANDS, whole_parser
from fq.commands.completion import commands_of

ROOT = Path(__file__).parents[2]
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
FRAME = '<div>\n<table border="1" class="dataframe">\n<tr><th>one</th></tr></table></div>'
NOTEBOOK = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    "cells": [
        {"id": "a", "cell_type": "markdown", "metadata": {}, "source": "# A title\n\n[formats](formats.md)"},
        {
            "id": "b",
            "cell_type": "code",
            "metadata": {},
            "execution_count": 1,
            "source": "print(6 * 7)",
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": "42\n"},
                {"output_type": "display_data", "metadata": {}, "data": {"image/png": PIXEL}},
                {"output_type": "display_data", "metadata": {}, "data": {"text/html": FRAME}},
            ],
        },
    ],
}


@pytest.fixture
def repository(tmp_path):
    """A small one, whose site is made as this one's is."""
    for folder in ("docs/_site", "bench/results", "model/fq/data"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "docs/_site/extra.css", tmp_path / "docs/_site")
    files = {
        "mkdocs.yml": f"INHERIT: {ROOT}/mkdocs.yml\nhooks: [{ROOT}/docs/_site/hooks.py]\nnav: [README.md]\n"
        "validation: {nav: {omitted_files: ignore}}\n",
        "README.md": "# Home\n\n## A part\n",
        "bench/README.md": "# Benchmarks\n",
        "docs/formats.md": "# Formats\n\n## One, and two\n",
        "model/fq/sums.py": "",
        "model/fq/data/schema.json": "{}",
    }
    # the reference may name any
    for path in (ROOT / "docs").rglob("*.md"):
        files.setdefault(path.relative_to(ROOT).as_posix(), "# A page\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def built(repository):
    build(load_config(str(repository / "mkdocs.yml"), strict=True))
    return repository / "build" / "site"


def write(repository, page, line):
    with open(repository / page, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")


LINKS = [
    ("README.md", "docs/formats.md", '<a href="formats.html">here</a>'),
    ("README.md", "docs/formats.md#one-and-two", '<a href="formats.html#one-and-two">here</a>'),
    ("README.md", "bench/", '<a href="bench/index.html">here</a>'),
    ("bench/README.md", "../README.md#a-part", '<a href="../index.html#a-part">here</a>'),
    ("docs/formats.md", "../bench/README.md", '<a href="bench/index.html">here</a>'),
    ("docs/formats.md", "../model/fq/sums.py", "<span>here (<code>model/fq/sums.py</code>)</span>"),
    ("docs/formats.md", "../model/fq/data/schema.json", '<a href="model/fq/data/schema.json">here</a>'),
    ("bench/README.md", "results/", "<span>here (<code>bench/results</code>)</span>"),
    ("README.md", "https://example.org/x", '<a href="https://example.org/x">here</a>'),
]


def test_links_hold_in_the_site(repository):
    for i, (page, link, _) in enumerate(LINKS):
        write(repository, page, f"{i}. is [here]({link}), and `[there](none.md)` is none.")
    write(repository, "README.md", "Not twice: [`sums.py`](model/fq/sums.py).")
    site = built(repository)
    for page, _, html in LINKS:
        name = page.removeprefix("docs/").replace("README", "index").replace(".md", ".html")
        assert f"is {html}, and <code>[there](none.md)</code> is none." in (site / name).read_text("utf-8")
    assert "Not twice: <code>model/fq/sums.py</code>." in (site / "index.html").read_text("utf-8")
    assert problems(site) == []


BROKEN = [
    ("README.md", "docs/none.md"),
    ("README.md", "formats.md"),  # it is in docs
    ("README.md", "model/fq/none.py"),
    ("README.md", "docs/formats.md#none"),
    ("README.md", "#none"),
    ("README.md", "../elsewhere.md"),
    ("bench/README.md", "docs/formats.md"),
    ("docs/formats.md", "README.md"),
    ("docs/formats.md", "../bench/none.md"),
    ("docs/formats.md", "/formats.md"),
]


def test_links_to_nothing_are_errors(repository):
    for page, link in BROKEN:
        write(repository, page, f"[here]({link})")
    write(repository, "README.md", "![a picture](docs/none.png)")
    with pytest.raises(Abort, match=f"with {len(BROKEN) + 1} warnings"):
        built(repository)


def test_a_page_that_the_navigation_lacks_is_an_error(repository):
    config = repository / "mkdocs.yml"
    config.write_text(config.read_text("utf-8").replace("validation", "extra"), encoding="utf-8")
    with pytest.raises(Abort):
        built(repository)


def test_a_notebook_is_a_page(repository):
    (repository / "docs" / "first.ipynb").write_text(json.dumps(NOTEBOOK), encoding="utf-8")
    (repository / "README.md").write_text("# Home\n\n[here](docs/first.ipynb)\n", encoding="utf-8")
    site = built(repository)
    assert '<a href="first.html">here</a>' in (site / "index.html").read_text("utf-8")
    text = (site / "first.html").read_text("utf-8")
    assert (
        '<a href="formats.html">formats</a>' in text and "<code>42" in text and "<table>\n<tr><th>one" in text
    )
    [picture] = re.findall(r'src="(first_files/[^"]+)"', text)
    assert (site / picture).read_bytes() == base64.b64decode(PIXEL)
    assert json.loads((site / "first.ipynb").read_text("utf-8")) == NOTEBOOK
    assert problems(site) == []


def test_every_command_and_option_is_there():
    parts = re.split(r"^## `(.*?)` .*$", commands_page(), flags=re.M)
    shown = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(shown) == [f"fq {name}" for name in COMMANDS]
    for command in commands_of(whole_parser()):
        text = shown[command.prog]
        assert plain(command.description) in text
        for action in command._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            for option in action.option_strings:
                assert re.search(rf"^.*`{option}[ `].*\n:   \S", text, re.M), (command.prog, option)
            if not action.option_strings:
                assert re.search(r"^\*\*Positional arguments\*\*\n\n`.*`\n:   \S", text, re.M), command.prog
            # what argparse knows, and shows nowhere by itself
            if action.default not in (None, False, [], argparse.SUPPRESS):
                assert "default" in action.help, (command.prog, action.option_strings)
        for group in command._action_groups:
            if any(not isinstance(action, argparse._HelpAction) for action in group._group_actions):
                assert f"**{group.title.capitalize()}**" in text


def test_an_option_is_shown_as_its_help_says():
    text = commands_page().partition("## `fq sweep`")[2]
    assert "\n`-f FILE`, `--file FILE`\n:   UTF-8 text" in text
    assert "\n`--scored {second-half,all}`\n:   " in text
    assert "[docs/norm-unit.md](../norm-unit.md)" in text
    assert "usage: fq sweep [-h]" in text and "\033" not in text
    assert max(map(len, re.findall(r"^(?: {8}|usage: ).*$", text, re.M))) <= 80


@pytest.mark.parametrize("module", [fq, fq_kernels])
def test_every_public_name_is_there(module):
    parts = re.split(r"^## `(.*?)` .*$", python_page(module), flags=re.M)
    assert parts[1::2] == module.__all__
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        assert re.match(rf"\n\n```python\n{name}\b", text)
        assert re.sub(r"```.*?```", "", text, flags=re.S).strip(), name


def test_a_name_without_a_docstring_is_an_error():
    module = types.ModuleType("bare")
    module.__all__ = ["nothing"]
    module.nothing = lambda: None
    with pytest.raises(MissingDocstring, match=r"bare\.nothing"):
        python_page(module)


def test_signatures():
    kernels, model = python_page(fq_kernels), python_page(fq)
    # from the stub, with no types
    assert "\nforce_isa(name)\n" in kernels and "\nexp(x)\n" in kernels and "_Floats" not in kernels
    assert "\n`map(fn, n)`\n:   Call `fn(i)`" in kernels
    assert "\n    point='raw',\n" in kernels
    # from the code
    assert "\nfind(" in model and "\nSampler(" in model and "'Model'" not in model
    assert "\n`clear()`\n:   Forget" in model


def test_docstrings_become_markdown():
    text = """Rows of *x*, see docs/formats.md.

quant      format (or ``its`` name)
           of a row
rows, first_row
           which
first
           of all
scale (a): one

    y = x_1

    z = [y]

>>> 1 + 1
2
"""
    assert blocks(text.strip()) == (
        "Rows of \\*x\\*, see [docs/formats.md](../formats.md).\n\n"
        "`quant`\n:   format (or `its` name) of a row\n\n"
        "`rows, first_row`\n:   which\n\n"
        "`first`\n:   of all\n\n"
        "`scale (a):`\n:   one\n\n"
        "```python\ny = x_1\n\nz = [y]\n```\n\n"
        "```pycon\n>>> 1 + 1\n2\n```\n"
    )


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="none.html">', "a.html links to none.html, which is not there"),
        ('<img src="x/none.png">', "a.html links to x/none.png, which is not there"),
        ('<a href="b.html#none">', "a.html links to b.html#none: no such fragment"),
        ('<script src="https://example.org/x.js"></script>', "a.html loads https://example.org/x.js"),
        ("<style>@import '//example.org/x.css'</style>", "a.html loads //example.org/x.css"),
        ('<a href="b.html#part"><a href="https://example.org"><a href="#top">', None),
    ],
)
def test_what_a_browser_would_not_find(html, problem, tmp_path):
    (tmp_path / "a.html").write_text(html, encoding="utf-8")
    (tmp_path / "b.html").write_text('<h2 id="part">', encoding="utf-8")
    assert problems(tmp_path) == ([problem] if problem else [])
