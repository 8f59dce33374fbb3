"""The figures of `replicate` as Markdown: the report's and ours side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..measure.overhead import CONTROL, ENOUGH_ROUNDS, control_text, verdict
from ..words import ascii_safe
from . import why
from .replication import MODES, N_HELLO, REPORT, ROUNDINGS
from .why import change, percent, prose

NONE = "–"
TITLES = {"report": "report's mode", "meant": "first call on the FFN norm", "right": "right mode"}

# ---------------------------------------------------------------- Markdown


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """The first row is the heading; ``right`` names the columns aligned right."""
    rule = ["---:" if i in right else "---" for i in range(len(rows[0]))]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


def _code(text: str) -> str:
    """Any text on one line, as it is."""
    text = ascii_safe(text)
    fence = "`"
    while fence in text:
        fence += "`"
    pad = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _n(value: int) -> str:
    return f"{value:,}"


# ---------------------------------------------------------------- the page


def replication_text(data: dict[str, Any]) -> str:
    """The page. ``data`` is a Replication's result, with ``command``."""
    parts = [*_head(data)]

    def section(title: str, name: str, of_model: Any, *, before: str = "", after: str = "") -> None:
        parts.extend([f"## {title}", before])
        for figures in data["models"]:
            if len(data["models"]) > 1:
                parts.append(f"### {ascii_safe(figures['model']['name'])}")
            parts.append(
                of_model(figures[name], figures["model"]) if name in figures else "Interrupted: not run."
            )
        parts.append(after)

    section("1. Architecture counts", "architecture", _architecture, after=f"{_DIFFER}\n\n{why.COUNTS}")
    section(
        "2. Quantisation statistics", "quantisation", _quantisation, after=f"{_DIFFER}\n\n{why.rows(data)}"
    )
    section(
        "3. Performance",
        "performance",
        _performance,
        before=prose(why.LOAD),
        after=f"{_DIFFER}\n\n{why.times()}",
    )
    parts += ["## 4. BF16 unit test", *_unit_test(data["unit_values"])]
    section("5. Differences of the first and last element", "differences", _differences)
    section("6. Generation with all layers", "generation", _generation, after=prose(why.TEXT))
    section("7. Perplexity", "perplexity", _perplexity, after=prose(why.PERPLEXITY))
    return "\n\n".join(part for part in parts if part) + "\n"


_DIFFER = "Why the figures differ:"


def _head(data: dict[str, Any]) -> list[str]:
    modes = [["mode", "rule", "what it rounds"]]
    for (mode, rule), rounds in zip(
        MODES.items(),
        (
            "what the report's patch rounds: the first row to reach the name `norm-N`",
            "the first row to reach the FFN norm, which was meant",
            "every row of the FFN norm",
        ),
        strict=True,
    ):
        modes.append([TITLES[mode], _code(rule.format("N")), rounds])
    p = data["provenance"]
    rows = [["", ""], ["command", _code(data["command"])]]
    for m in (figures["model"] for figures in data["models"]):
        kind = "random weights, " if m["random_weights"] else ""
        size = f"{m['n_layer']} layers of {_n(m['n_embd'])}, {_n(m['bytes'])} bytes"
        rows.append(["model", f"{_code(m['name'])}: {kind}{size}, SHA-256 `{m['sha256']}`"])
    rows.append(["text", f"{ascii_safe(data['settings']['text'])}"])
    rows.append(["fq", f"{p['fq']}, {p['isa']} kernels, {p['threads']} threads (timings: 1)"])
    rows += [[name, ascii_safe(value)] for name, value in data["machine"].items()]
    lines = ["# The original report, replicated", prose(why.INTRODUCTION), _table(modes), _table(rows)]
    if data["partial"]:
        lines.insert(1, "**PARTIAL**: interrupted before its end.")
    if any(figures["model"]["random_weights"] for figures in data["models"]):
        lines.append(prose(why.RANDOM_WEIGHTS))
    return lines


