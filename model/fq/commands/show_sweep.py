"""A sweep's figures as text for people."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.cells import AS_IT_IS, CONTROL, RANKED, by_norm, label_of
from ..measure.inference import MIN_CHUNKS
from ..run.finite import not_finite_text
from ..words import table
from .show import calibrations_text, chunks_text, few_chunks_text, interval_text


def _rank_text(rank: Sequence[int]) -> str:
    return f"{rank[0]}" if rank[0] == rank[1] else f"{rank[0]}-{rank[1]}"


def sweep_text(data: dict[str, Any]) -> str:
    lines = [
        f"model  {os.path.basename(data['model'])}",
        f"text   {data['text']}: {data['n_tokens']} tokens; {chunks_text(data)}",
    ]
    if data.get("base_model"):
        lines.append(f"base   {os.path.basename(data['base_model'])}: all is compared with this file")
    if data.get("baseline"):
        name = f"{data['baseline_profile']}: " if "baseline_profile" in data else ""
        lines.append(f"baseline  {name}{'; '.join(data['baseline'])}")
    lines += calibrations_text(data.get("calibrations", []))
    if data["behind"]:
        lines.append(
            f"{len(data['behind'])} cells are behind the others and left out: --resume goes on with them"
        )
    if not data["n_chunks"]:
        return "\n".join([*lines, "no chunk has ended in every cell: there are no figures"])
    lines.append(f"PPL baseline  {data['ppl_base']:.4f}" + interval_text(data["ppl_base_ci95_chunks"], ".4f"))
    for entry in data["cells"]:
        if entry["kind"] == CONTROL:
            verdict = (
                "exactly 0, as it must be"
                if entry["exactly_zero"]
                else "NOT 0: the figures below cannot be trusted"
            )
            lines.append(f"control (baseline against itself)  {verdict}")
        elif entry["kind"] == AS_IT_IS:
            c = entry["comparison"]
            lines.append(
                f"the model as it is, beside it  mean KL {c['mean_kld']:.3e}"
                + interval_text(c["mean_kld_ci95_chunks"], ".2e")
            )
    for group in data["groups"]:
        mine = [entry for entry in data["cells"] if entry["group"] == group["name"]]
        lines += ["", group["name"], _group_table(mine)]
        if left_out := len(group["behind"]):
            of = left_out + sum(entry["kind"] in RANKED for entry in mine)
            lines.append(
                f"no ranks and no additivity ratio: {left_out} of {of} cells to be ranked are left out"
            )
        if group.get("additivity") is not None:
            lines.append(
                f"together {group['kld_together']:.3e}, sum of the single ones "
                f"{group['sum_of_single_klds']:.3e}: additivity ratio {group['additivity']:.3f}"
                + interval_text(group["additivity_ci95_chunks"], ".3f")
            )
        lines += _company_text(mine)
        lines += _pairs_text(group["pairs"])
    lines += _norms_by_step(data)
    several = [e["realisations"] for e in data["cells"] if "realisations" in e]
    if any(found["ln_ppl_ratio_ci95"] for found in several):
        numbers = sorted({found["n"] for found in several})
        lines += [
            "",
            f"ln(PPL ratio): mean of {' or '.join(map(str, numbers))} realisations of each rounding, 95 %",
            "interval over chunks and realisations; * a change that is resolved (Holm over all cells shown)",
        ]
    lost = [entry for entry in data["cells"] if entry["not_finite_tokens"]]
    if lost:
        lines.append("")
    for entry in lost:
        n = f"{entry['not_finite_tokens']} of {data['n_scored']} tokens"
        lines.append(f"{not_finite_text(entry['name'], entry['not_finite'])}; {n}")
    if data["n_chunks"] < MIN_CHUNKS:
        return "\n".join([*lines, "", f"below {MIN_CHUNKS} chunks there are no intervals and no ranks"])
    lines += [
        "",
        "rank: 1 is the largest mean KL; a range where the order is not resolved (paired tests over chunks,",
        "Holm over all pairs of the group). Each interval holds by itself",
        *few_chunks_text(data["n_chunks"]),
    ]
    return "\n".join(lines)


def _norms_by_step(data: dict[str, Any]) -> list[str]:
    """Where each of several steps was measured in each norm alone: one table of all, a column a step."""
    groups = by_norm(data)
    if len(groups) < 2:
        return []
    norms = list(dict.fromkeys(norm for cells in groups.values() for norm in cells))
    heads = ["all steps" if all(one in unit for one in groups) else unit for unit in groups]
    rows = [["mean KL, one norm alone", *heads]]
    for norm in norms:
        entries = [cells.get(norm) for cells in groups.values()]
        rows.append([norm, *("" if e is None else _kl_text(e) for e in entries)])
    return ["", table(rows, set(range(1, len(groups) + 1)))]


def _kl_text(entry: Mapping[str, Any]) -> str:
    return "not finite" if entry["not_finite_tokens"] else f"{entry['comparison']['mean_kld']:.2e}"


def _ln_ratio_text(entry: dict[str, Any]) -> str:
    of_several = entry.get("realisations")
    if not of_several:
        return f"{entry['comparison']['ln_ppl_ratio']:+.3e}"
    text, interval = f"{of_several['ln_ppl_ratio']:+.3e}", of_several["ln_ppl_ratio_ci95"]
    ends = f" ({interval[0]:+.1e} to {interval[1]:+.1e})" if interval else ""
    return text + ends + (" *" if of_several["resolved"] else "")


def _company_text(entries: list[dict[str, Any]]) -> list[str]:
    """What each step of a unit costs beside the others."""
    lines = []
    for entry in entries:
        if more := entry.get("in_company"):
            step = label_of(entry).removeprefix("without ")
            interval = interval_text(more["mean_kld_ci95_chunks"], "+.2e")
            lines.append(f"in company {step} costs {more['mean_kld']:+.3e}{interval}")
    return lines


def _pairs_text(pairs: dict[str, Any]) -> list[str]:
    if pairs["ordered"] == pairs["n"]:
        return []
    more = f"; one more would take some {n} chunks" if (n := pairs["chunks_for_the_next"]) else ""
    return [f"of {pairs['n']} pairs the order of {pairs['ordered']} is resolved{more}"]


def _group_table(entries: list[dict[str, Any]]) -> str:
    rows = [["rank", "rounded", "mean KL", "95 % over chunks", "largest chunk"]]
    rows[0] += ["ln(PPL ratio)", "same top, %", "SQNR, dB"]
    singles = [e for e in entries if e["kind"] in RANKED]
    # those that are not finite last
    singles.sort(key=lambda e: (e["not_finite_tokens"] > 0, -e["comparison"]["mean_kld"]))
    for entry in [*singles, *(e for e in entries if e["kind"] not in RANKED)]:
        c, sites = entry["comparison"], entry["sites"]
        finite = not entry["not_finite_tokens"]
        interval = c["mean_kld_ci95_chunks"] if finite else None
        sqnr = sites[0]["sqnr_db"] if len(sites) == 1 else None
        rows.append(
            [
                _rank_text(entry["rank"]) if "rank" in entry else "",
                label_of(entry),
                f"{c['mean_kld']:.3e}" if finite else "not finite",
                "" if interval is None else f"{interval[0]:.2e} to {interval[1]:.2e}",
                f"{times:.1f} x" if (times := c["largest_chunk"]["times_mean"]) and finite else "",
                _ln_ratio_text(entry) if finite else "",
                f"{100 * c['same_top']:.3f}",
                "" if sqnr is None else f"{sqnr:.1f}",
            ]
        )
    return table(rows, {0, 2, 3, 4, 5, 6, 7})
