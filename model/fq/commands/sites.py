"""fq sites."""

from __future__ import annotations

import argparse
from typing import Any

from fq_kernels.rules import FakeQuant

from ..errors import FqError
from ..run.model import Model
from ..words import table
from .options import add_model, add_seed, check_seed, describe_model
from .rules import add_rules, option_of, rules_of


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_rules(parser.add_argument_group("rules"))
    add_model(parser)
    add_seed(parser, "stochastic rounding and dither")


def main(args: argparse.Namespace) -> int:
    check_seed(args)

    def describe(model: Model) -> dict[str, Any]:
        rules = rules_of(args, model)
        try:
            return _data(model, FakeQuant(model.values, rules))
        except ValueError as e:
            raise FqError(f"{option_of(args)}: {e}") from None

    return describe_model("sites", args, describe, _text)


def _data(model: Model, fake_quant: FakeQuant) -> dict[str, Any]:
    """Every site in graph order with the rule that takes it, or None, and how its norm computes, or None."""
    return {
        "model": model.path,
        "rules": [str(rule) for rule in fake_quant.rules],
        "sites": [
            {
                "site": str(site),
                "kind": site.place.kind,
                "layer": site.place.layer,
                "point": site.point,
                "node": node.name,
                "rule": None if (rule := fake_quant.counters[site].rule) is None else str(rule),
                "unit": None if (unit := fake_quant.units.get(site.place)) is None else str(unit),
            }
            for node in model.graph.nodes
            for site in node.sites
        ],
    }


def _text(data: dict[str, Any]) -> str:
    columns = ["site", "node", "rule"] + ["unit"] * any(site["unit"] for site in data["sites"])
    rows = [columns] + [[site[column] or "-" for column in columns] for site in data["sites"]]
    taken = sum(site["rule"] is not None for site in data["sites"])
    return f"{table(rows)}\n{taken} of {len(data['sites'])} sites have a rule"