# ---------------------------------------------------------------- 1


def _architecture(found: dict[str, Any], about: dict[str, Any]) -> str:
    loads = [found["loads"]["figures"], found["loads"]["text"]]

    def norm_rows(layer: dict[str, int]) -> str:
        return f"{layer['attn_norm_rows']} + {layer['ffn_norm_rows']} = {layer['rows']}"

    def row(title: str, report: str, cells: list[str]) -> list[str]:
        return [title, report, *cells]

    layer, last = found["layer"], about["n_layer"] - 1
    rows = [
        [
            "",
            "report",
            f"ours, {loads[0]['n_prompt']} tokens of prompt and {loads[0]['n_decoded']} decoded",
            f'ours, "Hello world" ({loads[1]["n_prompt"]}) + {N_HELLO} ({loads[1]["n_decoded"]} decoded)',
        ],
        row("layers", str(REPORT["layers"]), [str(about["n_layer"])] * 2),
        row(
            f'norm rows of layer {layer} (the report\'s "calls"): attention + FFN',
            str(REPORT["calls_per_layer"]),
            [norm_rows(load["layers"][layer]) for load in loads],
        ),
        row(
            f"norm rows of the last layer ({last})",
            str(REPORT["calls_per_layer"]),
            [norm_rows(load["layers"][last]) for load in loads],
        ),
        row("norm rows of all layers", str(REPORT["calls"]), [str(load["rows"]) for load in loads]),
        row(
            f"kernel calls of layer {layer}; of all layers",
            NONE,
            [f"{load['layers'][layer]['calls']}; {load['kernel_calls']}" for load in loads],
        ),
        row(
            "elements of a norm's output, for the prompt",
            _n(REPORT["tensor_elements"]),
            [f"{load['n_prompt']} × {_n(about['n_embd'])} = {_n(load['tensor_elements'])}" for load in loads],
        ),
        row(
            f"addresses of layer {layer}'s outputs",
            f"1 for {REPORT['calls_per_layer']} calls",
            [
                f"{load['layers'][layer]['addresses']} for {load['layers'][layer]['calls']} kernel calls"
                for load in loads
            ],
        ),
    ]
    return _table(rows, (1, 2, 3))


# ---------------------------------------------------------------- 2


def _quantisation(found: dict[str, Any], about: dict[str, Any]) -> str:
    rows = [["", "", "report", *(TITLES[mode] for mode in MODES)]]
    for scope, title in (("one", f"layer {found['layer']}"), ("all", "all layers")):
        modes = [found[scope][mode] for mode in MODES]
        report = REPORT["quantisation"][scope]

        def by_kind(m: dict[str, Any]) -> str:
            kinds = m["rounded_by_kind"]
            return f"{kinds['attn_norm']} + {kinds['ffn_norm']}"

        rows += [
            [title, "rule", NONE, *(_code(m["rules"][0]) for m in modes)],
            ["", "rows rounded", str(report["rounded"]), *(str(m["rows_rounded"]) for m in modes)],
            ["", "rows skipped", str(report["skipped"]), *(str(m["rows_skipped"]) for m in modes)],
            ["", "coverage of the rows it counts", "100 %", *(percent(m["coverage"]) for m in modes)],
            ["", "rounded at attention + FFN norm", NONE, *map(by_kind, modes)],
            [
                "",
                "coverage of the FFN norm's rows",
                NONE,
                *(f"{percent(m['ffn_coverage'])} of {m['ffn_rows_seen']}" for m in modes),
            ],
            [
                "",
                "elements rounded, changed",
                NONE,
                *(f"{_n(m['elements'])}, {_n(m['changed'])}" for m in modes),
            ],
            ["", "largest error", NONE, *(f"{m['max_abs_error']:.6f}" for m in modes)],
        ]
    return _table(rows, (2, 3, 4, 5))


# ---------------------------------------------------------------- 3

_TIMES = (("prompt", "prompt eval"), ("eval", "eval"), ("total", "total"))


