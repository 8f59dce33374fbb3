"""Figures as text for people, and what inspect and graph show."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter as Tally
from collections.abc import Iterator
from typing import Any

import numpy as np

from fq_kernels.rules import FakeQuant, describe_norms

from .generation import Timings
from .runner import Model
from .streams import Streams

MAX_VALUE_CHARS = 96


def table(rows: list[list[str]], right: frozenset[int] | set[int] = frozenset()) -> str:
    """Rows of cells, the first one the heading, in columns; ``right`` names those aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in cells))
    return "\n".join(line.rstrip() for line in lines)


def progress(run: Streams) -> Iterator[int]:
    """Run a measurement with a bar and an ETA on a terminal, a line per chunk elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # some terminals say 0
        with tqdm(
            total=run.n_chunks,
            unit="chunk",
            file=sys.stderr,
            leave=False,
            dynamic_ncols=sized,
            ncols=None if sized else 80,
        ) as bar:
            for chunk in run:
                bar.set_postfix_str(f"PPL {run.ppl:.4f}", refresh=False)
                bar.update()
                yield chunk
        return
    start = time.perf_counter()
    for chunk in run:
        elapsed = time.perf_counter() - start
        left = elapsed / run.done * (run.n_chunks - run.done)
        print(
            f"[{run.done}/{run.n_chunks}] PPL {run.ppl:.4f}  {elapsed:.1f} s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
        yield chunk


# ---------------------------------------------------------------- inspect, graph


def inspect_data(model: Model) -> dict[str, Any]:
    by_type = Tally(info.type.name for info in model.file.tensors.values())
    n_bytes: Tally[str] = Tally()
    for info in model.file.tensors.values():
        n_bytes[info.type.name] += info.n_bytes
    return {
        "model": model.path,
        "bytes": model.file.size,
        "gguf_version": model.file.version,
        "metadata": {key: _plain(value) for key, value in model.file.metadata.items()},
        "parameters": sum(info.n_elements for info in model.file.tensors.values()),
        "tensor_types": [
            {"type": name, "tensors": count, "bytes": n_bytes[name]} for name, count in by_type.most_common()
        ],
        "tensors": [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.n_bytes}
            for t in model.file.tensors.values()
        ],
        "norms": describe_norms(model.norms),
        "sites": [str(site) for node in model.graph.nodes for site in node.sites],
    }


def _plain(value: Any) -> Any:
    """A metadata value for JSON: long arrays by their length, undecodable bytes escaped."""
    if isinstance(value, np.ndarray | list):
        if len(value) > 16:
            return f"array of {len(value)}"
        return [_plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def inspect_text(data: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        text = str(value) if isinstance(value, int | float) else ascii_safe(str(value))
        return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"

    lines = [
        f"{data['model']}: {data['bytes'] / 1e6:.1f} MB, {data['parameters'] / 1e6:.1f} M parameters, "
        f"GGUF version {data['gguf_version']}",
        "",
        table([["metadata", ""], *([key, shown(value)] for key, value in data["metadata"].items())]),
        "",
        table(
            [
                ["type", "tensors", "MB"],
                *([t["type"], str(t["tensors"]), f"{t['bytes'] / 1e6:.1f}"] for t in data["tensor_types"]),
            ],
            {1, 2},
        ),
        "",
        f"norm sites: {data['norms']}",
    ]
    return "\n".join(lines)


def ascii_safe(text: str) -> str:
    """Control characters escaped: metadata is untrusted and the reader may be a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def graph_data(model: Model) -> dict[str, Any]:
    types = {name: info.type.name for name, info in model.file.tensors.items()}
    return {
        "model": model.path,
        "nodes": [
            {
                "index": i,
                "name": node.name,
                "op": node.op.value,
                "shape": list(node.shape),
                "inputs": list(node.inputs),
                "weight": node.weight,
                "weight_type": types.get(node.weight or ""),
                "sites": [str(site) for site in node.sites],
            }
            for i, node in enumerate(model.graph.nodes)
        ],
    }


def graph_text(data: dict[str, Any]) -> str:
    rows = [["#", "node", "op", "shape", "inputs", "weight", "sites"]]
    for node in data["nodes"]:
        rows.append(
            [
                str(node["index"]),
                node["name"],
                node["op"],
                "(" + ", ".join(map(str, node["shape"])) + ")",
                " ".join(map(str, node["inputs"])),
                f"{node['weight']} {node['weight_type']}" if node["weight"] else "",
                ", ".join(node["sites"]),
            ]
        )
    return table(rows, {0})


# ---------------------------------------------------------------- sites, formats


