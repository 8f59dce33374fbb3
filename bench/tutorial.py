"""Runs the commands of a page of the docs and puts what they print beneath them.

A ```console block has commands, on lines that begin with "$ ", and beneath each what it prints to stdout, or
the one line of error of a command that fq refuses. All of a page are run in order in one folder, by bash; a
block after a line `<!-- script: NAME -->` is a file in it. What is not the same on every machine and in every
run, and what the page leaves out, stands there as `...`, which is anything, as for doctest.
"""

from __future__ import annotations

import argparse
import doctest
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fq
import fq_kernels

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tutorial.md"
_BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.M | re.S)
_SCRIPT = re.compile(r"^<!-- script: (\S+) -->\n```\w*\n(.*?)^```$", re.M | re.S)
BAD_INPUT = 2  # fq's exit status
# Of an output, what the page has as `...`.
_VARIES = (
    (re.compile(r"^time   .* s, \d+ threads$", re.M), "time   ... s, ... threads"),
    (re.compile(r"^time    some .*$", re.M), "time    some ..."),
    (re.compile(r"^memory  .*$", re.M), "memory  ..."),
)


@dataclass(frozen=True)
class Step:
    """A command of a page, and what the page says that it prints: lines, each with its end."""

    command: str
    output: str

    def __str__(self) -> str:
        return f"$ {self.command}\n{self.output}"


def steps_of(block: str) -> list[Step]:
    """Of what is between the fences. Raises ValueError where it does not begin with a command."""
    if not block.startswith("$ "):
        raise ValueError(f"a console block begins with no command: {block.partition(chr(10))[0]!r}")
    found = []
    for text in re.split(r"^\$ ", block, flags=re.M)[1:]:
        match = re.match(r"((?:.*\\\n)*.*)\n", text)  # lines that end in a backslash go on
        assert match is not None
        found.append(Step(match[1], text[match.end() :]))
    return found


def matches(step: Step, printed: str) -> bool:
    return doctest.OutputChecker().check_output(step.output, printed, doctest.ELLIPSIS)


class Folder:
    """Where a page's commands run: a new one, in which `fq` and `python` are those of this process."""

    def __init__(self, folder: Path):
        self.folder = folder / "work"
        self.folder.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        for name, words in {"fq": "-m fq", "python": ""}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
            program.chmod(0o755)
        packages = [str(Path(package.__file__).parents[1]) for package in (fq, fq_kernels)]
        self.environment = os.environ | {
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONUTF8": "1",
        }

    def run(self, command: str) -> str:
        """What it prints, or fq's line of error. Raises ValueError with the end of stderr where it fails
        otherwise."""
        run = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        said = "".join(re.findall(r"^fq: error: .*\n", run.stderr, re.M))
        if run.returncode == BAD_INPUT and said:
            return run.stdout + said
        if run.returncode:
            raise ValueError(f"$ {command}\nexit status {run.returncode}\n{run.stdout}{run.stderr[-2000:]}")
        return run.stdout


def run_page(text: str, folder: Path) -> Iterator[tuple[Step, str]]:
    """Each step of a page as it is run, with what it printed. Raises ValueError, as Folder.run."""
    here = Folder(folder)
    for name, script in _SCRIPT.findall(text):
        (here.folder / name).write_text(script, "utf-8")
    for block in _BLOCK.findall(text):
        for step in steps_of(block):
            yield step, here.run(step.command)


def difference(step: Step, printed: str) -> str:
    return f"$ {step.command}\nthe page says\n{step.output}\nit prints\n{printed}"


def abridged(printed: str, shown: str) -> str:
    """As many lines of the beginning and the end as are shown, where a line of `...` stands between them."""
    before, dots, after = shown.partition("\n...\n")
    if not dots:
        return printed
    lines = printed.splitlines(keepends=True)
    head, tail = before.count("\n") + 1, after.count("\n")
    return "".join([*lines[:head], "...\n", *lines[len(lines) - tail :]])


def rewritten(text: str, printed: Sequence[str]) -> str:
    """The page with other outputs where they do not match: all others stay, with their `...`."""
    outputs = iter(printed)

    def step_again(step: Step) -> str:
        new = next(outputs)
        if matches(step, new):
            return str(step)
        for pattern, instead in _VARIES:
            new = pattern.sub(instead, new)
        return str(Step(step.command, abridged(new, step.output)))

    return _BLOCK.sub(lambda block: "".join(map(step_again, steps_of(block[0]))), text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tutorial", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="only say what differs: exit status 1")
    args = parser.parse_args(argv)
    try:
        text = args.page.read_text("utf-8")
        printed, differences = [], 0
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            for step, output in run_page(text, Path(folder)):
                printed.append(output)
                if not matches(step, output):
                    differences += 1
                    print(difference(step, output))
            seconds = time.monotonic() - begin
        if not args.check:
            args.page.write_text(rewritten(text, printed), "utf-8")
    except (ValueError, OSError) as e:
        print(f"bench.tutorial: {e}", file=sys.stderr)
        return 2
    counts = f"{len(printed)} commands, {differences} other outputs, {seconds:.0f} s"
    print(f"bench.tutorial: {args.page.name}: {counts}", file=sys.stderr)
    return int(args.check and differences > 0)


if __name__ == "__main__":
    sys.exit(main())
