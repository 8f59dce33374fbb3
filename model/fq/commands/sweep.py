"""fq sweep."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fq_kernels.rules import calibrations_of, parse_rule

from .. import machine
from ..errors import FqError
from ..measure.agreement import agreement, agreement_text
from ..measure.cells import (
    AS_IT_IS,
    CONTROL,
    DEFAULT_SITES,
    EACH_NORM,
    Cell,
    cells_of,
    profile_cells,
    unit_cells,
)
from ..measure.chunks import Chunks
from ..measure.figures import add_nodes
from ..measure.forecast import forecast
from ..measure.noise import with_noise
from ..measure.share import Share
from ..measure.sweep import ALL, Sweep
from ..provenance import sha256_of
from ..results.run import Run
from ..results.runs import Results, stored_figures
from ..run.finite import not_finite_text
from ..run.model import Model
from .files import check_outputs, read_text, text_sha256
from .options import (
    SCHEDULER_VARIABLE,
    add_base_model,
    add_base_rules,
    add_evaluation,
    add_memory_limit,
    add_model,
    add_realisations,
    add_scheduler,
    add_scored,
    add_seed,
    add_store,
    add_text,
    check_realisations,
    check_seed,
    command_of_all,
    executor_of,
    inputs_of,
    memory_limit_of,
    numerics,
    open_model,
    say_if_short,
    settings_of,
    store_files,
)
from .outcome import Outcome, print_figures
from .progress import note, progress
from .rules import base_rules_of
from .show_sweep import sweep_text

if TYPE_CHECKING:
    from ..cluster.spread import Pool

N_CTX = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    add_text(parser, several=True)
    add_scored(parser)
    parser.set_defaults(chunks=None)  # all, or as many as the run that --resume goes on with
    parser.add_argument(
        "--sites",
        action="append",
        metavar="SITES",
        help="each site that matches is a cell, as on a rule's left side, and all of them together are "
        "one; may be repeated (default ffn_norm[*].raw)",
    )
    parser.add_argument(
        "--format",
        action="append",
        metavar="FORMAT",
        help="as on a rule's right side; may be repeated (default bf16)",
    )
    parser.add_argument(
        "--cumulative", action="store_true", help="also round the first sites up to each, together"
    )
    parser.add_argument(
        "--noise",
        action="store_true",
        help="beside each format two controls: Gaussian noise of the same length as each row's rounding "
        "error in its place (noise_FORMAT), and the same errors with random signs (signs_FORMAT)",
    )
    parser.add_argument(
        "--norm-unit",
        action="append",
        metavar="UNIT",
        help="how norms compute inside, as SITES=STEP=VALUE;STEP=VALUE...: each step alone, all but each, "
        "and all of them are cells; {a|b} makes a unit of each; may be repeated (docs/norm-unit.md)",
    )
    parser.add_argument("--whole-units", action="store_true", help="of each unit only all steps together")
    parser.add_argument(
        "--each-norm",
        nargs="?",
        choices=EACH_NORM,
        const=EACH_NORM[0],
        help="also each unit in each norm alone; steps: and each of its steps, a table of norms x steps",
    )
    parser.add_argument(
        "--profile",
        action="append",
        metavar="NAME[:TYPE]",
        help="norms and residual as an engine computes them, such as hf:bf16, a cell each; may be repeated "
        "(fq profiles lists them)",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME[:TYPE]",
        help="a profile that those of --profile are compared with, in the place of the exact model",
    )
    add_base_model(parser, "which all is compared with; the model without a rule is a cell, too")
    add_base_rules(parser)
    add_realisations(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run in the store on the same model, text and settings, however it ended: "
        "with its cells and those of --sites and --format, over its chunks, or as many as --chunks where "
        "that is more",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="run the I-th of N equal parts alone, whole chunks first, into a store of its own; fq results "
        "merge joins them (docs/scale-out.md)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what it would take: cells, memory, the store, and by a probe of ten seconds the time",
    )
    add_scheduler(parser)
    add_memory_limit(parser)
    add_store(parser)
    add_model(parser)
    add_seed(parser, "stochastic rounding")
    add_evaluation(parser, N_CTX, "tokens per chunk", several=True)


def _where(run: Sweep, at: tuple[int, int]) -> str:
    cell, chunk = at
    return f"chunk {chunk + 1}/{run.text.n}, cell {cell + 1}/{len(run.cells)}"


def _line(run: Sweep, at: tuple[int, int]) -> str | None:
    """Of a chunk that has ended in every cell that is run of it."""
    _, chunk = at
    mine = run.mine(chunk)
    ended = all((i, chunk) in run.finished for i in mine)
    return f"[{chunk + 1}/{run.text.n}] {len(mine)} cells" if ended else None


def main(args: argparse.Namespace) -> int:
    check_seed(args)
    check_realisations(args)
    each = _each(args)
    if args.shard and len(each) > 1:
        raise FqError("a shard is of one run: one -f, one -c")
    if args.dry_run and (len(each) > 1 or args.resume or args.scheduler):
        raise FqError("--dry-run is of one run from its beginning in this process: one -f, one -c")
    if args.worker_model_dir and not _scheduler(args):
        raise FqError("--worker-model-dir is of workers: it needs --scheduler")
    if args.shard and args.scheduler:
        raise FqError("--shard is for processes without a scheduler; workers divide the work themselves")
    inputs: dict[str, Any] = {}
    for one in each:
        inputs |= {f"{what} {one.file}" if len(each) > 1 else what: x for what, x in inputs_of(one).items()}
    check_outputs(store_files("--store", args.store) | {"--json": args.json}, inputs)
    with _workers(args, lambda: _Inputs.of(args, each)) as (found, pool):
        return _all(args, each, lambda one: _sweep(one, found, pool))


@dataclass(frozen=True)
class _Inputs:
    """What the runs read: texts by file, with what each is called, and their tokens."""

    model: Model
    base_model: Model | None
    texts: Mapping[str | None, tuple[str, str]]
    tokens: Mapping[str | None, Sequence[int]]

    @classmethod
    def of(cls, args: argparse.Namespace, each: Sequence[argparse.Namespace]) -> _Inputs:
        texts = {one.file: read_text(one.file) for one in each}
        model = open_model(args.model, args.offline)
        base_model = open_model(args.base_model, args.offline) if args.base_model else None
        tokens = {file: model.tokenizer.encode(text) for file, (text, _) in texts.items()}
        for one in each if len(each) > 1 else ():  # what is wrong with a later one is said before the first
            try:
                Chunks(model, tokens[one.file], settings_of(one))
            except FqError as e:
                raise FqError(f"{texts[one.file][1]}: {e}") from None
        return cls(model, base_model, texts, tokens)


def _scheduler(args: argparse.Namespace) -> str | None:
    """The option's, or the variable's, which is not for shards."""
    return args.scheduler or (None if args.shard else os.environ.get(SCHEDULER_VARIABLE))


@contextlib.contextmanager
def _workers(args: argparse.Namespace, read: Callable[[], _Inputs]) -> Iterator[tuple[_Inputs, Pool | None]]:
    """The inputs, and the workers of a scheduler; None where there is none."""
    where = None if args.dry_run else _scheduler(args)
    if where is None:
        yield read(), None
        return
    from ..cluster.dask_pool import dask_pool

    # a cluster is two seconds in starting, and the text is tokenised meanwhile
    with ThreadPoolExecutor(1) as beside:
        found = beside.submit(read)
        with dask_pool(where, args.threads) as pool:
            yield found.result(), pool


def _all(
    args: argparse.Namespace,
    each: Sequence[argparse.Namespace],
    sweep: Callable[[argparse.Namespace], tuple[Outcome, dict[str, Any]]],
) -> int:
    if len(each) == 1:
        outcome, data = sweep(each[0])
        kind, shown = "sweep", sweep_text
        if args.dry_run:
            kind, shown = "forecast", forecast_text
        elif args.shard:
            kind, shown = "shard", _shard_text
        print_figures(kind, shown(data), data, args.json)
        return outcome.status
    runs, worst = [], 0
    for one in each:
        outcome, data = sweep(one)
        print(sweep_text(data) + "\n", file=sys.stderr if args.json == "-" else sys.stdout)
        runs.append(data)
        if outcome.failed is not None:  # of this run alone: the others' figures are to be had
            note(f"{data['text']}, {data['n_ctx']}: {outcome.failed}")
            outcome.failed, outcome.lost = None, True
        worst = outcome.status or worst
        if outcome.interrupted:
            break
    found = agreement([data for data in runs if data["n_chunks"]])
    names = [f"{os.path.basename(data['text'] or '')}, {data['n_ctx']}" for data in runs if data["n_chunks"]]
    print_figures("sweeps", agreement_text(found, names), {"runs": runs, "agreement": found}, args.json)
    return worst


def _each(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The command for each text and number of tokens per chunk: runs of their own."""
    texts, sizes = args.file or [None], args.ctx_size or [N_CTX]
    for option, given in (("-f", texts), ("-c", sizes)):
        if len(set(given)) < len(given):
            raise FqError(f"{option}: one is given twice")
    return [
        argparse.Namespace(**(vars(args) | {"file": text, "ctx_size": size}))
        for text in texts
        for size in sizes
    ]


