"""fq completion."""

from __future__ import annotations

import argparse

from ..errors import FqError

SHELLS = ("bash", "zsh", "fish")
KINDS = {
    "FILE": "FILE",
    "MODEL": "FILE",
    "DIR": "DIRECTORY",
}  # what the help calls a file's name

EPILOG = """\
Where they go:
  bash  fq completion bash > ~/.local/share/bash-completion/completions/fq
  zsh   fq completion zsh > ~/.zfunc/_fq      (a folder in $fpath)
  fish  fq completion fish > ~/.config/fish/completions/fq.fish
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=SHELLS, help="for which shell")


def main(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise FqError("completions need shtab: pip install 'fq[completion]'") from None
    parser = args.whole_parser()
    for command in (parser, *commands_of(parser)):
        for action in command._actions:
            kind = KINDS.get(str(action.metavar or action.dest.upper()))
            if kind is not None:
                action.complete = getattr(shtab, kind)
    print(shtab.complete(parser, args.shell))
    return 0


def commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    subparsers = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [command for action in subparsers for command in action.choices.values()]
