"""Options that several commands have, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fq_kernels import CONTRACT, Executor, isa

from ..errors import FqError
from ..gguf import cache
from ..machine import available_memory, default_threads
from ..words import ascii_safe
from .files import SAMPLE_TEXT, FileName, check_outputs, write_json
from .progress import note

if TYPE_CHECKING:
    from fq_kernels.rules import FakeQuant

    from ..measure.chunks import Settings
    from ..run.model import Model
    from ..run.trace import Trace

SCHEDULER_VARIABLE = "DASK_SCHEDULER_ADDRESS"
ALIASES = ", ".join(cache.ALIASES)
MOST_KEYS = 5  # that are named in one line
MAX_REALISATIONS = 1000
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        default=cache.DEFAULT_ALIAS,
        help=f"a GGUF file or an alias: {ALIASES} (default %(default)s, fetched on first use)",
    )
    add_offline(parser)


def add_offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="never fetch anything")


def add_seed(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "-s", "--seed", type=int, default=0, metavar="N", help=f"for {purpose} (default %(default)s)"
    )


def check_seed(args: argparse.Namespace) -> None:
    if args.seed < 0:
        raise FqError(f"--seed must be >= 0, not {args.seed}")


def add_realisations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--realisations",
        type=int,
        default=1,
        metavar="K",
        help="make each rounding fall K times, by the next seeds or by dithers 1 to K - 1: below 3 nothing "
        "is said of whether the perplexity changes (default %(default)s)",
    )


def check_realisations(args: argparse.Namespace) -> None:
    if not 1 <= args.realisations <= MAX_REALISATIONS:
        raise FqError(f"--realisations must be 1 to {MAX_REALISATIONS}, not {args.realisations}")


def add_evaluation(
    parser: argparse.ArgumentParser, n_ctx: int, ctx_help: str, *, several: bool = False
) -> None:
    """How a model is run, and the figures as JSON.

    several  whether -c may be repeated: a list, or None where it is not given
    """
    add_threads(parser)
    repeated: dict[str, Any] = {"action": "append"} if several else {"default": n_ctx}
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        metavar="N",
        help=f"{ctx_help} (default {n_ctx})" + ("; may be repeated, as -f" if several else ""),
        **repeated,
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=512,
        metavar="N",
        help="tokens per evaluation (default %(default)s)",
    )
    add_activations(parser)
    add_json(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-t",
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="threads (default: the processors that this process may use)",
    )


def add_activations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        choices=("exact", "ggml"),
        default="exact",
        help="inputs of matrix products: float32, or rounded as ggml does for the weight's type "
        "(default %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE, or - for stdout")


def add_base_model(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--base-model", metavar="MODEL", help=f"another file of the same vocabulary, {purpose}"
    )


def add_base_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-fake-quant", action="append", metavar="RULE", help="a rule of the baseline's; may be repeated"
    )


def models_of(args: argparse.Namespace) -> tuple[Model, Model]:
    """(the model, whose the baseline is: --base-model's, or the same). Raises FqError where their logits are
    not of the same tokens."""
    from ..run.model import check_same_vocabulary

    model = open_model(args.model, args.offline)
    if not args.base_model:
        return model, model
    base_model = open_model(args.base_model, args.offline)
    check_same_vocabulary(model, base_model)
    return model, base_model


def settings_of(args: argparse.Namespace) -> Settings:
    """What `add_evaluation` and `add_text` say of a measurement."""
    from ..measure.chunks import Settings

    return Settings(
        n_ctx=args.ctx_size,
        chunks=-1 if args.chunks is None else args.chunks,
        chunk_order=args.chunk_order,
        chunk_seed=args.chunk_seed,
        batch=args.batch_size,
        activations=args.activations,
        scored=getattr(args, "scored", "second-half"),
    )


def command_of_all(args: argparse.Namespace) -> str:
    """The command line of what a shard is a part of, or workers run: the same in each, whatever its store."""
    names = ("--shard", "--store") if args.shard else ("--scheduler", "--worker-model-dir")
    words, kept = iter(shlex.split(args.command_line)), []
    for word in words:
        option, equals, _ = word.partition("=")
        # they may be shortened
        if not any(len(option) > 3 and name.startswith(option) for name in names):
            kept.append(word)
        elif not equals:
            next(words)
    return shlex.join(kept)


def say_if_short(args: argparse.Namespace, n_chunks: int, n_ctx: int | None = None) -> None:
    """That the text has fewer chunks than were asked for; n_ctx where it is not the option's."""
    if args.chunks is not None and args.chunks > n_chunks:
        of = args.ctx_size if n_ctx is None else n_ctx
        print(f"fq: the text has {n_chunks} chunks of {of}, not {args.chunks}", file=sys.stderr)


def add_text(parser: argparse.ArgumentParser, *, several: bool = False, chunks: str = "all") -> None:
    """several: whether -f may be repeated: a list, or None where it is not given.

    chunks: what --help says of how many there are by default.
    """
    repeated: dict[str, Any] = {"action": "append"} if several else {}
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="UTF-8 text (default: the sample in the package)"
        + ("; may be repeated: a run of each, and whether cells rank alike" if several else ""),
        **repeated,
    )
    parser.add_argument(
        "--chunks", type=int, default=-1, metavar="N", help=f"chunks to run, -1 for all (default: {chunks})"
    )
    parser.add_argument(
        "--chunk-order",
        choices=("random", "first"),
        default="random",
        help="random: the beginning of one random order of all chunks of the text, so that more chunks "
        "contain fewer; first: the text's first, as llama-perplexity takes them (default %(default)s)",
    )
    parser.add_argument(
        "--chunk-seed", type=int, metavar="N", help="of the random order, the same everywhere (default 0)"
    )