def sites_data(model: Model, fake_quant: FakeQuant) -> dict[str, Any]:
    """Every site in graph order with the rule that takes it, or None."""
    return {
        "model": model.path,
        "rules": [str(rule) for rule in fake_quant.rules],
        "sites": [
            {
                "site": str(site),
                "kind": site.norm.kind,
                "layer": site.norm.layer,
                "point": site.point,
                "node": node.name,
                "rule": None if (rule := fake_quant.counters[site].rule) is None else str(rule),
            }
            for node in model.graph.nodes
            for site in node.sites
        ],
    }


def sites_text(data: dict[str, Any]) -> str:
    rows = [["site", "node", "rule"]]
    rows += [[site["site"], site["node"], site["rule"] or "-"] for site in data["sites"]]
    taken = sum(site["rule"] is not None for site in data["sites"])
    return f"{table(rows)}\n{taken} of {len(data['sites'])} sites have a rule"


def formats_text(formats: list[dict[str, Any]]) -> str:
    """Three tables: numbers, options, notes."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.6g}"

    numbers = ["bits_per_value", "largest", "smallest_normal", "smallest_subnormal"]
    rows = [["format", "bits", "largest", "smallest normal", "subnormal", "scale shared by", "rounding"]]
    options = [["format", "options"]]
    notes = [["format", "note"]]
    for f in formats:
        values = [number(f[key]) for key in numbers]
        rows.append([f["name"], *values, str(f["block"] or "-"), f["rounding"]])
        if f["options"]:
            options.append([f["name"], ", ".join(f["options"])])
        if f["note"]:
            notes.append([f["name"], f["note"]])
    return "\n\n".join([table(rows, {1, 2, 3, 4}), table(options), table(notes)])


# ---------------------------------------------------------------- results


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

    def figure(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for s in data["sites"]:
        layer = "" if s["layer"] is None else f"[{s['layer']}]"
        rows.append(
            [
                f"{s['kind']}{layer}.{s['point']}",
                str(s["rows_seen"]),
                str(s["rows_quantised"]),
                str(s["rows_skipped"]),
                f"{100 * s['coverage']:.1f} %",
                figure(s["out_of_range"], "d"),
                figure(s["max_abs_error"], ".3g"),
                figure(s["mean_abs_error"], ".3g"),
                figure(s["mean_error"], "+.2g"),
                figure(s["sqnr_db"], ".2f"),
            ]
        )
    return "\n".join(
        [
            *(f"rule: {rule}" for rule in data["rules"]),
            f"norm rows in the layers: {sum(seen.values())} "
            f"({seen['attn_norm']} attn_norm, {seen['ffn_norm']} ffn_norm); with output_norm {total}; "
            f"rounded {rounded} ({100 * rounded / total if total else 0:.1f} %)",
            table(rows, set(range(1, 10))),
        ]
    )


def _interval(ci: list[float] | tuple[float, float] | None) -> str:
    return "" if ci is None else f"   95 % over chunks: {ci[0]:+.3g} to {ci[1]:+.3g}"


def perplexity_text(data: dict[str, Any]) -> str:
    partial = f"  PARTIAL: {data['n_chunks_asked']} were asked for" if data["partial"] else ""
    lines = [
        f"model  {os.path.basename(data['model'])}",
        f"text   {data['text']}: {data['n_tokens']} tokens read; "
        f"{data['n_chunks']} chunks of {data['n_ctx']}, {data['n_scored']} tokens scored{partial}",
        f"time   {data['seconds']:.1f} s, {data['numerics']['threads']} threads",
    ]
    if "ggml" in (data["activations"], data.get("baseline_activations")):
        baseline = data.get("baseline_activations")
        lines.append(f"activations {data['activations']}" + (f", baseline's {baseline}" if baseline else ""))
    lines.append("")
    c = data.get("comparison")
    if c:
        lines += [
            f"PPL baseline            {c['ppl_base']:.4f} ± {c['ppl_base_se']:.5f}",
            f"PPL quantised           {c['ppl_quant']:.4f} ± {c['ppl_quant_se']:.5f}",
            f"mean ln(PPL ratio)      {c['ln_ppl_ratio']:+.3e} ± {c['ln_ppl_ratio_se']:.1e}"
            + _interval(c["ln_ppl_ratio_ci95_chunks"]),
            f"mean KL divergence      {c['mean_kld']:.3e} ± {c['kld_se']:.1e}"
            + _interval(c["mean_kld_ci95_chunks"]),
            f"median, max KL          {c['median_kld']:.3e}, {c['max_kld']:.3e}",
            f"same top token          {100 * c['same_top']:.3f} ± {100 * c['same_top_se']:.3f} %",
        ]
    else:
        lines.append(f"PPL {data['ppl']:.4f} ± {data['ppl_se']:.5f}")
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
    return "\n".join(lines)
