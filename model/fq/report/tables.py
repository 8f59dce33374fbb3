"""The report's tables: every figure of a cell that the store has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..measure.cells import CONTROL, label_of
from ..measure.statistics import QUANTILES
from ..measure.who_pays import who_pays_parts
from .data import (
    NONE,
    REALISATION,
    Entry,
    Group,
    between,
    groups_of,
    kl_text,
    kld,
    kld_interval,
    number,
    plain,
    realisations,
    same_top_text,
    signed,
    significant,
)
from .layers import additivity_text, additivity_words, largest_chunk
from .perplexity import ONE_ROUNDING, ppl_text
from .who import dearest

Row = list[str]


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it; ``kinds`` says which rows are of a single site."""

    title: str
    head: Row
    rows: list[Row]
    kinds: list[str]


def at_a_glance(data: dict[str, Any]) -> Table:
    """A row per group, all its sites together."""
    head = ["all sites of", "mean KL", "95 % over chunks", "change of PPL", "same top", "additivity ratio"]
    rows = []
    for group in groups_of(data):
        if group.whole is None:
            continue
        c = group.whole["comparison"]
        adds = NONE if group.additivity is None else f"{additivity_text(group)}: {additivity_words(group)}"
        kl = [kl_text(c["mean_kld"]), _interval(group.whole)]
        rows.append([group.name, *kl, ppl_text(group.whole), same_top_text(group.whole), adds])
    return Table("All sites together", head, rows, ["single"] * len(rows))


def cell_tables(data: dict[str, Any]) -> list[tuple[str, list[Table]]]:
    """(group, its tables), and the cells of no group."""
    found = []
    for group in groups_of(data):
        ordered = sorted([*group.singles, *group.parts], key=lambda entry: -_or_inf(kld(entry)))
        rest = [*group.without, *group.cumulative, *([group.together] if group.together else [])]
        found.append((group.name, _tables([*ordered, *rest], group)))
    others = [entry for entry in data["cells"] if not entry["group"] and entry["kind"] != REALISATION]
    if others:
        control_only = all(entry["kind"] == CONTROL for entry in others)
        found.append(("control" if control_only else "other cells", _tables(others, None)))
    return found


def _or_inf(value: float) -> float:
    """A broken model's figures come first."""
    return math.inf if math.isnan(value) else value


def _tables(entries: Sequence[Entry], group: Group | None) -> list[Table]:
    names = [_name(entry, group) for entry in entries]
    kinds = [entry["kind"] for entry in entries]
    main: list[Row] = []
    ppl: list[Row] = []
    kl: list[Row] = []
    dp: list[Row] = []
    errors: list[Row] = []
    for name, entry in zip(names, entries, strict=True):
        c = entry["comparison"]
        main.append(
            [
                name,
                _rank(entry, group),
                kl_text(c["mean_kld"], 4),
                _interval(entry),
                _largest(entry, group),
                same_top_text(entry),
            ]
        )
        ppl.append(
            [
                name,
                significant(c["ppl_quant"], 6),
                between(c["ppl_quant_ci95_chunks"], lambda x: significant(x, 4)),
                _signed_kl(c["ln_ppl_ratio"]),
                NONE if c["ln_ppl_ratio"] == 0 else between(c["ln_ppl_ratio_ci95_chunks"], _signed_kl),
                *_drawn(entry),
            ]
        )
        kl.append([name, *(kl_text(c["kld"][q]) for q in QUANTILES)])
        dp.append(
            [
                name,
                signed(_times100(c["mean_dp"])),
                significant(_times100(c["rms_dp"])),
                *(signed(_times100(c["dp"][q])) for q in QUANTILES),
            ]
        )
        errors.append(
            [
                name,
                *(kl_text(c[key], 2) for key in ("kld_se", "ln_ppl_ratio_se")),
                *(significant(c[key], 2) for key in ("ppl_quant_se",)),
                *(significant(_times100(c[key]), 2) for key in ("same_top_se", "dp_se", "rms_dp_se")),
            ]
        )
    main_head = ["rounded", "rank", "mean KL", "95 % over chunks", "largest chunk", "same top (95 %)"]
    of_one = f"95 %, {ONE_ROUNDING}" if group else "95 % over chunks"
    ppl_head = ["rounded", "PPL", of_one, "ln(PPL ratio)", of_one]
    if any(map(realisations, entries)):
        ppl_head += ["realisations", "mean ln(PPL ratio)", "95 %", "p, adjusted"]
    else:
        ppl = [row[: len(ppl_head)] for row in ppl]
    errors_head = [
        "rounded",
        "mean KL",
        "ln(PPL ratio)",
        "PPL",
        "same top, %",
        "Δp, points",
        "RMS Δp, points",
    ]
    tables = [
        Table("Comparison with the baseline", main_head, main, kinds),
        Table("Perplexity", ppl_head, ppl, kinds),
        Table("KL divergence of a token", ["rounded", *QUANTILES], kl, kinds),
        Table(
            "Δp of the correct token, percentage points", ["rounded", "mean", "RMS", *QUANTILES], dp, kinds
        ),
        Table("± of llama-perplexity, which takes tokens as independent", errors_head, errors, kinds),
    ]
    tables += [*_who_pays(entries, names, kinds), *_largest_tokens(entries, names, group)]
    sites = _sites(entries, names)
    return [*tables, sites] if sites.rows else tables