def _sweep(args: argparse.Namespace, found: _Inputs, pool: Pool | None) -> tuple[Outcome, dict[str, Any]]:
    """One run: how it ended, and its figures."""
    model, base_model = found.model, found.base_model
    (text, text_name), tokens = found.texts[args.file], found.tokens[args.file]
    limit = memory_limit_of(args.memory_limit)
    share = ALL if args.shard is None else Share.parse(args.shard)
    start = time.perf_counter()
    asked = _cells(args, model)
    engine = None if args.baseline is None else profile_cells(base_model or model, [args.baseline])[0]
    baseline = () if engine is None else engine.rules
    if (base_rules := base_rules_of(args, base_model or model)) is not None:
        if engine is not None:
            raise FqError("--base-fake-quant: the baseline is the profile of --baseline")
        baseline = tuple(map(str, base_rules.rules))
    with executor_of(args.threads) as executor:

        def sweep_of(cells: Sequence[Cell], **changes: Any) -> Sweep:
            settings = replace(settings_of(args), **changes)
            return Sweep(
                model,
                tokens,
                cells,
                baseline=baseline,
                base_model=base_model,
                executor=executor,
                memory_limit=limit,
                share=share,
                settings=settings,
            )

        run = sweep_of(asked)
        say_if_short(args, run.text.n)
        if args.dry_run:
            return Outcome(), {"model": model.path, "text": text_name} | forecast(run)
        digest = text_sha256(text)
        rules = [parse_rule(rule) for cell in run.cells for rule in cell.rules]
        rules += map(parse_rule, baseline)
        scales = calibrations_of(rules, digest)
        calibrated = {"calibrations": scales} if scales else {}
        named = {} if engine is None else {"baseline_profile": engine.name}
        if base_model is not None:
            named["base_model_sha256"] = sha256_of(*base_model.file.paths)
        about = Run(
            sha256_of(*model.file.paths),
            digest,
            run.cells,
            run.about() | {"text": text_name, "command": command_of_all(args)} | named | calibrated,
            numerics(executor, args.activations),
            machine.versions(),
            machine.describe(),
        )
        outcome = Outcome()
        with Results(args.store) as store:
            number, now, was = store.begin(about, _more(args, about) if args.resume else None)
            if was is not None:
                run = sweep_of(now.cells, chunks=now.settings["n_chunks_asked"])
                run.finished.update(store.load(number))
            if args.resume:
                print(_going_on(store, number, run, was), file=sys.stderr)
            with outcome.watched():
                run.find_lost()
                told = list(run.not_finite)
                for cell in told:
                    note(not_finite_text(run.cells[cell].name, run.not_finite[cell]))
                for cell, _ in _run(args, run, pool, store, number, was):
                    if cell in run.not_finite and cell not in told:
                        note(not_finite_text(run.cells[cell].name, run.not_finite[cell]))
                        told.append(cell)
            if args.shard:
                mine = [(i, chunk) for chunk in range(run.text.n) for i in run.mine(chunk)]
                ended = sum(at in run.finished for at in mine)
                data: dict[str, Any] = {"run": number, "shard": str(share), "ended": ended, "of": len(mine)}
                done = f"{ended} of {len(mine)} chunks of cells"
            else:
                data = add_nodes(stored_figures(store, number), run.not_finite)
                done = f"{data['n_chunks']} of {run.text.n} chunks"
    outcome.say(done, "; --resume goes on")
    seconds = time.perf_counter() - start
    by = f"{executor.threads} threads" if pool is None else "workers"
    print(f"fq: {seconds:.1f} s, {by}; run {number} of {args.store}", file=sys.stderr)
    if args.shard:
        outcome.lost = bool(run.not_finite)
        return outcome, data
    # those of a run that was gone on with, too
    outcome.lost = any(entry["not_finite_tokens"] for entry in data["cells"])
    return outcome, data