def _performance(found: dict[str, Any], about: dict[str, Any]) -> str:
    configurations = found["configurations"]
    reports = dict(zip((0, 2, 3), range(3), strict=True))  # baseline, layer, all layers, report's mode
    rows = [["time", "configuration", "report", "change", "ours", "overhead", "95 % interval", "verdict"]]
    for what, title in (*_TIMES, ("throughput", "throughput")):
        theirs = REPORT["performance"]["tokens_per_second" if what == "throughput" else what]
        unit = "tokens/s" if what == "throughput" else "ms"
        for i, c in enumerate(configurations):
            figure = c["total"] if what == "throughput" else c[what]
            ours = figure["tokens_per_second"] if what == "throughput" else figure["ms"]
            row = [title if i == 0 else "", c["name"], NONE, "", f"{ours:,.2f} {unit}", "", "", ""]
            if i in reports:
                row[2] = f"{theirs[reports[i]]:,.2f} {unit}"
                row[3] = change(theirs[reports[i]], theirs[0]) if i else ""
            if figure["overhead"] is not None:
                more, ends = figure["overhead"], figure["overhead_ci95"]
                if what == "throughput":
                    more, ends = 1 / (1 + more) - 1, [1 / (1 + end) - 1 for end in reversed(ends)]
                row[5] = f"{100 * more:+.2f} %"
                row[6] = " to ".join(f"{100 * end:+.2f}" for end in ends) + " %"
                row[7] = verdict(figure)
            rows.append(row)
    lines = [
        _table(rows, (2, 3, 4, 5, 6)),
        f"{found['rounds']} rounds, {found['warm_up']} before them dropped.",
    ]
    if found["rounds"] < ENOUGH_ROUNDS:
        lines[-1] += f" Fewer than {ENOUGH_ROUNDS}: the intervals are narrower than they should be."
    text = control_text(next(c for c in configurations if c["name"] == CONTROL))
    lines.append(text[0].upper() + text[1:] + ".")
    return "\n\n".join(lines)


# ---------------------------------------------------------------- 4


def _unit_test(found: list[dict[str, Any]]) -> list[str]:
    def cell(figures: dict[str, str]) -> str:
        return f"{figures['result']} (diff: {figures['difference']})"

    rows = [
        ["value", "report", *(f"ours, `{fmt}`" for fmt in ROUNDINGS.values()), "the report's agrees with"]
    ]
    for v in found:
        agrees = ", ".join(v["report_agrees_with"]) or "neither"
        rows.append([v["value"], cell(v["report"]), *(cell(v[name]) for name in ROUNDINGS), agrees])
    both = sum(len(v["report_agrees_with"]) == len(ROUNDINGS) for v in found)
    texts = [f"{both} of the five values come out the same under both rules."]
    texts += [why.unit_value(v) for v in found if v["report_agrees_with"] == ["truncate"]]
    return [_table(rows, (0, 1, 2, 3)), prose(" ".join(texts))]


# ---------------------------------------------------------------- 5


def _span(ends: list[float]) -> str:
    return f"{ends[0]:.6f}" if ends[0] == ends[1] else f"{ends[0]:.6f} to {ends[1]:.6f}"


def _differences(found: dict[str, Any], about: dict[str, Any]) -> str:
    rows = [["prompt", "element", *(TITLES[mode] for mode in MODES)]]
    for element in ("first", "last"):
        ends = REPORT[f"{element}_difference"]
        rows.append(["the report's" if element == "first" else "", element, _span(ends), "", ""])
    for run in found["runs"]:
        prompt = f"{run['prompt']}, {run['n_tokens']} tokens"
        for i, element in enumerate(("first", "last")):
            cells = [_span(run["modes"][mode][element]) for mode in MODES]
            n = run["modes"]["right"]["rows"]
            cells[-1] += f" ({n} rows)"
            rows.append([prompt if i == 0 else "", element, *cells])
    return f"{_table(rows, (2, 3, 4))}\n\n{prose(why.differences(found))}"


