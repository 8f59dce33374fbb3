"""Figures as text for people."""

from __future__ import annotations

import os
from collections import Counter as Tally
from typing import TYPE_CHECKING, Any

from ..words import table

if TYPE_CHECKING:
    from ..run.generation import Timings


def timings_text(t: Timings, n_generated: int) -> str:
    """llama.cpp's block of timings."""

    def line(name: str, ms: float, n: int, what: str) -> str:
        per = f" ({ms / n:8.2f} ms per token, {n / ms * 1e3:8.2f} tokens per second)" if n and ms else ""
        return f"{name:>16} = {ms:10.2f} ms / {n:5d} {what}{per}"

    return "\n".join(
        [
            f"{'load time':>16} = {t.load_ms:10.2f} ms",
            line("prompt eval time", t.prompt_ms, t.prompt_n, "tokens"),
            line("eval time", t.eval_ms, t.eval_n, "runs  "),
            f"{'total time':>16} = {t.total_ms:10.2f} ms / {t.prompt_n + n_generated:5d} tokens",
        ]
    )


def fake_quant_text(data: dict[str, Any]) -> str:
    """The rules, the counts over the layers, and a row for each site that a rule takes."""
    layers = [norm for norm in data["norms"] if norm["layer"] is not None]
    seen: Tally[str] = Tally()
    for norm in layers:
        seen[norm["kind"]] += norm["rows_seen"]
    rounded, total = data["rows_quantised"], data["rows_seen"]
    rows = ["site,rows seen,rounded,skipped,coverage,out of range,max |e|,mean |e|,mean e,SQNR dB".split(",")]
    small = [key for key in ("to_zero", "subnormal") if any(s[key] for s in data["sites"])]
    rows[0][6:6] = [key.replace("_", " ") for key in small]

    def figure(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for s in data["sites"]:
        layer = "" if s["layer"] is None else f"[{s['layer']}]"
        rows.append(
            [
                f"{s['kind']}{layer}" + (f".{s['point']}" if s["point"] else ""),
                str(s["rows_seen"]),
                str(s["rows_quantised"]),
                str(s["rows_skipped"]),
                f"{100 * s['coverage']:.1f} %",
                figure(s["out_of_range"], "d"),
                *(figure(s[key], "d") for key in small),
                figure(s["max_abs_error"], ".3g"),
                figure(s["mean_abs_error"], ".3g"),
                figure(s["mean_error"], "+.2g"),
                figure(s["sqnr_db"], ".2f"),
            ]
        )
    lines = [f"rule: {rule}" for rule in data["rules"]]
    if any(s["point"] for s in data["sites"]):
        of_kinds = ", ".join(f"{n} {kind}" for kind, n in seen.items())
        lines.append(
            f"norm rows in the layers: {sum(seen.values())} ({of_kinds}); with output_norm {total}; "
            f"rounded {rounded} ({100 * rounded / total if total else 0:.1f} %)"
        )
    if data["sites"] or not data["rules"]:  # units alone round no sites
        lines.append(table(rows, set(range(1, len(rows[0])))))
    return "\n".join(lines)


def interval_text(ci: list[float] | tuple[float, float] | None, form: str = "+.3g") -> str:
    return "" if ci is None else f"   95 % over chunks: {ci[0]:{form}} to {ci[1]:{form}}"


def few_chunks_text(n_chunks: int) -> list[str]:
    """The warning that so few chunks ask for."""
    from ..measure.inference import ENOUGH_CHUNKS, MIN_CHUNKS

    if n_chunks < MIN_CHUNKS:
        return [f"{n_chunks} chunks: too few for intervals, which start at {MIN_CHUNKS}"]
    if n_chunks < ENOUGH_CHUNKS:
        return [f"{n_chunks} chunks are few: intervals are wide, and less sure below {ENOUGH_CHUNKS}"]
    return []


# llama-perplexity's names of quantiles, and ours; it shows fewer of KL than of probability.
_QUANTILES = {
    "Maximum": "max",
    "99.9%  ": "99.9%",
    "99.0%  ": "99%",
    "95.0%  ": "95%",
    "90.0%  ": "90%",
    "75.0%  ": "75%",
    "Median ": "median",
    "25.0%  ": "25%",
    "10.0%  ": "10%",
    " 5.0%  ": "5%",
    " 1.0%  ": "1%",
    " 0.1%  ": "0.1%",
    "Minimum": "min",
}


def comparison_text(c: dict[str, Any]) -> str:
    """llama-perplexity's table of a comparison, its names and order, with digits for small differences.

    Its ± take tokens as independent: where a figure has an interval over chunks, that comes first.
    """

    def figure(name: str, value: float, se: float | None = None, unit: str = "", more: str = "") -> str:
        error = "" if se is None else f"± {se:.3g}"
        spread = f"{more}   ({error})" if more and error else more or (error and f" {error}")
        return f"{name}: {value:12.6g}{unit}{spread}"

    lines = ["====== Perplexity statistics ======"]
    for name, value, se, more in (
        ("Mean PPL(Q)", c["ppl_quant"], c["ppl_quant_se"], interval_text(c["ppl_quant_ci95_chunks"])),
        ("Mean PPL(base)", c["ppl_base"], c["ppl_base_se"], interval_text(c["ppl_base_ci95_chunks"])),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", 100 * c["ln_ppl_correlation"], None, ""),
        ("Mean ln(PPL(Q)/PPL(base))", c["ln_ppl_ratio"], c["ln_ppl_ratio_se"], ""),
        ("Mean PPL(Q)/PPL(base)", c["ppl_ratio"], c["ppl_ratio_se"], ""),
        ("Mean PPL(Q)-PPL(base)", c["ppl_diff"], c["ppl_diff_se"], ""),
    ):
        lines.append(figure(f"{name:<30}", value, se, "%" if se is None else "", more))
    lines += ["", "====== KL divergence statistics ======"]
    interval = interval_text(c["mean_kld_ci95_chunks"])
    lines.append(figure("Mean    KLD", c["mean_kld"], c["kld_se"], "", interval))
    lines += [
        figure(f"{name} KLD", c["kld"][key]) for name, key in _QUANTILES.items() if key not in ("75%", "25%")
    ]
    lines += ["", "====== Token probability statistics ======"]
    lines.append(figure("Mean    Δp", 100 * c["mean_dp"], 100 * c["dp_se"], " %"))
    lines += [figure(f"{name} Δp", 100 * c["dp"][key], None, "%") for name, key in _QUANTILES.items()]
    lines.append(figure("RMS Δp    ", 100 * c["rms_dp"], 100 * c["rms_dp_se"], " %"))
    agreement = c["same_top_ci95_chunks"]
    interval = interval_text(agreement and [100 * end for end in agreement])
    lines.append(figure("Same top p", 100 * c["same_top"], 100 * c["same_top_se"], " %", interval))
    return "\n".join(lines)


def _realisations_text(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    each = " ".join(f"{ln_ratio:+.1e}" for ln_ratio in found["ln_ppl_ratio_of_each"])
    lines = [f"  of {found['n']} realisations     {found['ln_ppl_ratio']:+.3e}"]
    if found["ln_ppl_ratio_ci95"]:
        low, high = found["ln_ppl_ratio_ci95"]
        verdict = "resolved" if found["resolved"] else "not resolved"
        lines[0] += f"   95 % over chunks and realisations: {low:+.3g} to {high:+.3g}"
        lines.append(f"  change of perplexity  {verdict} (p = {found['p']:.2g})")
    return [*lines, f"  each                  {each}"]


NEIGHBOURS = "; figures are of these neighbouring chunks"


def chunks_text(data: dict[str, Any]) -> str:
    """What of the text the figures are of."""
    random = data["chunk_order"] == "random"
    return (
        f"{data['n_chunks']} chunks of {data['n_ctx']}"
        + (f" in random order (seed {data['chunk_seed']})" if random else "")
        + f", {data['n_scored']} tokens scored"
        + (f"  PARTIAL: {data['n_chunks_asked']} were asked for" if data["partial"] else "")
        + ("" if random else "; the file's chunks" if "base_file" in data else NEIGHBOURS)
    )


def calibrations_text(calibrations: list[dict[str, Any]]) -> list[str]:
    """Where static scales come from."""
    return [
        f"scales {each['file']}: {each['method']} per {each['per']}, "
        f"of {os.path.basename(each['model']['file'])}, on {each['text']['name']}"
        + (" - THE TEXT THAT IS MEASURED ON" if each["same_text"] else "")
        for each in calibrations
    ]


def perplexity_text(data: dict[str, Any]) -> str:
    lines = [
        f"model  {os.path.basename(data['model'])}",
        *(f"base   {os.path.basename(data[key])}" for key in ("base_model", "base_file") if key in data),
        f"text   {data['text']}: {data['n_tokens']} tokens read; {chunks_text(data)}",
        f"time   {data['seconds']:.1f} s, {data['numerics']['threads']} threads",
    ]
    if "ggml" in (data["activations"], data.get("baseline_activations")):
        baseline = data.get("baseline_activations")
        lines.append(f"activations {data['activations']}" + (f", baseline's {baseline}" if baseline else ""))
    lines += calibrations_text(data.get("calibrations", []))
    lines.append("")
    c = data.get("comparison")
    if c:
        low_high = c["same_top_ci95_chunks"]
        largest = c["largest_chunk"]
        lines += [
            f"PPL baseline            {c['ppl_base']:.4f}" + interval_text(c["ppl_base_ci95_chunks"], ".4f"),
            f"PPL quantised           {c['ppl_quant']:.4f}"
            + interval_text(c["ppl_quant_ci95_chunks"], ".4f"),
            f"mean ln(PPL ratio)      {c['ln_ppl_ratio']:+.3e}",
            *_realisations_text(data.get("realisations")),
            f"mean KL divergence      {c['mean_kld']:.3e}" + interval_text(c["mean_kld_ci95_chunks"], ".3e"),
            f"median, max KL          {c['median_kld']:.3e}, {c['max_kld']:.3e}",
        ]
        if (largest["times_mean"] or 0) > 0:  # not NaN
            lines.append(
                f"largest chunk's KL      {largest['mean_kld']:.3e}, "
                f"{largest['times_mean']:.2f} times the mean"
            )
        lines.append(
            f"same top token          {100 * c['same_top']:.3f} %"
            + interval_text(low_high and [100 * end for end in low_high], ".3f")
        )
        lines += few_chunks_text(data["n_chunks"])
    else:
        lines.append(f"PPL {data['ppl']:.4f}" + interval_text(data["ppl_ci95_chunks"], ".4f"))
        lines += few_chunks_text(data["n_chunks"])
    if data["not_finite_tokens"]:
        n = f"{data['not_finite_tokens']} of {data['n_scored']}"
        lines.append(f"NOT FINITE: the logits of {n} tokens scored")
    if "control" in data:
        k = data["control"]
        verdict = (
            "exactly 0, as it must be" if k["exactly_zero"] else "NOT 0: the figures above cannot be trusted"
        )
        lines.append(
            f"control (baseline against itself): ln(PPL ratio) {k['ln_ppl_ratio']:g}, "
            f"max KL {k['max_kld']:g}, same top token {100 * k['same_top']:g} %: {verdict}"
        )
    if "fake_quant" in data:
        lines += ["", fake_quant_text(data["fake_quant"])]
    if "base_fake_quant" in data:
        lines += ["", "of the baseline:", fake_quant_text(data["base_fake_quant"])]
    return "\n".join(lines)
