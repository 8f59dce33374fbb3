"""fq profiles."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from fq_kernels.units import STEPS, NormUnit
from fq_kernels.units.profiles import DTYPES, NORMS, describe_profiles

from ..words import table
from .files import write_json


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--type", choices=DTYPES, default=DTYPES[0], help="of the activations (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def main(args: argparse.Namespace) -> int:
    data = describe_profiles(args.type)
    if args.json:
        write_json("profiles", {"profiles": data}, "-")
    else:
        print(_text(data))
    return 0


def _text(profiles: list[dict[str, Any]]) -> str:
    """A table of steps, those of models whose norms differ from Llama's, and the sources."""
    tables = [_steps(profiles, NORMS[0], "profile")]
    for norms in NORMS[1:]:
        differ = [p for p in profiles if p["units"][norms] != p["units"][NORMS[0]]]
        tables.append(_steps(differ, norms, f"on {norms}"))
    return "\n\n".join([*tables, *map(_about, profiles)])


def _steps(profiles: list[dict[str, Any]], norms: str, head: str) -> str:
    units = {profile["name"]: NormUnit.parse(profile["units"][norms]).steps for profile in profiles}
    used = [step for step in STEPS if any(step in unit for unit in units.values())]
    rows = [[head, *used, "residual"]]
    for profile in profiles:
        unit = units[profile["name"]]
        residual = profile["residual"] or "not said"
        rows.append(
            [
                profile["name"],
                *(unit.get(step, "-") for step in used),
                f"{residual}, after the norm" if profile["fused"] else residual,
            ]
        )
    return table(rows)


def _about(profile: dict[str, Any]) -> str:
    text = f"{profile['source']}: {profile['note']}"
    indent = " " * 12
    return textwrap.fill(text, 110, initial_indent=f"{profile['name']:<12}", subsequent_indent=indent)
