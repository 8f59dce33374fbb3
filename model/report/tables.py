"""The report's tables: every figure of a cell that the store has, and where it comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import QUANTILES
from ..sweep import CONTROL
from .data import (
    NONE,
    Entry,
    Group,
    between,
    groups_of,
    kl_text,
    kld_interval,
    plain,
    signed,
    significant,
)
from .verdict import additivity_text, additivity_words, ppl_text

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
        kl = [kl_text(c["mean_kld"]), between(kld_interval(group.whole))]
        rows.append([group.name, *kl, ppl_text(group.whole), f"{100 * c['same_top']:.2f} %", adds])
    return Table("All sites together", head, rows, ["single"] * len(rows))


def cell_tables(data: dict[str, Any]) -> list[tuple[str, list[Table]]]:
    """(group, its tables), and the cells of no group."""
    found = []
    for group in groups_of(data):
        ordered = sorted(group.singles, key=lambda entry: -entry["comparison"]["mean_kld"])
        rest = [*group.cumulative, *([group.together] if group.together else [])]
        found.append((group.name, _tables([*ordered, *rest], group)))
    others = [entry for entry in data["cells"] if not entry["group"]]
    if others:
        control_only = all(entry["kind"] == CONTROL for entry in others)
        found.append(("control" if control_only else "other cells", _tables(others, None)))
    return found


def _tables(entries: Sequence[Entry], group: Group | None) -> list[Table]:
    names = [_name(entry, group) for entry in entries]
    kinds = [entry["kind"] for entry in entries]
    main: list[Row] = []
    kl: list[Row] = []
    dp: list[Row] = []
    for name, entry in zip(names, entries, strict=True):
        c = entry["comparison"]
        rank = entry.get("rank")
        main.append(
            [
                name,
                "" if rank is None else str(rank[0]) if rank[0] == rank[1] else f"{rank[0]}–{rank[1]}",
                f"{kl_text(c['mean_kld'], 4)} ± {kl_text(c['kld_se'], 2)}",
                between(kld_interval(entry)),
                f"{_signed_kl(c['ln_ppl_ratio'])} ± {kl_text(c['ln_ppl_ratio_se'], 2)}",
                between(c["ln_ppl_ratio_ci95_chunks"], _signed_kl),
                f"{significant(c['ppl_quant'], 6)} ± {significant(c['ppl_quant_se'])}",
                f"{100 * c['same_top']:.3f} ± {100 * c['same_top_se']:.3f}",
            ]
        )
        kl.append([name, *(kl_text(c["kld"][q]) for q in QUANTILES)])
        dp.append(
            [
                name,
                f"{signed(_times100(c['mean_dp']))} ± {significant(_times100(c['dp_se']), 2)}",
                significant(_times100(c["rms_dp"])),
                *(signed(_times100(c["dp"][q])) for q in QUANTILES),
            ]
        )
    main_head = ["rounded", "rank", "mean KL", "95 %", "ln(PPL ratio)", "95 %", "PPL", "same top, %"]
    tables = [
        Table("Comparison with the unrounded model", main_head, main, kinds),
        Table("KL divergence of a token", ["rounded", *QUANTILES], kl, kinds),
        Table(
            "Δp of the correct token, percentage points", ["rounded", "mean", "RMS", *QUANTILES], dp, kinds
        ),
    ]
    sites = _sites(entries, names)
    return [*tables, sites] if sites.rows else tables


def _name(entry: Entry, group: Group | None) -> str:
    if entry["kind"] == "together":
        return "all together"
    return plain(entry["name"].partition("=")[0] if group else entry["name"])


def _sites(entries: Sequence[Entry], names: Sequence[str]) -> Table:
    """Counters of each site rounded alone, and of each one where all are."""
    head = ["site", "rows rounded", "of", "SQNR, dB", "largest |error|", "mean |error|", "bias"]
    head += ["changed", "out of range", "not finite"]
    rows, kinds = [], []
    for name, entry in zip(names, entries, strict=True):
        if entry["kind"] == "cumulative":  # their sites are those of the ones before and after
            continue
        for site in entry["sites"]:
            layer = "" if site["layer"] is None else f"[{site['layer']}]"
            where = f", {name}" if entry["kind"] != "single" else ""
            sqnr = NONE if site["sqnr_db"] is None else f"{site['sqnr_db']:.2f}"
            errors = [significant(site[key]) for key in ("max_abs_error", "mean_abs_error")]
            elements = site["elements"]
            counts = [_count(site[key], elements) for key in ("changed", "out_of_range", "not_finite")]
            rows.append(
                [
                    f"{site['kind']}{layer}.{site['point']}{where}",
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


def _signed_kl(value: float) -> str:
    return ("+" if value > 0 else "") + kl_text(value)


def _times100(value: float) -> float:
    return 100 * value


# ---------------------------------------------------------------- provenance


def provenance(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Model by its file's name alone: a page travels, folders do not concern its readers."""
    numerics, versions = dict(data["numerics"]), dict(data["versions"])
    rows = [
        ("run", str(data["run"])),
        ("started", data.get("started", "")),
        ("model", os.path.basename(data["model"])),
        ("model SHA-256", data["model_sha256"]),
        ("text", os.path.basename(data.get("text") or "")),
        ("text SHA-256", data["text_sha256"]),
        (
            "measured",
            f"{data['n_tokens']} tokens; {data['n_chunks']} of {data['n_chunks_asked']} chunks of "
            f"{data['n_ctx']}, {data['n_scored']} tokens scored, batches of {data['batch']}",
        ),
        ("numerics", _pairs(numerics)),
        ("versions", _pairs(versions)),
        *((f"machine: {name}", _value(value)) for name, value in data["machine"].items()),
    ]
    return [(plain(name), plain(value)) for name, value in rows if value]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