def _run(
    args: argparse.Namespace, run: Sweep, pool: Pool | None, store: Results, number: int, was: Run | None
) -> Iterator[tuple[int, int]]:
    """Here, or on workers: each cell and chunk as it has ended and is kept."""
    if pool is None:
        for cell, chunk in progress(run, partial(_where, run), partial(_line, run)):
            store.save(number, cell, chunk, run.finished[cell, chunk])
            yield cell, chunk
        return
    from .on_workers import OnWorkers, files_of, job_of, worker_limit

    of_run, other = store.get(number), None
    if run.base_model is not None:
        other = files_of(run.base_model, of_run.settings["base_model_sha256"])
    mine, limit = files_of(run.model, of_run.model_sha256), worker_limit(args.memory_limit, pool)
    job = job_of(mine, args.worker_model_dir, args.threads, limit, run, other)
    on_workers = OnWorkers(run, pool, job, store, number, was)

    def where(at: tuple[int, int]) -> str:
        n = on_workers.n_workers
        return f"{_where(run, at)}; {_count(n, 'worker')}"

    yield from progress(on_workers, where, partial(_line, run))


def _cells(args: argparse.Namespace, model: Model) -> list[Cell]:
    """Of sites and formats, which are the default, then of units, then of profiles."""
    units, profiles = args.norm_unit or [], args.profile or []
    for option in ("each_norm", "whole_units"):
        if getattr(args, option) and not units:
            raise FqError(f"--{option.replace('_', '-')} needs --norm-unit")
    of_sites = args.sites or args.format or args.noise or args.cumulative
    if args.baseline is not None and (not profiles or units or of_sites):
        raise FqError("--baseline goes with --profile, and with nothing else that makes cells")
    if args.realisations > 1 and (units or profiles):
        raise FqError("--realisations: a unit's roundings do not fall anew")
    formats = args.format or ["bf16"]
    cells = [Cell(CONTROL, CONTROL)]
    as_it_is = [Cell(AS_IT_IS, AS_IT_IS)] if args.base_model else []
    if of_sites or not (units or profiles):
        cells = cells_of(
            model,
            args.sites or [DEFAULT_SITES],
            with_noise(formats) if args.noise else formats,
            cumulative=args.cumulative,
            realisations=args.realisations,
            seed=args.seed,
        )
    cells[1:1] = as_it_is
    cells += unit_cells(model, units, whole=args.whole_units, each_norm=args.each_norm, seed=args.seed)
    return cells + profile_cells(model, profiles)


