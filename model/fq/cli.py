"""The command line: options, and the one place where errors become an exit status."""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .errors import BAD_INPUT, INTERRUPTED, NOT_FINITE, FqError, NotFiniteError

# name: what it does. What a command takes, and what it runs, is in the module of its name in
# `commands`, which is imported when the command is asked for.
COMMANDS = {
    "pull": "Fetch a model into the user cache and check it.",
    "inspect": "Show a model's metadata, tensors by type, and sites.",
    "graph": "Show the graph's nodes, in order, with shapes.",
    "sites": "List every site and the rule, if any, that takes it; runs nothing.",
    "formats": "List the formats that a value can be rounded to.",
    "profiles": "List how engines compute their norms, step by step.",
    "run": "Generate text.",
    "perplexity": "Measure perplexity, and with a rule what the rounding changes.",
    "tasks": "Score multiple-choice items, and with a rule what the rounding changes.",
    "divergence": "Show after how many tokens of greedy text the rounded model's leaves the baseline's.",
    "ranges": "Show how large the values at sites are: exponents, outliers, headroom.",
    "calibrate": "Find static scales of sites on a text, for int, fp8 and nvfp4.",
    "sweep": "Measure every site in every format, each alone, in one pass over the text.",
    "worker-check": "Show of each worker of a cluster whether it can run a sweep of a model.",
    "sensitivity": "Estimate every site in every format from a few backward passes.",
    "plan": "Choose a format for each site within a budget, from an estimate.",
    "results": "List the sweeps in a store, show one of them, or compare several.",
    "pareto": "Show which norm units no other beats, in hardware's cost and in KL divergence.",
    "report": "Write a sweep as one HTML page: the verdict, charts, tables.",
    "trace": "Summarise the kernel calls that --trace has written.",
    "bench": "Time fake quantisation against the baseline, in turns.",
    "schema": "Print the JSON Schema of what --json writes, or list the kinds of documents.",
    "completion": "Print what completes fq's commands and options in a shell, at the Tab key.",
    "replicate": "Run the original report's experiments again, its figures beside ours.",
}


class _Parser(argparse.ArgumentParser):
    """A command's, which gets its options as it is first given something to read."""

    command: str | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.command is not None:
            _module(self.command).add_options(self)
        return super().parse_known_args(args, namespace)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.commands.{command.replace('-', '_')}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fq")
    except PackageNotFoundError:
        return "not installed"


class _Version(argparse.Action):
    """Looks the version up when it is asked for: to import what reads it takes longer than all else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"fq {_version()}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fq",
        description="Measure what rounding a normalisation layer's values, or others near it, to a narrow "
        "format costs a real LLM.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    # given its prog, argparse makes no usage text to take it from, for which it imports shutil
    commands = parser.add_subparsers(prog="fq", dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, description=text).command = name
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """With the options of all commands."""
    parser = _parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _module(command.command).add_options(command)
                command.command = None
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    # Nothing is left to numpy's BLAS. Its threads would look for work all the same, for tens of
    # milliseconds from numpy's import on, on the processors that ours need.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A vocabulary is 10^5 objects without a cycle, through which the collector would look again and again.
    gc.set_threshold(100_000)
    _open_closed_streams()
    warnings.formatwarning = _warning
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # a terminal without UTF-8 gets "?" for what it cannot show, not a UnicodeEncodeError
                stream.reconfigure(errors="replace")
        args = _parser().parse_args(argv)
        args.command_line = shlex.join(["fq", *(sys.argv[1:] if argv is None else argv)])
        args.whole_parser = whole_parser
        status: int = _module(args.command).main(args)
        sys.stdout.flush()
        return status
    except NotFiniteError as e:
        return _fail(str(e), NOT_FINITE)
    except FqError as e:
        return _fail(str(e))
    except KeyboardInterrupt:
        print("fq: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()  # its reader went away
        return 141
    except ImportError as e:
        if e.name != "fq_kernels":  # which says what is wrong and what helps
            raise
        return _fail(str(e))
    except MemoryError:
        return _fail("out of memory; a smaller --ctx-size or --batch-size needs less")
    except OSError as e:
        try:
            sys.stdout.flush()
        except OSError:
            _leave_stdout()  # else the interpreter would try once more as it ends
        return _fail(f"{e.filename or 'system'}: {e.strerror or e}")


def script() -> None:
    """The program ``fq``."""
    status = main()
    # Else the interpreter, as it ends, would look three times through all that numpy and others have made.
    gc.freeze()
    sys.exit(status)


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"fq: warning: {' '.join(str(message).split())}\n"


def _open_closed_streams() -> None:
    """The null device in the place of each stream that the caller has closed.

    Else the next file opened, the store perhaps, would get its number, and what is written to the stream.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _leave_stdout() -> None:
    """Nothing more can be said to it: what is left goes to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int = BAD_INPUT) -> int:
    from .words import ascii_safe  # a message may quote a file

    print(f"fq: error: {ascii_safe(' '.join(message.splitlines()))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    script()