def _who_pays(entries: Sequence[Entry], names: Sequence[str], kinds: Sequence[str]) -> list[Table]:
    """Of the cells whose tokens differ at all."""
    known = [
        (name, entry["comparison"]["who_pays"], kind)
        for name, entry, kind in zip(names, entries, kinds, strict=True)
        if entry["comparison"].get("who_pays")
    ]
    if not known:
        return []
    first = known[0][1]
    head = ["rounded", *(f"top {name}" for name in first["top"])]
    head += [name for name, _ in who_pays_parts(first)]
    rows = []
    for name, found, _ in known:
        shares = [f"{100 * share:.1f} %" for share in found["top"].values()]
        parts = [kl_text(part["mean_kld"], 2) for _, part in who_pays_parts(found)]
        rows.append([name, *shares, *parts])
    title = (
        "Who pays: share of the summed KL that the tokens with the largest have; mean KL by place in the "
        "chunk, and by the baseline's probabilities"
    )
    return [Table(title, head, rows, [kind for *_, kind in known])]


def _largest_tokens(entries: Sequence[Entry], names: Sequence[str], group: Group | None) -> list[Table]:
    """Of all sites together, and of the one that costs most alone."""
    if group is None or group.control is not None:
        return []
    wanted = [group.whole, *dearest(group, 1)]
    rows, kinds = [], []
    for name, entry in zip(names, entries, strict=True):
        if not any(entry is one for one in wanted):
            continue
        for token in (entry["comparison"].get("who_pays") or {}).get("largest", []):
            chunk = str(group.indices[token["chunk"]])
            share = f"{100 * token['share']:.1f} %"
            rows.append([name, chunk, str(token["token"]), kl_text(token["kld"]), share])
            kinds.append(entry["kind"])
    head = ["rounded", "chunk", "after its token", "KL", "share of the cell's KL"]
    return [Table("The tokens with the largest KL divergence", head, rows, kinds)] if rows else []


def _interval(entry: Entry) -> str:
    """Of the mean KL; none of what is exactly 0."""
    return NONE if kld(entry) == 0 else between(kld_interval(entry))


def _rank(entry: Entry, group: Group | None) -> str:
    rank = group.order.rank(entry) if group else None
    if rank is None:
        return ""
    return str(rank[0]) if rank[0] == rank[1] else f"{rank[0]}–{rank[1]}"


def _largest(entry: Entry, group: Group | None) -> str:
    """``4.4 × mean (chunk 17)``"""
    if group is None or math.isnan(by := largest_chunk(group, entry)):
        return NONE
    return f"{by:.2f} × mean (chunk {group.indices[entry['comparison']['largest_chunk']['position']]})"


def _drawn(entry: Entry) -> Row:
    """What several realisations of the rounding say of the perplexity."""
    if (drawn := realisations(entry)) is None:
        return [NONE] * 4
    mean, interval = drawn["ln_ppl_ratio"], drawn.get("ln_ppl_ratio_ci95")
    p = significant(drawn.get("p_adjusted"), 2)
    return [str(drawn["n"]), _signed_kl(mean), between(interval, _signed_kl), p]


def _name(entry: Entry, group: Group | None) -> str:
    return plain(label_of(entry) if group else entry["name"])


def _sites(entries: Sequence[Entry], names: Sequence[str]) -> Table:
    """Counters of each site rounded alone, and of each one where all are."""
    head = ["site", "rows rounded", "of", "SQNR, dB", "largest |error|", "mean |error|", "bias"]
    head += ["changed", "out of range", "to zero", "subnormal", "not finite"]
    rows, kinds = [], []
    for name, entry in zip(names, entries, strict=True):
        if entry["kind"] == "cumulative":  # their sites are those of the ones before and after
            continue
        for site in entry["sites"]:
            layer = "" if site["layer"] is None else f"[{site['layer']}]"
            point = f".{site['point']}" if site["point"] else ""
            where = f", {name}" if entry["kind"] != "single" else ""
            sqnr = NONE if site["sqnr_db"] is None else f"{site['sqnr_db']:.2f}"
            errors = [significant(site[key]) for key in ("max_abs_error", "mean_abs_error")]
            elements = site["elements"]
            counted = ("changed", "out_of_range", "to_zero", "subnormal", "not_finite")
            counts = [_count(site.get(key), elements) for key in counted]
            rows.append(
                [
                    f"{site['kind']}{layer}{point}{where}",
                    str(site["rows_quantised"]),
                    str(site["rows_seen"]),
                    sqnr,
                    *errors,
                    signed(site["mean_error"]),
                    *counts,
                ]
            )
            kinds.append(entry["kind"])
    return Table("What the rounding did at each site", head, rows, kinds)


def _count(n: int | None, of: int) -> str:
    if n is None:
        return NONE
    return str(n) if not n or not of else f"{n} ({100 * n / of:.3g} %)"


def _signed_kl(value: Any) -> str:
    return ("+" if number(value) > 0 else "") + kl_text(value)


def _times100(value: Any) -> float:
    return 100 * number(value)