def _more(args: argparse.Namespace, about: Run) -> Run:
    """What a run that is gone on with has to have: what the command names, and no default."""
    settings = about.settings
    if args.chunks is None:
        settings = settings | {"n_chunks_asked": 0, "chunk_indices": []}
    if args.realisations > 1 and not (args.sites or args.format):
        raise FqError("--resume --realisations: name the --sites or the --format that are to fall anew")
    named = args.sites or args.format or args.noise or args.cumulative or args.norm_unit or args.profile
    return replace(about, cells=about.cells if named else (), settings=settings)


def forecast_text(data: dict[str, Any]) -> str:
    def size(n: int) -> str:
        units = (1e9, ".1f", "GB"), (1e6, ".0f", "MB"), (0, ".0f", "kB")
        return next(f"{n / (unit or 1e3):{form}} {name}" for unit, form, name in units if n >= unit)

    lines = [
        f"cells   {data['n_cells']}, {data['n_chunks']} chunks of {data['n_ctx']}: "
        f"{data['chunks_of_cells']} chunks of cells",
        f"memory  {size(data['memory_bytes'])}, {data['cells_at_a_time']} cells at a time, and the model's "
        f"{size(data['model_bytes'])}",
    ]
    if data["store_bytes"] is not None:
        lines.append(f"store   some {size(data['store_bytes'])}")
    if data["seconds"] is None:
        return "\n".join([*lines, "time    not known: no layer ended within the probe"])
    seconds = data["seconds"]
    units = (7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds")
    long = next(f"{seconds / unit:.3g} {name}" for least, unit, name in units if seconds >= least)
    lines.append(f"time    some {long} on {data['threads']} threads")
    return "\n".join(lines)


def _shard_text(data: dict[str, Any]) -> str:
    return (
        f"shard {data['shard']}: {data['ended']} of {data['of']} chunks of cells have ended; "
        "fq results merge OUT STORE ... joins it with the others"
    )


def _going_on(store: Results, number: int, run: Sweep, was: Run | None) -> str:
    if was is None:
        return f"fq: {store.path} has no such run to go on with: a new one"
    n, chunks, had = len(run.cells), run.text.n, was.settings["n_chunks_asked"]
    text = (
        f"fq: going on with run {number}: {len(run.finished)} of {n * chunks} chunks of cells are there "
        f"({n} cells, {chunks} chunks)"
    )
    new = run.cells[len(was.cells) :]
    if new or chunks > had:
        groups = ", ".join(dict.fromkeys(cell.group or "realisations" for cell in new))
        what = [f"{_count(len(new), 'cell')} ({groups})"] if new else []
        what += [_count(chunks - had, "chunk")] if chunks > had else []
        text += f"\nfq: run {number} is extended by {' and '.join(what)}"
    return text


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
