"""Fake quantisation's options, and the rules that they make."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from fq_kernels import get_format
from fq_kernels.rules import AnyRule, FakeQuant, Rule, Site, UnitRule, parse_rule

from ..errors import FqError
from ..run.model import Model

MAX_RULES_BYTES = 1 << 20  # of a file of rules


def add_fake_quant(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fake quantisation")
    add_rules(group)
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


def add_rules(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fake-quant",
        action="append",
        metavar="RULE",
        help="SITES=FORMAT[:option,...], such as ffn_norm[5]=bf16, ffn_norm[0-10,15].weighted=bf16:truncate, "
        "*[*].raw=f16, l_out[*]=bf16, k=fp8_e4m3, norm[*]=bf16:first-call; fq sites lists what there is; "
        "or @FILE, a rule on each line; may be repeated, later rules win",
    )
    group.add_argument(
        "--profile",
        metavar="NAME[:TYPE]",
        help="norms and residual as an engine computes them, such as hf:bf16 (fq profiles lists them); rules "
        "and units go on from there",
    )
    group.add_argument(
        "--norm-unit",
        action="append",
        metavar="UNIT",
        help="how norms compute inside: SITES=STEP=VALUE;STEP=VALUE..., such as '*=acc=bf16;order=lanes=16' "
        "or 'ffn_norm[0-3]=rsqrt=lut=6'; steps are x, square, acc, order, mean, eps, rsqrt, raw, weight, "
        "gain, out (docs/norm-unit.md); may be repeated, of each step the last wins",
    )
    group.add_argument(
        "--fake-quant-ffn-norm",
        metavar="TYPE",
        help="shorthand for a first rule: round FFN norms to TYPE (fq formats lists them)",
    )
    group.add_argument("--fake-quant-layer", type=int, metavar="N", help="its layer, -1 for all (default -1)")
    group.add_argument(
        "--fake-quant-point",
        metavar="POINT",
        help="its point, of a norm: in (what it reads), raw (before the weight) or weighted (default raw)",
    )
    group.add_argument(
        "--fake-quant-kind",
        metavar="KIND",
        help="its kind of site: one that fq sites lists, all (every norm), norm (the raw output of a layer's "
        "norms) or activation (all that is no norm's) (default ffn_norm)",
    )
    group.add_argument(
        "--fake-quant-mode",
        metavar="MODE",
        help="its mode: every row, or first-call: the first row to reach each site (default every)",
    )


def rules_of(args: argparse.Namespace, model: Model) -> list[AnyRule]:
    """The profile's first, then the shorthand's, then those of --fake-quant, then units."""
    shorthand = {
        name: value
        for name in ("kind", "layer", "point", "mode")
        if (value := getattr(args, f"fake_quant_{name}")) is not None
    }
    rules: list[AnyRule] = []
    if args.profile is not None:
        rules += map(parse_rule, model.profile_rules(args.profile))
    try:
        if (spec := args.fake_quant_ffn_norm) is not None:
            rules.append(Rule(get_format(spec, seed=args.seed), **shorthand))
        elif shorthand:
            raise FqError(f"--fake-quant-{next(iter(shorthand))} needs --fake-quant-ffn-norm TYPE")
        texts = [text for given in args.fake_quant or [] for text in _written(given)]
        rules += [parse_rule(text, seed=args.seed) for text in texts]
    except FqError:
        raise
    except ValueError as e:
        raise FqError(f"--fake-quant: {e}") from None
    try:
        rules += [UnitRule.parse(text, seed=args.seed) for text in args.norm_unit or []]
    except ValueError as e:
        raise FqError(f"--norm-unit: {e}") from None
    return rules


def _written(given: str) -> list[str]:
    """A rule, or those of a file, @FILE; a line that begins with # is none."""
    if not given.startswith("@"):
        return [given]
    with open(given[1:], "rb") as file:
        content = file.read(MAX_RULES_BYTES + 1)
    if len(content) > MAX_RULES_BYTES:
        raise FqError(f"--fake-quant {given}: larger than {MAX_RULES_BYTES >> 20} MiB")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise FqError(f"--fake-quant {given}: is no text in UTF-8") from None
    rules = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not rules:
        raise FqError(f"--fake-quant {given}: there is no rule in it")
    return rules


def option_of(args: argparse.Namespace) -> str:
    """Which option a rule that matches nothing is of, as far as can be told."""
    return "--norm-unit" if args.norm_unit and not args.fake_quant else "--fake-quant"


def fake_quant_of(args: argparse.Namespace, model: Model) -> FakeQuant | None:
    rules = rules_of(args, model)
    if not rules:
        for name in ("verbose", "counts"):
            if getattr(args, f"fake_quant_{name}"):
                raise FqError(f"--fake-quant-{name} needs a rule: --fake-quant RULE")
        return None
    try:
        fake_quant = FakeQuant(model.values, rules, count_errors=args.fake_quant_counts != "rows")
    except ValueError as e:
        raise FqError(f"{option_of(args)}: {e}") from None
    if args.fake_quant_verbose:
        fake_quant.on_row = _row_printer(model, fake_quant)
    return fake_quant


def base_rules_of(args: argparse.Namespace, model: Model) -> FakeQuant | None:
    """Of --base-fake-quant, on the baseline's model."""
    if not args.base_fake_quant:
        return None
    try:
        texts = [text for given in args.base_fake_quant for text in _written(given)]
        return FakeQuant(model.values, [parse_rule(text, seed=args.seed) for text in texts])
    except FqError:
        raise
    except ValueError as e:
        raise FqError(f"--base-fake-quant: {e}") from None


def _row_printer(model: Model, fake_quant: FakeQuant) -> Callable[[Site, float, float], None]:
    names = {value.place: node.name for node in model.graph.nodes for value in node.values}

    def line(site: Site, first: float, last: float) -> None:
        rule = fake_quant.counters[site].rule
        assert rule is not None
        print(
            f"{site.place.kind} fake quantization ({rule.format}): {names[site.place]} - "
            f"diff: first={first:.6f}, last={last:.6f}",
            file=sys.stderr,
        )

    return line
