"""The command line: options, and the one place where errors become an exit status."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence

from .errors import FqError

# Exit statuses: 0 done, 2 bad input, 130 interrupted (128 + SIGINT).
BAD_INPUT, INTERRUPTED = 2, 130


# Everything that takes time to import is imported inside main, which answers Ctrl-C in one line.


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fq")
    except PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    from .store import ALIASES, DEFAULT_ALIAS

    parser = argparse.ArgumentParser(
        prog="fq",
        description="Measure what rounding a normalisation layer's output to a narrow format "
        "costs a real LLM.",
    )
    parser.add_argument("--version", action="version", version=f"fq {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    aliases = ", ".join(ALIASES)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    pull = command("pull", "Fetch a model into the user cache and check it.")
    pull.add_argument(
        "alias", nargs="?", default=DEFAULT_ALIAS, help=f"one of {aliases} (default %(default)s)"
    )

    inspect = command("inspect", "Show a model's metadata, tensors by type, and norm sites.")
    graph = command("graph", "Show the graph's nodes, in order, with shapes.")
    for sub in (inspect, graph):
        sub.add_argument(
            "model",
            metavar="MODEL",
            nargs="?",
            default=DEFAULT_ALIAS,
            help=f"a GGUF file or an alias: {aliases} (default %(default)s)",
        )
        sub.add_argument("--json", action="store_true", help="as JSON")
        sub.add_argument("--offline", action="store_true", help="never fetch anything")

    sites = command("sites", "List every norm site and the rule, if any, that takes it; runs nothing.")
    sites.add_argument("--json", action="store_true", help="as JSON")
    _add_rules(sites.add_argument_group("rules"))

    formats = command("formats", "List the formats that a norm's output can be rounded to.")
    formats.add_argument("--json", action="store_true", help="as JSON")

    run = command("run", "Generate text.")
    run.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the text to continue")
    run.add_argument(
        "-n",
        "--predict",
        type=int,
        default=128,
        metavar="N",
        help="tokens to generate, -1 until the context is full (default %(default)s)",
    )
    run.add_argument("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default %(default)s)")
    run.add_argument(
        "--top-k", type=int, default=40, help="keep the K likeliest, 0 for all (default %(default)s)"
    )
    run.add_argument(
        "--top-p", type=float, default=0.95, help="keep this much probability (default %(default)s)"
    )
    run.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-generation token")
    run.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    run.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message, with --chat")

    perplexity = command("perplexity", "Measure perplexity, and with a rule what the rounding changes.")
    perplexity.add_argument(
        "-f", "--file", metavar="FILE", help="UTF-8 text (default: the sample in the package)"
    )
    perplexity.add_argument(
        "--chunks", type=int, default=-1, metavar="N", help="chunks to run, -1 for all (default %(default)s)"
    )
    perplexity.add_argument(
        "--baseline-activations",
        choices=("exact", "ggml"),
        help="the baseline's activations, where they are to differ from --activations",
    )
    perplexity.add_argument(
        "--no-baseline", action="store_true", help="do not run the model without the rule"
    )
    perplexity.add_argument(
        "--control",
        action="store_true",
        help="also compare the baseline with itself: every difference must be exactly 0",
    )

    sweep = command("sweep", "Measure every site in every format, each alone, in one pass over the text.")
    _add_sweep(sweep)

    results = command("results", "List the sweeps in a store, or show one of them.")
    results.add_argument(
        "run", metavar="RUN", type=int, nargs="?", help="number of a run (default: list all)"
    )
    results.add_argument("--json", metavar="FILE", help="write it as JSON to FILE, or - for stdout")
    results.add_argument("--csv", metavar="FILE", help="write a line per cell to FILE, or - for stdout")
    for sub in (sweep, results):
        sub.add_argument(
            "--store",
            metavar="FILE",
            default="fq-results.sqlite",
            help="SQLite file that keeps every run (default %(default)s)",
        )

    trace = command("trace", "Summarise the kernel calls that --trace has written.")
    trace.add_argument("file", metavar="FILE", help="what run or perplexity has written with --trace")
    trace.add_argument("--json", action="store_true", help="as JSON")

    _add_bench(command("bench", "Time fake quantisation against the baseline, in turns."), aliases)

    _add_replicate(
        command("replicate", "Run the original report's experiments again, its figures beside ours."), aliases
    )

    for sub in (sites, run, perplexity, sweep):
        sub.add_argument(
            "-m",
            "--model",
            metavar="MODEL",
            default=DEFAULT_ALIAS,
            help=f"a GGUF file or an alias: {aliases} (default %(default)s, fetched on first use)",
        )
        sub.add_argument("--offline", action="store_true", help="never fetch anything")
        if sub is sweep:  # whose formats have their seeds
            continue
        sub.add_argument(
            "-s",
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help=f"for {'' if sub is sites else 'sampling and '}stochastic rounding (default %(default)s)",
        )

    for sub, ctx, ctx_help in (
        (run, 0, "context in tokens; 0: the model's, at most 4096"),
        (perplexity, 512, "tokens per chunk"),
        (sweep, 512, "tokens per chunk"),
    ):
        sub.add_argument(
            "-t",
            "--threads",
            type=int,
            default=None,
            metavar="N",
            help="threads, BLAS included (default: the processors of this process)",
        )
        sub.add_argument(
            "-c", "--ctx-size", type=int, default=ctx, metavar="N", help=f"{ctx_help} (default %(default)s)"
        )
        sub.add_argument(
            "-b",
            "--batch-size",
            type=int,
            default=512,
            metavar="N",
            help="tokens per evaluation (default %(default)s)",
        )
        sub.add_argument(
            "--activations",
            choices=("exact", "ggml"),
            default="exact",
            help="inputs of matrix products: float32, or rounded as ggml does for the weight's type "
            "(default %(default)s)",
        )
        sub.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE, or - for stdout")
        if sub is sweep:
            continue
        sub.add_argument(
            "--trace", metavar="FILE", help="write each kernel call to FILE, for Perfetto or fq trace"
        )
        _add_fake_quant(sub)
    return parser


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("-f", "--file", metavar="FILE", help="UTF-8 text (default: the sample in the package)")
    sweep.add_argument(
        "--chunks", type=int, default=-1, metavar="N", help="chunks to run, -1 for all (default %(default)s)"
    )
    sweep.add_argument(
        "--sites",
        action="append",
        metavar="SITES",
        help="each site that matches is a cell, as on a rule's left side, and all of them together are "
        "one; may be repeated (default ffn_norm[*].raw)",
    )
    sweep.add_argument(
        "--format",
        action="append",
        metavar="FORMAT",
        help="as on a rule's right side; may be repeated (default bf16)",
    )
    sweep.add_argument(
        "--cumulative", action="store_true", help="also round the first sites up to each, together"
    )
    sweep.add_argument(
        "--noise",
        action="store_true",
        help="also add Gaussian noise of the same length as each row's rounding error, in its place",
    )
    sweep.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run of the same sweep in the store, however it ended",
    )
    sweep.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="such as 500M or 2G: cells are taken in groups that fit (default: half of what is free)",
    )


def _add_bench(bench: argparse.ArgumentParser, aliases: str) -> None:
    from .store import DEFAULT_ALIAS

    for names, kind, default, metavar, text in (
        (("-m", "--model"), str, DEFAULT_ALIAS, "MODEL", f"a GGUF file or an alias: {aliases}"),
        (("-p", "--prompt"), str, None, "TEXT", "the prompt (default: the package's sample text)"),
        (
            ("--prompt-tokens",),
            int,
            None,
            "N",
            "tokens of it; repeated where it is shorter (default: 256, or as many as --prompt has)",
        ),
        (("-n", "--predict"), int, 8, "N", "tokens evaluated one by one after the prompt"),
        (("-b", "--batch-size"), int, 128, "N", "tokens per evaluation of the prompt"),
        (("--rounds",), int, 30, "N", "rounds that count"),
        (("--warm-up",), int, 2, "N", "rounds before them"),
        (("--format",), str, "bf16", "TYPE", "what norm outputs are rounded to"),
        (("--layer",), int, None, "N", "the layer of 'one layer' (default: 5, or the middle one)"),
        (("--point",), str, "raw", "POINT", "raw (before the weight) or weighted"),
        (("-s", "--seed"), int, 0, "N", "of the order and of the bootstrap"),
        (
            ("-t", "--threads"),
            int,
            None,
            "N",
            "threads, BLAS included (default: the processors of this process)",
        ),
        (("--json",), str, None, "FILE", "write the figures as JSON to FILE, or - for stdout"),
    ):
        shown = "" if default is None else " (default %(default)s)"
        bench.add_argument(*names, type=kind, default=default, metavar=metavar, help=text + shown)
    bench.add_argument("--offline", action="store_true", help="never fetch anything")


def _add_replicate(replicate: argparse.ArgumentParser, aliases: str) -> None:
    from .store import DEFAULT_ALIAS

    replicate.add_argument(
        "--tinyllama-shape",
        action="store_true",
        help="on the generated file of TinyLlama's shape too, random weights (some minutes more)",
    )
    for names, kind, default, metavar, text in (
        (("-m", "--model"), str, DEFAULT_ALIAS, "MODEL", f"a GGUF file or an alias: {aliases}"),
        (("-o", "--output"), str, None, "FILE", "write the Markdown to FILE (default: stdout)"),
        (("--json",), str, None, "FILE", "write the figures as JSON to FILE, or - for stdout"),
        (("--rounds",), int, 30, "N", "rounds of the timings"),
        (("-f", "--file"), str, None, "FILE", "text of the perplexity (default: the sample in the package)"),
        (("--chunks",), int, -1, "N", "chunks of it, -1 for all; at most 2 where weights are random"),
        (("-c", "--ctx-size"), int, 512, "N", "tokens per chunk"),
        (("-s", "--seed"), int, 0, "N", "of the timings' order and bootstrap"),
        (
            ("-t", "--threads"),
            int,
            None,
            "N",
            "threads, BLAS included, of all but the timings (default: the processors of this process)",
        ),
    ):
        shown = "" if default is None else " (default %(default)s)"
        replicate.add_argument(*names, type=kind, default=default, metavar=metavar, help=text + shown)
    replicate.add_argument("--offline", action="store_true", help="never fetch anything")


def _add_fake_quant(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fake quantisation")
    _add_rules(group)
    group.add_argument(
        "--fake-quant-counts",
        choices=("errors", "rows"),
        help="what to count at each rounded site: errors too (default), or rows alone",
    )
    group.add_argument(
        "--fake-quant-verbose",
        action="store_true",
        help="print each rounded row's |difference| of its first and last element",
    )


def _add_rules(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fake-quant",
        action="append",
        metavar="RULE",
        help="SITES=FORMAT[:option,...], such as ffn_norm[5]=bf16, ffn_norm[0-10,15].weighted=bf16:truncate, "
        "*[*].raw=f16, norm[*]=bf16:first-call; may be repeated, later rules win",
    )
    group.add_argument(
        "--fake-quant-ffn-norm",
        metavar="TYPE",
        help="shorthand for a first rule: round norm outputs to TYPE (fq formats lists them)",
    )
    group.add_argument("--fake-quant-layer", type=int, metavar="N", help="its layer, -1 for all (default -1)")
    group.add_argument(
        "--fake-quant-point",
        metavar="POINT",
        help="its point: raw (before the weight) or weighted (default raw)",
    )
    group.add_argument(
        "--fake-quant-kind",
        metavar="KIND",
        help="its norms: ffn_norm, attn_norm, output_norm, norm (the raw output of a layer's two) "
        "or all (default ffn_norm)",
    )
    group.add_argument(
        "--fake-quant-mode",
        metavar="MODE",
        help="its mode: every row, or first-call: the first row to reach each site (default every)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    try:
        if sys.stdout is None:  # closed by the caller
            sys.stdout = open(os.devnull, "w")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # a terminal without UTF-8 gets "?" for what it cannot show, not a UnicodeEncodeError
                stream.reconfigure(errors="replace")
        args = _parser().parse_args(argv)
        args.command_line = shlex.join(["fq", *(sys.argv[1:] if argv is None else argv)])
        from . import commands

        status = getattr(commands, args.command)(args)
        sys.stdout.flush()
        return status
    except FqError as e:
        return _fail(str(e))
    except KeyboardInterrupt:
        print("fq: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of stdout went away; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _fail("out of memory; a smaller --ctx-size or --batch-size needs less")
    except OSError as e:
        return _fail(f"{e.filename or 'system'}: {e.strerror or e}")


def _fail(message: str) -> int:
    print(f"fq: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
