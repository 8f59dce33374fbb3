"""What each command does: options in, text on stdout (progress on stderr), JSON where asked."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fq_kernels import Executor, get_format, isa
from fq_kernels.rules import FakeQuant, Rule, Site

from . import show, store
from .errors import FqError
from .generation import Sampler, Timings, generate
from .perplexity import Perplexity
from .runner import Context, Model
from .trace import Trace, provenance

INTERRUPTED = 130
SAMPLE_TEXT = Path(__file__).parent / "data" / "sample.txt"
MAX_DEFAULT_CTX = 4096
MAX_TEXT_BYTES = 1 << 30


# ---------------------------------------------------------------- shared pieces


@contextlib.contextmanager
def _download_bar(alias: str) -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm

    print(
        f"fq: fetching {alias} ({store.ALIASES[alias].source}) into {store.cache_folder()}", file=sys.stderr
    )
    # disable=None: no bar where stderr is not a terminal
    with tqdm(unit="B", unit_scale=True, desc=alias, disable=None, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _find_model(name: str, offline: bool) -> Path:
    with contextlib.ExitStack() as stack:
        return store.find(
            name, offline=offline, on_fetch=lambda alias: stack.enter_context(_download_bar(alias))
        )


def _executor(threads: int | None) -> Executor:
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        return Executor(threads)
    except ValueError as e:
        raise FqError(f"--threads: {e}") from None


def _rules(args: argparse.Namespace) -> list[Rule]:
    """The shorthand's rule first, then those of --fake-quant."""
    shorthand = {
        name: value
        for name in ("kind", "layer", "point", "mode")
        if (value := getattr(args, f"fake_quant_{name}")) is not None
    }
    texts, rules = args.fake_quant or [], []
    try:
        if args.fake_quant_ffn_norm is not None:
            texts = [args.fake_quant_ffn_norm, *texts]
            rules.append(Rule(get_format(args.fake_quant_ffn_norm), **shorthand))
        elif shorthand:
            raise FqError(f"--fake-quant-{next(iter(shorthand))} needs --fake-quant-ffn-norm TYPE")
        rules += map(Rule.parse, args.fake_quant or [])
        return [
            replace(rule, format=rule.format.with_seed(args.seed))
            if rule.format.rounding == "stochastic" and "seed=" not in text
            else rule
            for rule, text in zip(rules, texts, strict=True)
        ]
    except FqError:
        raise
    except ValueError as e:
        raise FqError(f"--fake-quant: {e}") from None


def _fake_quant(args: argparse.Namespace, model: Model) -> FakeQuant | None:
    rules = _rules(args)
    if not rules:
        for name in ("verbose", "counts"):
            if getattr(args, f"fake_quant_{name}"):
                raise FqError(f"--fake-quant-{name} needs a rule: --fake-quant RULE")
        return None
    try:
        fake_quant = FakeQuant(model.norms, rules, count_errors=args.fake_quant_counts != "rows")
    except ValueError as e:
        raise FqError(f"--fake-quant: {e}") from None
    if args.fake_quant_verbose:
        fake_quant.on_row = _row_printer(model, fake_quant)
    return fake_quant


def _row_printer(model: Model, fake_quant: FakeQuant) -> Callable[[Site, float, float], None]:
    names = {node.norm: node.name for node in model.graph.nodes if node.norm}

    def line(site: Site, first: float, last: float) -> None:
        rule = fake_quant.counters[site].rule
        assert rule is not None
        print(
            f"{site.norm.kind} fake quantization ({rule.format}): {names[site.norm]} - "
            f"diff: first={first:.6f}, last={last:.6f}",
            file=sys.stderr,
        )

    return line


def _check_target(option: str, target: str | None) -> None:
    """Find out before the work, not after it, that the file cannot be written."""
    if target in (None, "-"):
        return
    path = Path(target)
    if path.exists() and not path.is_file() and not path.is_dir() and os.access(path, os.W_OK):
        return
    if path.is_dir() or not path.resolve().parent.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise FqError(f"{option} {target}: cannot be written there")


