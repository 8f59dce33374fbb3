"""fq plan."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fq_kernels import Executor

from .. import machine
from ..errors import FqError
from ..measure.cells import Cell
from ..measure.chunks import Settings
from ..measure.estimates import LARGEST, Judged, site_parts
from ..measure.inference import positive_interval, ratio_test
from ..measure.plan import (
    Choice,
    Plan,
    check_costs,
    choices_of,
    elements_of,
    front,
    least_sure,
    planned_sites,
    read_costs,
    solve,
    uniform_plans,
)
from ..measure.sensitivity import sites_named
from ..measure.sweep import Sweep
from ..provenance import sha256_of
from ..results.run import check_scales
from ..results.runs import Results, judgement
from ..run.model import Model
from ..words import ascii_safe, table
from .exact import Exact, single
from .files import check_outputs, read_text, text_sha256, write, write_json
from .options import (
    add_memory_limit,
    add_model,
    add_store,
    executor_of,
    memory_limit_of,
    numerics,
    open_model,
    store_files,
)
from .outcome import Outcome
from .progress import progress
from .stores import run_number

PICTURES = (".png", ".svg")
WIDE = 0.25  # half-width of an interval, as a part, above which more chunks or cells are called for
CHUNKS = 32  # of --validate
VERIFY, AT_ONCE = 64, 8  # cells that are measured exactly, and before it is planned again
MOST_RULES = 12  # that are printed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="number of a run of fq sensitivity (default: the newest on the model)",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--budget-kl", type=float, metavar="KL", help="the cheapest plan whose predicted mean KL is no more"
    )
    budget.add_argument(
        "--budget-bits",
        type=float,
        metavar="BITS",
        help="the plan of least KL with no more bits for a value, or cost as of --costs, on average",
    )
    parser.add_argument(
        "--costs",
        metavar="FILE",
        help="CSV with the columns item and cost, what a value costs in a format: items are formats, "
        "SITE=FORMAT, or none for no rounding; formats that are not there are not used (default: their "
        "bits, 32 for none)",
    )
    parser.add_argument(
        "--sites",
        action="append",
        metavar="SITES",
        help="to be planned, as on a rule's left side; may be repeated (default: of each norm one point, and "
        "all that is no norm's)",
    )
    parser.add_argument(
        "--point",
        metavar="POINT",
        help="of norms, where --sites is not given: in, raw, weighted or all (default weighted)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write the rules to FILE, which --fake-quant @FILE takes, - for stdout",
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="write what any budget would buy as a picture, .png or .svg"
    )
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="the text of the estimate: cells that the plan's interval hangs on are measured exactly on it, "
        "and it is planned again, until the interval is narrow or --verify of them are measured",
    )
    parser.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help=f"with -f, how many cells at most (default {VERIFY})",
    )
    parser.add_argument(
        "--validate",
        metavar="FILE",
        help="measure the plan exactly on this text, which the estimate has not seen, beside the cheapest "
        "uniform format of at least its cost",
    )
    parser.add_argument(
        "--chunks", type=int, metavar="N", help=f"of --validate, -1 for all (default {CHUNKS})"
    )
    parser.add_argument("-t", "--threads", type=int, default=None, metavar="N", help="threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE, or - for stdout")
    add_memory_limit(parser)
    add_store(parser)
    add_model(parser)


def main(args: argparse.Namespace) -> int:
    for name in ("budget_kl", "budget_bits"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise FqError(f"--{name.replace('_', '-')} must be a number from 0, not {value:g}")
    if args.picture and os.path.splitext(args.picture)[1].lower() not in PICTURES:
        raise FqError(f"--picture {args.picture}: must end in {' or '.join(PICTURES)}")
    for option, needed in (("chunks", "validate"), ("verify", "file")):
        if getattr(args, option) is not None and getattr(args, needed) is None:
            raise FqError(f"--{option} is of --{needed}, which is not given")
    if args.sites and args.point is not None:
        raise FqError("--point is for where --sites is not given")
    args.chunks = CHUNKS if args.chunks is None else args.chunks
    args.verify = VERIFY if args.verify is None else args.verify
    if args.verify < 0:
        raise FqError(f"--verify must be >= 0, not {args.verify}")
    inputs: dict[str, Any] = store_files("the store", args.store) | {"the costs": args.costs}
    inputs |= {"the text": args.validate, "the estimate's text": args.file}
    outputs = {"-o": args.output, "--picture": args.picture, "--json": args.json}
    check_outputs(outputs, {what: path for what, path in inputs.items() if path})
    memory_limit_of(args.memory_limit)
    Settings(chunks=args.chunks)
    costs = None if args.costs is None else read_costs(Path(args.costs))
    text = None if args.validate is None else read_text(args.validate)
    own = None if args.file is None else read_text(args.file)
    model = open_model(args.model, args.offline)
    digest = sha256_of(*model.file.paths)
    elements = elements_of(model.graph)
    outcome = Outcome()
    point = args.point or "weighted"
    sites = sites_named(model, args.sites) if args.sites else planned_sites(model.values, point)
    with Results(args.store, must_exist=True) as store:
        number = _number(args, store, model, digest)
        run = store.get(number)
        asked, said = judgement(store, number)
        if run.model_sha256 != digest:
            raise FqError(f"run {number} is of another model than {model.path}")
        if text is not None and text_sha256(text[0]) == run.text_sha256:
            raise FqError(f"--validate {args.validate}: the estimate was made on this text; take another")
        if costs is not None:
            check_costs(costs, elements, asked)

        def planned(said: Judged) -> tuple[list[Choice], Plan]:
            choices = choices_of(asked, said, map(str, sites), elements, costs)
            return choices, solve(choices, said, kld=args.budget_kl, cost=args.budget_bits)

        choices, plan = planned(said)
        if own is not None:
            with executor_of(args.threads) as executor:
                exact, left = _exact(args, model, own[0], store, number, executor), args.verify
                while left and not _narrow(plan.interval):
                    cells = [single(*at, "chosen") for at in least_sure(plan, said, min(left, AT_ONCE))]
                    if not cells:
                        break
                    exact.measure_more(cells, len(said.found.by_chunk), "exact")
                    left -= len(cells)
                    _, said = judgement(store, number)
                    choices, plan = planned(said)
                outcome.lost = exact.lost
    uniform = uniform_plans(choices, said, asked, costs)
    plans = front(choices, said)
    data = _figures(number, plan, plans, uniform, args)
    if args.output and args.output != "-":
        write(_rules_text(data), args.output)
    if text is not None:
        scored = run.settings["scored"]
        settings = Settings(n_ctx=run.settings["n_ctx"], chunks=args.chunks, scored=scored)
        dearer = [one for one in uniform if one.cost >= plan.cost]
        with outcome.watched():
            data["validated"] = _validate(args, model, text[0], settings, plan, dearer[:1])
            outcome.lost |= any(math.isnan(cell["mean_kld"]) for cell in data["validated"]["cells"])
        outcome.say("the plan, which is not measured")
    if args.picture:
        from ..report.plan import picture

        write(picture(plans, plan, uniform, os.path.splitext(args.picture)[1][1:].lower()), args.picture)
    if args.output == "-":
        sys.stdout.write(_rules_text(data))
    elif args.json != "-":
        print(_text(data))
    if args.json:
        write_json("plan", data, args.json)
    return outcome.status


def _exact(
    args: argparse.Namespace, model: Model, text: str, store: Results, number: int, executor: Executor
) -> Exact:
    """To measure more cells of the run with."""
    run = store.get(number)
    if text_sha256(text) != run.text_sha256:
        raise FqError(f"-f {args.file}: the estimate was made on another text")
    now = replace(run, versions=machine.versions(), numerics=numerics(executor))
    check_scales(number, run)
    if now.identity != run.identity:
        raise FqError(f"run {number} was measured with other versions than these: run fq sensitivity again")
    tokens, settings = model.tokenizer.encode(text), Settings.of_run(run.settings)
    limit, left = memory_limit_of(args.memory_limit), store.load(number)
    return Exact(model, tokens, settings, executor, limit, store, number, run, left)


def _narrow(ends: Sequence[float] | None) -> bool:
    return ends is not None and ends[1] <= ends[0] * (1 + WIDE) / (1 - WIDE)


def _number(args: argparse.Namespace, store: Results, model: Model, digest: str) -> int:
    if args.run is not None:
        return run_number(args.run)
    for number in store.sound():
        there = store.get(number)
        if there.asked is not None and there.model_sha256 == digest:
            return number
    raise FqError(f"{store.path}: there is no estimate of {model.path} in it: run fq sensitivity first")


def _figures(
    number: int, plan: Plan, plans: Sequence[Plan], uniform: Sequence[Plan], args: argparse.Namespace
) -> dict[str, Any]:
    budget = {"kl": args.budget_kl, "bits": args.budget_bits}
    return {
        "run": number,
        "command": args.command_line,
        "budget": budget,
        "plan": _plan(plan) | {"sites": _of_sites(plan)},
        "front": [_plan(one) for one in plans],
        "uniform": [_plan(one) | {"format": one.picked[0].spec} for one in uniform],
        "binds": _binds(plan, budget),
        "validated": None,
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {"cost": plan.cost, "mean_kld": plan.kld, "mean_kld_ci95": plan.interval, "rules": plan.rules}


def _of_sites(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "site": choice.site,
            "format": option.spec,
            "cost": option.cost / choice.elements,
            "mean_kld": option.kld,
        }
        for choice, option in zip(plan.choices, plan.picked, strict=True)
    ]


def _binds(plan: Plan, budget: Mapping[str, float | None]) -> str:
    """What keeps the plan from being cheaper, or better."""
    pairs = list(zip(plan.choices, plan.picked, strict=True))
    if budget["kl"] is not None:
        spent, of, best = plan.kld, budget["kl"], all(option is choice.options[0] for choice, option in pairs)
        free = "nothing: every site has its cheapest format"
    else:
        assert budget["bits"] is not None
        spent, of = plan.cost, budget["bits"]
        best = all(option is choice.options[-1] for choice, option in pairs)
        free = "nothing: no site is rounded"
    said = free if best else f"the budget: {100 * spent / of if of else 100:.1f} % of it is used"
    alone = [choice.site for choice in plan.choices if len(choice.options) == 1]
    if alone:
        sites = f"{len(alone)} sites have" if len(alone) > 1 else "a site has"
        said += f"; {sites} one choice alone, such as {alone[0]}"
    return said


def _validate(
    args: argparse.Namespace,
    model: Model,
    text: str,
    settings: Settings,
    plan: Plan,
    beside: Sequence[Plan],
) -> dict[str, Any]:
    """Both measured exactly, by a sweep."""
    names = ["plan", *(f"uniform {one.picked[0].spec}" for one in beside)]
    cells = [
        Cell(name, "together", name, tuple(one.rules))
        for name, one in zip(names, [plan, *beside], strict=True)
        if one.rules
    ]
    if not cells or cells[0].name != "plan":
        raise FqError("the plan rounds nothing: there is nothing to measure")
    with executor_of(args.threads) as executor:
        sweep = Sweep(
            model,
            model.tokenizer.encode(text),
            cells,
            executor=executor,
            memory_limit=memory_limit_of(args.memory_limit),
            settings=settings,
        )
        n = sweep.text.n
        for _ in progress(
            sweep,
            lambda at: f"exact: chunk {at[1] + 1}/{n}",
            lambda at: f"exact: chunk {at[1] + 1}/{n}" if at[0] == len(cells) - 1 else None,
        ):
            pass
    klds = [np.array([sweep.finished[i, c].paired.kld.mean() for c in range(n)]) for i in range(len(cells))]
    found = [
        {
            "name": cell.name,
            "predicted": one.kld,
            "predicted_ci95": one.interval,
            "mean_kld": float(of.mean()),
            "mean_kld_ci95_chunks": positive_interval(of),
            "cost": one.cost,
        }
        for cell, one, of in zip(cells, [plan, *beside], klds, strict=True)
    ]
    test = ratio_test(klds[1], klds[0]) if len(klds) > 1 else None
    over = None if test is None else {"ratio": test.ratio, "ci95": test.interval, "p": test.p}
    return {"text": args.validate, "n_chunks": n, "cells": found, "uniform_over_plan": over}


def _rules_text(data: Mapping[str, Any]) -> str:
    plan = data["plan"]
    predicted = f"{plan['mean_kld']:.3e}{_around(plan['mean_kld_ci95'])}"
    command = ascii_safe(" ".join(data["command"].split()))
    head = [f"# {command}", f"# predicted mean KL {predicted}, {plan['cost']:.4g} for a value"]
    return "\n".join([*head, *plan["rules"]]) + "\n"


def _around(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({ends[0]:.2e} to {ends[1]:.2e})"


def _text(data: Mapping[str, Any]) -> str:
    plan = data["plan"]
    lines = [
        f"plan  {len(plan['sites'])} sites, {plan['cost']:.4g} for a value on average; predicted mean KL "
        f"{plan['mean_kld']:.3e}{_around(plan['mean_kld_ci95'])}",
        f"binds  {data['binds']}",
    ]
    ends = plan["mean_kld_ci95"]
    if ends is None and plan["rules"]:
        lines.append("there is no interval: the estimate has too few chunks or verified cells")
    elif ends is not None and not _narrow(ends):
        lines.append(
            f"the interval is wider than {WIDE:.0%} either way: more chunks make it narrower, or, as far as "
            "it comes of the estimate's own error, cells that are measured exactly (-f FILE, --verify)"
        )
    if plan["mean_kld"] > LARGEST:
        lines.append(f"above {LARGEST} nats the second order does not hold: --validate says what it costs")
    lines += ["", _kinds_table(plan["sites"]), "", "rules"]
    lines += [f"  {rule}" for rule in plan["rules"][:MOST_RULES]]
    if len(plan["rules"]) > MOST_RULES:
        lines.append(f"  … and {len(plan['rules']) - MOST_RULES} more: -o FILE writes them all")
    rows = [["what any budget buys: cost", "mean KL", "uniform of at least that cost", "its mean KL"]]
    for one in data["front"]:
        dearer = [u for u in data["uniform"] if u["cost"] >= one["cost"]]
        beside = [dearer[0]["format"], f"{dearer[0]['mean_kld']:.2e}"] if dearer else ["", ""]
        rows.append([f"{one['cost']:.4g}", f"{one['mean_kld']:.2e}", *beside])
    lines += ["", table(rows, {0, 1, 3})]
    return "\n".join(lines + _validated_text(data["validated"]))


def _kinds_table(sites: Sequence[Mapping[str, Any]]) -> str:
    """How many sites of each kind have which format."""
    counts: dict[str, dict[str, int]] = {}
    for one in sites:
        kind, _, point = site_parts(one["site"])
        of = counts.setdefault(f"{kind}.{point}" if point else kind, {})
        name = one["format"] or "none"
        of[name] = of.get(name, 0) + 1
    rows = [["sites", "formats"]]
    for kind, of in counts.items():
        rows.append(
            [kind, ", ".join(f"{n} {spec}" for spec, n in sorted(of.items(), key=lambda item: -item[1]))]
        )
    return table(rows)


def _validated_text(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    rows = [
        [f"on {os.path.basename(found['text'])}, {found['n_chunks']} chunks", "cost", "predicted", "measured"]
    ]
    for one in found["cells"]:
        measured = f"{one['mean_kld']:.3e}{_around(one['mean_kld_ci95_chunks'])}"
        predicted = f"{one['predicted']:.3e}{_around(one['predicted_ci95'])}"
        rows.append([one["name"], f"{one['cost']:.4g}", predicted, measured])
    lines = ["", table(rows, {1})]
    if over := found["uniform_over_plan"]:
        low, high = over["ci95"]
        lines.append(
            f"the uniform format costs {over['ratio']:.3g} times the plan's KL ({low:.3g} to {high:.3g})"
        )
    return lines