# ---------------------------------------------------------------- 6


def _generation(found: dict[str, Any], about: dict[str, Any]) -> str:
    streams = found["streams"]
    rows = [
        ["", "text", "tokens", "same tokens as the baseline", "mean KL, largest KL along the baseline's text"]
    ]
    rows.append(["report, all layers", _code(REPORT["answer"]), NONE, "not compared", NONE])
    for mode, stream in streams.items():
        row = [TITLES.get(mode, mode), _code(stream["text"]), str(len(stream["tokens"])), "", ""]
        if "mean_kld" in stream:
            row[3] = "yes" if stream["same_tokens"] else "no"
            row[4] = f"{stream['mean_kld']:.3e}, {stream['max_kld']:.3e}"
        rows.append(row)
    noise = " Random weights: the text is noise." if about["random_weights"] else ""
    load = f'Prompt "{found["prompt"]}", {found["n_prompt"]} tokens, then {found["n"]}, each the likeliest.'
    return f"{_table(rows, (2, 4))}\n\n{load}{noise}"


# ---------------------------------------------------------------- 7


def _perplexity(found: dict[str, Any], about: dict[str, Any]) -> str:
    rows = [["", "report", "ours, baseline", *(TITLES[mode] for mode in ("report", "right"))]]
    modes = [found[mode]["comparison"] for mode in ("report", "right")]
    counts = [found[mode]["counts"] for mode in ("report", "right")]
    base = modes[0]

    def ci(ends: Any, form: str) -> str:
        return NONE if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"

    rows += [
        [
            "FFN norm rows rounded",
            NONE,
            "0",
            *(f"{_n(c['rounded_by_kind']['ffn_norm'])} of {_n(c['ffn_rows_seen'])}" for c in counts),
        ],
        [
            "attention norm rows rounded",
            NONE,
            "0",
            *(_n(c["rounded_by_kind"]["attn_norm"]) for c in counts),
        ],
        [
            "PPL",
            "not measured",
            f"{base['ppl_base']:.4f}",
            *(f"{m['ppl_quant']:.4f}" for m in modes),
        ],
        [
            "95 % over chunks",
            NONE,
            ci(base["ppl_base_ci95_chunks"], ".2f"),
            *(ci(m["ppl_quant_ci95_chunks"], ".2f") for m in modes),
        ],
        [
            "mean ln(PPL ratio)",
            NONE,
            "",
            *(f"{m['ln_ppl_ratio']:+.3e}" for m in modes),
        ],
        ["95 % over chunks", NONE, "", *(ci(m["ln_ppl_ratio_ci95_chunks"], "+.2e") for m in modes)],
        ["mean KL", NONE, "", *(f"{m['mean_kld']:.3e}" for m in modes)],
        ["95 % over chunks", NONE, "", *(ci(m["mean_kld_ci95_chunks"], ".2e") for m in modes)],
        ["median KL, largest KL", NONE, "", *(f"{m['median_kld']:.3e}, {m['max_kld']:.3e}" for m in modes)],
        ["same top token", NONE, "", *(percent(m["same_top"], 3) for m in modes)],
    ]
    k = found["control"]
    exactly = (
        "exactly 0, as it must be" if k["exactly_zero"] else "NOT 0: the figures above cannot be trusted"
    )
    texts = [
        f"{found['n_chunks']} chunks of {found['n_ctx']} tokens, {_n(found['n_scored'])} tokens scored.",
        f"Control, the baseline against itself: mean ln(PPL ratio) {k['ln_ppl_ratio']:g}, largest KL "
        f"{k['max_kld']:g}, same top token {100 * k['same_top']:g} %: {exactly}.",
        why.perplexity(found),
    ]
    if about["random_weights"]:
        texts.append("Random weights: what these figures show is that the control is 0, and no more.")
    return f"{_table(rows, (1, 2, 3, 4))}\n\n{prose(' '.join(texts))}"
