"""An estimate of every site and format beside what other runs say of the same cells: exact ones, or other
estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fq_kernels import default_fpu

from ..errors import FqError
from ..measure.agreement import MIN_CELLS, rank_correlation
from ..words import table
from .compare import not_paired, otherwise_unlike
from .run import Run


def klds_of(data: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """By site and format, of `stored_figures`: mean_kld, and of an estimate its interval and its mark."""
    if "estimate" in data:
        return {(cell["site"], cell["format"]): cell for cell in data["cells"]}
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in data["cells"]:
        if entry["kind"] == "single":
            site, _, spec = entry["rules"][0].partition("=")
            kld = None if entry["not_finite_tokens"] else entry["comparison"]["mean_kld"]
            found[site, spec] = {"mean_kld": kld}
    return found


@default_fpu()
def compare_estimate(
    estimate: tuple[Run, Mapping[str, Any]], other: tuple[Run, Mapping[str, Any]]
) -> dict[str, Any]:
    """The run and the figures of each, the estimate first; as written to JSON.

    ``groups`` has for each format and kind of site that both have, with at least MIN_CELLS cells: how many
    there are and how many are marked; of those that are not Spearman's rank correlation, median, least and
    largest of estimate / other, and the share of the others that lie within the estimate's interval, those
    apart that were measured for the estimate. ``by_token`` and ``by_element`` have correlation and
    ratios of the sums that the estimate is not (`measure.sensitivity`). ``unlike`` is what makes the
    baselines differ, as an estimate is of exact activations.
    Raises FqError where the runs are of other models, texts or chunks.
    """
    (run, data), (other_run, other_data) = estimate, other
    why = not_paired(run, other_run)
    if why is None and data["chunk_indices"][: data["n_chunks"]] != _chunks_of(other_data):
        why = "they are of other chunks"
    if why is not None:
        raise FqError(f"an estimate is compared over the same chunks: {why}")
    mine, others = klds_of(data), klds_of(other_data)
    seen = {(one["site"], one["format"]) for one in data["verified"]}
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for cell, there in others.items():
        if cell in mine and there["mean_kld"] and mine[cell]["mean_kld"]:
            kind, point = mine[cell]["kind"], mine[cell]["point"]
            groups.setdefault((cell[1], f"{kind}.{point}" if point else kind), []).append(cell)
    result: dict[str, Any] = {
        "estimate": data["run"],
        "other": other_data["run"],
        "unlike": otherwise_unlike(run, other_run),
        "groups": [],
    }
    for (spec, kind), cells in groups.items():
        if len(cells) < MIN_CELLS:
            continue
        sound = [cell for cell in cells if not mine[cell]["mark"]]
        held = [_within(mine[cell], others[cell]) for cell in sound if cell not in seen]
        known = [one for one in held if one is not None]
        result["groups"].append(
            {
                "format": spec,
                "sites": kind,
                "n": len(cells),
                "marked": len(cells) - len(sound),
                **_alike(sound, mine, others, "mean_kld"),
                "held": sum(known) / len(known) if known else None,
                "by_token": _alike(sound, mine, others, "by_token"),
                "by_element": _alike(sound, mine, others, "by_element"),
            }
        )
    return result


def _chunks_of(data: Mapping[str, Any]) -> list[int]:
    """Of the text, those that ended."""
    found: list[int] = data["chunks_of_text"] if "chunks_of_text" in data else data["chunk_indices"]
    return found[: data["n_chunks"]]


def _alike(
    cells: Sequence[tuple[str, str]],
    mine: Mapping[tuple[str, str], Mapping[str, Any]],
    others: Mapping[tuple[str, str], Mapping[str, Any]],
    key: str,
) -> dict[str, Any]:
    a = np.array([mine[cell].get(key) or math.nan for cell in cells], np.float64)
    b = np.array([others[cell]["mean_kld"] for cell in cells], np.float64)
    if len(cells) < MIN_CELLS or not np.isfinite(a).all():
        return {"spearman": None, "ratio_median": None, "ratio_least": None, "ratio_largest": None}
    ratio, spearman = a / b, rank_correlation(a, b)
    return {
        "spearman": spearman if math.isfinite(spearman) else None,
        "ratio_median": float(np.median(ratio)),
        "ratio_least": float(ratio.min()),
        "ratio_largest": float(ratio.max()),
    }


def _within(cell: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    ends = cell["mean_kld_ci95"]
    return None if ends is None else bool(ends[0] <= other["mean_kld"] <= ends[1])


def compare_estimate_text(data: Mapping[str, Any]) -> str:
    title = f"run {data['estimate']}, an estimate, beside run {data['other']}"
    unlike = f"\ntheir baselines differ, too, in {data['unlike']}" if data["unlike"] else ""
    if not data["groups"]:
        return f"{title}: they share no kind of site and format with {MIN_CELLS} cells{unlike}"
    rows = [["format", "sites", "cells", "marked", "rank correlation", "estimate / other", "within 95 %"]]
    rows[0] += ["token by token", "element by element"]
    for group in data["groups"]:
        held = "" if group["held"] is None else f"{100 * group['held']:.0f} %"
        row = [group["format"], group["sites"], str(group["n"]), str(group["marked"] or "")]
        row += [_correlation(group), _ratios(group), held]
        rows.append([*row, *(f"{_correlation(one)}, {_ratios(one)}" for one in _sums(group))])
    n = sum(group["n"] for group in data["groups"])
    marked = sum(group["marked"] for group in data["groups"])
    return f"{title}: {n} cells, {marked} marked and left out{unlike}\n{table(rows, {2, 3, 4, 6})}"


def _sums(group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [group["by_token"], group["by_element"]]


def _correlation(one: Mapping[str, Any]) -> str:
    return "" if one["spearman"] is None else f"{one['spearman']:.3f}"


def _ratios(one: Mapping[str, Any]) -> str:
    if one["ratio_median"] is None:
        return ""
    return f"{one['ratio_median']:.2f} ({one['ratio_least']:.2f} to {one['ratio_largest']:.2f})"