def add_scored(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scored",
        choices=("second-half", "all"),
        default="second-half",
        help="which tokens of a chunk: its second half, as llama-perplexity, or all, the first ones among "
        "them (default %(default)s)",
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="FILE",
        default="fq-results.sqlite",
        help="SQLite file that keeps every run (default %(default)s)",
    )


def add_memory_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="such as 500M or 2G: cells that are measured are taken in groups that fit (default: half of "
        "what is free)",
    )


def memory_limit_of(text: str | None) -> int | None:
    """Bytes; by default half of what is free, or no limit where that is not known."""
    if text is None:
        free = available_memory()
        return None if free is None else free // 2
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise FqError(f"--memory-limit must be a size such as 500M or 2G, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def add_scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scheduler",
        metavar="WHERE",
        help="run it on the workers of a Dask cluster (pip install 'fq[dask]'): the scheduler's address, "
        "such as tcp://host:8786, or its file, or local:N for N processes here "
        f"(default: {SCHEDULER_VARIABLE}, if it is set)",
    )
    parser.add_argument(
        "--worker-model-dir",
        metavar="DIR",
        help="where workers find the model's file, which they know by its SHA-256 (default: the folder that "
        "it is in here, or their cache)",
    )


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", metavar="FILE", help="write each kernel call to FILE, for Perfetto or fq trace"
    )


def add_described_model(parser: argparse.ArgumentParser) -> None:
    """For commands that show what a model is."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=cache.DEFAULT_ALIAS,
        help=f"a GGUF file or an alias: {ALIASES} (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_offline(parser)


@contextlib.contextmanager
def download_bar(alias: str) -> Iterator[Callable[[int, int], None]]:
    print(
        f"fq: fetching {alias} ({cache.ALIASES[alias].source}) into {cache.cache_folder()}", file=sys.stderr
    )
    if terms := cache.ALIASES[alias].terms:
        print(f"fq: {terms}", file=sys.stderr)
    if not sys.stderr.isatty():
        from .progress import Log

        log = Log(0, f"fq: {alias}")

        def say(done: int, total: int) -> None:
            log.steps = total
            log.at(done)

        yield say
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=alias, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def find_model(name: str, offline: bool) -> Path:
    with contextlib.ExitStack() as stack:
        return cache.find(
            name, offline=offline, on_fetch=lambda alias: stack.enter_context(download_bar(alias))
        )


def open_model(name: str, offline: bool) -> Model:
    """The model of a file or an alias. Raises FqError where there is none, or it cannot be run."""
    from ..run.model import Model

    model = Model(find_model(name, offline))
    say_unknown_keys(model)
    return model


def say_unknown_keys(model: Model) -> None:
    """They may mean another graph than the one that is run."""
    from ..arch.registry import unknown_keys

    if unknown := unknown_keys(model.file.metadata):
        more = f" and {len(unknown) - MOST_KEYS} more" if len(unknown) > MOST_KEYS else ""
        shown = ", ".join(map(ascii_safe, unknown[:MOST_KEYS])) + more
        note(f"{ascii_safe(str(model.path))}: keys that fq does not know, and goes without: {shown}")


def describe_model(
    kind: str,
    args: argparse.Namespace,
    describe: Callable[[Model], dict[str, Any]],
    as_text: Callable[[dict[str, Any]], str],
) -> int:
    data = describe(open_model(args.model, args.offline))
    if args.json:
        write_json(kind, data, "-")
    else:
        print(as_text(data))
    return 0


def executor_of(threads: int | None) -> Executor:
    try:
        return Executor(default_threads() if threads is None else threads)
    except ValueError as e:
        raise FqError(f"--threads: {e}") from None


def numerics(executor: Executor, activations: str = "exact") -> dict[str, Any]:
    return {
        "contract": CONTRACT,
        "activations": activations,
        "kv_cache": "F32",
        "isa": isa(),
        "threads": executor.threads,
    }


def inputs_of(args: argparse.Namespace) -> dict[str, FileName]:
    """The files that -m, --base-model and -f name, for `check_outputs`."""
    found: dict[str, FileName] = {"the model": cache.location(args.model)}
    if getattr(args, "base_model", None):
        found["the baseline's model"] = cache.location(args.base_model)
    if "file" in args:
        found["the text"] = args.file or SAMPLE_TEXT
    return found


def store_files(what: str, path: FileName) -> dict[str, FileName]:
    """What SQLite reads and writes as a store, for `check_outputs`; ``what`` it is called there."""
    real = os.path.realpath(path)
    return {what: path} | {f"{what}'s {end}": f"{real}{end}" for end in ("-wal", "-shm", "-journal")}


def check_run_outputs(args: argparse.Namespace) -> None:
    """Of run and perplexity."""
    if args.trace == "-":
        raise FqError("--trace -: takes a file")
    check_outputs({"--json": args.json, "--trace": args.trace}, inputs_of(args))


def trace_of(
    args: argparse.Namespace, model: Model, executor: Executor, fake_quant: FakeQuant | None
) -> contextlib.AbstractContextManager[Trace | None]:
    if args.trace is None:
        return contextlib.nullcontext()
    from ..run.trace import Trace, provenance

    rules = fake_quant.rules if fake_quant else ()
    return Trace(args.trace, provenance(model, executor, rules))