def _check_targets(args: argparse.Namespace) -> None:
    _check_target("--json", args.json)
    _check_target("--trace", args.trace)
    if args.trace == "-":
        raise FqError("--trace -: takes a file")
    if args.trace and args.json and os.path.realpath(args.trace) == os.path.realpath(args.json):
        raise FqError(f"--trace {args.trace}: is the file of --json too")


def _trace(
    args: argparse.Namespace, model: Model, executor: Executor, fake_quant: FakeQuant | None
) -> contextlib.AbstractContextManager[Trace | None]:
    if args.trace is None:
        return contextlib.nullcontext()
    if os.path.exists(args.trace) and os.path.samefile(args.trace, model.path):
        raise FqError(f"--trace {args.trace}: is the model")  # which is mapped: it must not be cut
    rules = fake_quant.rules if fake_quant else ()
    return Trace(args.trace, provenance(model, executor, rules))


def _write_json(data: Any, target: str) -> None:
    text = json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        _write(text, target)


def _write(text: str, target: str) -> None:
    if os.path.exists(target) and not os.path.isfile(target):
        # a device or a pipe is written to; it must not be replaced by a file
        Path(target).write_text(text, encoding="utf-8")
        return
    # whole or not at all
    part = Path(f"{target}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _read_text(name: str | None) -> tuple[str, str]:
    """(the text, what to call it)."""
    path = SAMPLE_TEXT if name is None else Path(name)
    if path.is_dir():
        raise FqError(f"{path}: is a directory")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise FqError(f"{path}: larger than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise FqError(f"{path}: not UTF-8 at byte {e.start}") from None
    if not text.strip():
        raise FqError(f"{path}: the text is empty")
    return text, "sample text of the package" if name is None else str(path)


# ---------------------------------------------------------------- commands


def pull(args: argparse.Namespace) -> int:
    if args.alias not in store.ALIASES:
        raise FqError(f"unknown model alias {args.alias!r}; there are {', '.join(store.ALIASES)}")
    if store.cached(args.alias):
        path = store.pull(args.alias)
    else:
        with _download_bar(args.alias) as progress:
            path = store.pull(args.alias, progress)
    print(path)
    return 0


def _describe(
    args: argparse.Namespace,
    describe: Callable[[Model], dict[str, Any]],
    as_text: Callable[[dict[str, Any]], str],
) -> int:
    data = describe(Model(_find_model(args.model, args.offline)))
    if args.json:
        _write_json(data, "-")
    else:
        print(as_text(data))
    return 0


def inspect(args: argparse.Namespace) -> int:
    return _describe(args, show.inspect_data, show.inspect_text)


def graph(args: argparse.Namespace) -> int:
    return _describe(args, show.graph_data, show.graph_text)


def sites(args: argparse.Namespace) -> int:
    rules = _rules(args)

    def describe(model: Model) -> dict[str, Any]:
        try:
            return show.sites_data(model, FakeQuant(model.norms, rules))
        except ValueError as e:
            raise FqError(f"--fake-quant: {e}") from None

    return _describe(args, describe, show.sites_text)


def formats(args: argparse.Namespace) -> int:
    from fq_kernels.formats import describe_formats

    data = describe_formats()
    if args.json:
        _write_json(data, "-")
    else:
        print(show.formats_text(data))
    return 0


def trace(args: argparse.Namespace) -> int:
    from . import trace_summary

    data = trace_summary.summarise(args.file)
    if args.json:
        _write_json(data, "-")
    else:
        print(trace_summary.summary_text(data))
    return 0


def run(args: argparse.Namespace) -> int:
    _check_targets(args)
    sampler = Sampler(args.temp, args.top_k, args.top_p, args.seed)
    if args.predict < -1:
        raise FqError(f"--predict must be >= 0, or -1 until the context is full, not {args.predict}")
    if args.system_prompt is not None and not args.chat:
        raise FqError("--system-prompt needs --chat")
    path = _find_model(args.model, args.offline)
    start = time.perf_counter()
    model = Model(path)
    tokenizer = model.tokenizer
    prompt = args.prompt
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special=False, parse_special=True)
    else:
        ids = tokenizer.encode(prompt, parse_special=True)
    fake_quant = _fake_quant(args, model)
    with _executor(args.threads) as executor, _trace(args, model, executor, fake_quant) as trace:
        n_ctx = args.ctx_size or min(model.hparams.n_ctx_train, MAX_DEFAULT_CTX)
        context = Context(model, n_ctx, executor, fake_quant, trace, args.activations)
        timings = Timings(load_ms=(time.perf_counter() - start) * 1e3)
        stop: frozenset[int] = frozenset() if args.ignore_eos else frozenset(tokenizer.eog_ids)
        # with --json - stdout is for JSON alone
        out = sys.stderr if args.json == "-" else sys.stdout
        generated: list[int] = []
        pieces: list[str] = []
        interrupted = False
        decoder = tokenizer.stream_decoder()
        tokens = generate(
            context, ids, args.predict, sampler, stop=stop, batch=args.batch_size, timings=timings
        )
        if not args.chat:
            out.write(prompt)
            out.flush()
        try:
            for token in tokens:
                generated.append(token)
                pieces.append(decoder.push(token))
                out.write(pieces[-1])
                out.flush()
        except KeyboardInterrupt:
            interrupted = True
        pieces.append(decoder.finish())
        out.write(pieces[-1] + "\n")
        out.flush()
    timings.total_ms = (time.perf_counter() - start) * 1e3
    if interrupted:
        print(f"fq: interrupted after {len(generated)} tokens: this is a partial result", file=sys.stderr)
    print(f"\n{show.timings_text(timings, len(generated))}", file=sys.stderr)
    if fake_quant:
        print(f"\n{show.fake_quant_text(fake_quant.as_dict())}", file=sys.stderr)
    if args.json:
        data: dict[str, Any] = {
            "model": model.path,
            "prompt_tokens": ids,
            "generated_tokens": generated,
            "text": "".join(pieces),
            "partial": interrupted,
            "timings": asdict(timings),
            "numerics": _numerics(executor, args.activations),
        }
        if fake_quant:
            data["fake_quant"] = fake_quant.as_dict()
        _write_json(data, args.json)
    return INTERRUPTED if interrupted else 0


def perplexity(args: argparse.Namespace) -> int:
    _check_targets(args)
    if args.seed < 0:
        raise FqError(f"--seed must be >= 0, not {args.seed}")
    text, text_name = _read_text(args.file)
    start = time.perf_counter()
    model = Model(_find_model(args.model, args.offline))
    fake_quant = _fake_quant(args, model)
    if args.no_baseline and args.baseline_activations:
        raise FqError("--baseline-activations needs the baseline")
    if fake_quant is None and args.no_baseline:
        raise FqError("--no-baseline without a rule leaves nothing to run")
    with _executor(args.threads) as executor, _trace(args, model, executor, fake_quant) as trace:
        # with BOS if the vocabulary adds it, as llama-perplexity has it
        limit = args.chunks * args.ctx_size if args.chunks > 0 and args.ctx_size > 0 else None
        tokens = model.tokenizer.encode(text, limit=limit)
        measurement = Perplexity(
            model,
            tokens,
            n_ctx=args.ctx_size,
            chunks=args.chunks,
            fake_quant=fake_quant,
            baseline=not args.no_baseline,
            control=args.control,
            executor=executor,
            batch=args.batch_size,
            trace=trace,
            activations=args.activations,
            baseline_activations=args.baseline_activations,
        )
        if args.chunks > measurement.n_chunks:
            print(
                f"fq: the text has {measurement.n_chunks} chunks of {args.ctx_size}, not {args.chunks}",
                file=sys.stderr,
            )
        interrupted = False
        try:
            for _ in show.progress(measurement):
                pass
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.perf_counter() - start
    if interrupted:
        print(
            f"fq: interrupted after {measurement.done} of {measurement.n_chunks} chunks: "
            "this is a partial result",
            file=sys.stderr,
        )
        if not measurement.done:
            return INTERRUPTED
    data = measurement.result() | {
        "text": text_name,
        "seconds": seconds,
        "numerics": _numerics(executor, args.activations),
    }
    print(show.perplexity_text(data), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        _write_json(data, args.json)
    return INTERRUPTED if interrupted else 0


def sweep(args: argparse.Namespace) -> int:
    from . import sweep_commands

    return sweep_commands.sweep(args)


def results(args: argparse.Namespace) -> int:
    from . import sweep_commands

    return sweep_commands.results(args)


def bench(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import machine, overhead

    _check_target("--json", args.json)
    text = SAMPLE_TEXT.read_text(encoding="utf-8") if args.prompt is None else args.prompt
    n_prompt = 256 if args.prompt is None and args.prompt_tokens is None else args.prompt_tokens
    about = machine.describe("numpy")  # before the run, which is a load too
    model = Model(_find_model(args.model, args.offline))
    with _executor(args.threads) as executor:
        measurement = overhead.Overhead(
            model,
            model.tokenizer.encode(text),
            overhead.configurations(model, args.format, args.layer, args.point),
            n_prompt=n_prompt,
            n_predict=args.predict,
            batch=args.batch_size,
            rounds=args.rounds,
            warm_up=args.warm_up,
            seed=args.seed,
            executor=executor,
        )
        interrupted = False
        rounds = args.warm_up + args.rounds
        try:
            # disable=None: no bar where stderr is not a terminal
            for _ in tqdm(measurement, total=rounds, unit="round", disable=None, leave=False):
                pass
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        print(
            f"fq: interrupted after {measurement.done} of {args.rounds} rounds: this is a partial result",
            file=sys.stderr,
        )
        if measurement.done < 2:
            return INTERRUPTED
    data = measurement.result() | {"machine": about, "numerics": _numerics(executor)}
    print(overhead.overhead_text(data), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        _write_json(data, args.json)
    return INTERRUPTED if interrupted else 0


def replicate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .replicate import Replication, Settings
    from .replicate_text import replication_text

    _check_target("--output", args.output)
    _check_target("--json", args.json)
    if args.output and args.json and os.path.realpath(args.output) == os.path.realpath(args.json):
        raise FqError(f"--output {args.output}: is the file of --json too")
    names = [args.model, *(["tinyllama-shape"] if args.tinyllama_shape else [])]
    text, text_name = _read_text(args.file)
    settings = Settings(args.rounds, args.chunks, args.ctx_size, args.seed)

    def watch(what: str, steps: Iterable[int], n: int) -> Iterator[int]:
        # disable=None: no bar where stderr is not a terminal
        yield from tqdm(steps, total=n, desc=what, disable=None, leave=False)

    models = [Model(_find_model(name, args.offline)) for name in dict.fromkeys(names)]
    with _executor(args.threads) as executor:
        run = Replication(
            models, SAMPLE_TEXT.read_text(encoding="utf-8"), text, text_name, settings, executor, watch
        )
        interrupted = False
        try:
            for what in run:
                print(f"fq: {what}", file=sys.stderr)
        except KeyboardInterrupt:
            interrupted = True
            print("fq: interrupted: this is a partial result", file=sys.stderr)
    data = {"command": args.command_line} | run.result()
    page = replication_text(data)
    if args.output not in (None, "-"):
        _write(page, args.output)
    else:
        print(page, end="", file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        _write_json(data, args.json)
    return INTERRUPTED if interrupted else 0


def _numerics(executor: Executor, activations: str = "exact") -> dict[str, Any]:
    return {"activations": activations, "kv_cache": "F32", "isa": isa(), "threads": executor.threads}
