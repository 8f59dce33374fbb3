"""fq completion: what a shell completes."""

from __future__ import annotations

import argparse
import importlib
import shlex
import shutil
import subprocess
import sys

import pytest

from fq.cli import COMMANDS, whole_parser
from fq.commands.completion import SHELLS, commands_of


def script(shell):
    return subprocess.run(
        [sys.executable, "-m", "fq", "completion", shell], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_there(shell):
    text = script(shell)
    assert len(commands_of(whole_parser())) == len(COMMANDS)
    for name in COMMANDS:
        assert name in text
        command = argparse.ArgumentParser()
        importlib.import_module(f"fq.commands.{name.replace('-', '_')}").add_options(command)
        for action in command._actions:
            if not isinstance(action, argparse._HelpAction):
                for option in action.option_strings:
                    # fish has them without their dashes
                    assert option in text or f"-l {option[2:]}" in text, option


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_it(shell, tmp_path):
    program = shutil.which(shell)
    if program is None:
        assert shell != "bash"
        return
    path = tmp_path / "fq"
    path.write_text(script(shell))
    subprocess.run([program, "-n", path], check=True)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["fq", "perp"], {"perplexity"}),
        (["fq", "sweep", "--chunk-o"], {"--chunk-order"}),
        (["fq", "perplexity", "--chunk-order", ""], {"first", "random"}),
        (["fq", "completion", "z"], {"zsh"}),
        (["fq", "perplexity", "-f", "tex"], {"text.txt"}),
    ],
)
def test_bash_completes(words, completed, tmp_path):
    (tmp_path / "text.txt").touch()
    (tmp_path / "fq.bash").write_text(script("bash"))
    setup = f"source fq.bash; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
    ran = subprocess.run(
        [
            "bash",
            "-c",
            setup
            + "$(complete -p fq | sed 's/.* -F \\([^ ]*\\).*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\"",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(ran.stdout.split()) == completed


def test_without_the_library(monkeypatch, capsys):
    from fq.cli import main

    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'fq[completion]'" in capsys.readouterr().err
