"""What each format costs in one place of the model: mean KL divergence from the model unrounded.

Every chunk of the text is evaluated once unrounded and then once per format, and compared token by
token. Beside the formats: the control, which must be exactly 0, and the deployed path, which rounds
no norm but the input of every matrix product, as ggml does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fq import FqError, Model, Stream, Streams, find
from fq.commands.files import check_outputs, write
from fq.commands.progress import by_chunk
from fq.commands.show import chunks_text
from fq.gguf.cache import location
from fq.machine import default_threads, package_version
from fq.measure.chunks import ORDERS as CHUNK_ORDERS
from fq.measure.statistics import is_exactly_zero
from fq_kernels import Executor, describe_formats, get_format, isa
from fq_kernels.rules import FakeQuant, RowStat, Rule

SITES = "ffn_norm[*].raw"
# beside every name: other roundings, and where the scale comes from
OPTIONS = (
    "bf16:nearest-even-ftz", "bf16:truncate", "bf16:nearest-away", "bf16:stochastic", "bf16:odd",
    "tf32:truncate", "fp8_e4m3fn:truncate", "fp8_e4m3fn:stochastic", "fp8_e4m3fn:odd",
    "fp8_e4m3fn:row", "fp8_e4m3fn:tensor", "fp8_e4m3fn:group=128", "fp4_e2m1:group=16",
    "q8_0:nearest-even", "q8_1:nearest-even",
    "int8:tensor", "int8:group=32", "int8:asymmetric", "int8:asymmetric,group=32",
    "int4:tensor", "int4:group=32", "int4:asymmetric", "int4:asymmetric,group=32",
    "mxfp8_e4m3:rceil", "mxfp6_e2m3:rceil", "mxfp4:rceil", "mxfp4:even", "mxfp4:ceil", "mxfp4:block=16",
    "mxfp4:had=32", "int4:group=32,had=32", "nvfp4:row", "nvfp4:four-over-six", "nvfp4:had=16",
)  # fmt: skip
CONTROL, DEPLOYED = "control", "deployed path"

# From the finest to the coarsest: each must cost more than the one before it.
ORDERS = (
    ("f16", "bf16", "fp8_e4m3fn", "fp8_e5m2", "fp4_e2m1"),
    ("tf32", "tf32:truncate", "bf16"),
    ("int8:group=32", "int8", "int8:tensor"),
    ("int8:group=32", "int4:group=32", "int4"),
    ("q8_0", "q5_0", "q4_0"),
    ("mxint8", "mxfp8_e4m3", "mxfp8_e5m2"),
    ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"),
    ("nvfp4:row", "mxfp4"),
)
# Truncation's error has four times the energy, and one sign.
TRUNCATED = (("bf16:truncate", "bf16"), ("tf32:truncate", "tf32"))
SEVERAL = 2.5

COLUMNS = ("format", "bits", "mean KL", "95 % over chunks", "ln(PPL ratio)", "same top, %")
COLUMNS += ("SQNR, dB", "out of range")


def names() -> list[str]:
    """Of all formats that have a sign, each with its default rounding."""
    return [entry["name"] for entry in describe_formats() if entry["name"] != "e8m0"]


def streams(model: Model, formats: Sequence[str], sites: str = SITES) -> list[Stream]:
    """The control, the deployed path, and a stream for each format. Raises ValueError for a bad rule."""
    rounded = [Stream(fmt, FakeQuant(model.values, Rule.parse(f"{sites}={fmt}"))) for fmt in formats]
    return [Stream(CONTROL), Stream(DEPLOYED, activations="ggml"), *rounded]


def rows_of(run: Streams) -> list[dict[str, Any]]:
    """A dict for each stream, as written to JSON, in the order of mean KL divergence."""
    rows = []
    for stream, result in zip(run.streams, run.result()["streams"], strict=True):
        row: dict[str, Any] = {"name": stream.name, "bits_per_value": None, "sqnr_db": None}
        row |= {"out_of_range": None, "comparison": result["comparison"]}
        if stream.fake_quant is not None:
            counters = stream.fake_quant.matched
            totals = np.sum([c.totals for c in counters], axis=0)
            signal, noise = totals[RowStat.SUM_SQ_VALUE], totals[RowStat.SUM_SQ_ERROR]
            row["bits_per_value"] = get_format(stream.name).bits_per_value
            row["sqnr_db"] = 10 * math.log10(signal / noise) if noise > 0 else None
            row["out_of_range"] = int(totals[RowStat.OUT_OF_RANGE])
            row["elements"] = sum(c.elements for c in counters)
        rows.append(row)
    return sorted(rows, key=lambda row: row["comparison"]["mean_kld"])


def checks(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What must be so, of what was measured, and whether it is."""
    found = {row["name"]: row["comparison"] for row in rows}
    kld = {name: comparison["mean_kld"] for name, comparison in found.items()}
    done = [("the control is exactly 0", is_exactly_zero(found[CONTROL]))]
    for order in ORDERS:
        there = [name for name in order if name in kld]
        if len(there) > 1:
            holds = all(kld[a] < kld[b] for a, b in pairwise(there))
            done.append((" < ".join(there), holds))
    for truncated, nearest in TRUNCATED:
        if truncated in kld and nearest in kld:
            ratio = kld[truncated] / kld[nearest] if kld[nearest] else math.inf
            done.append((f"{truncated} costs {ratio:.1f} times what {nearest} does", ratio > SEVERAL))
    return done


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(COLUMNS), ["---", *["--:"] * (len(COLUMNS) - 1)]]
    for row in rows:
        c = row["comparison"]
        name = row["name"] if row["bits_per_value"] is None else f"`{row['name']}`"
        ci = c["mean_kld_ci95_chunks"]
        zero = is_exactly_zero(c)
        lines.append(
            [
                name,
                _figure(row["bits_per_value"], "g"),
                "0" if zero else f"{c['mean_kld']:.3e}",
                "" if zero or ci is None else f"{ci[0]:.2e} to {ci[1]:.2e}",
                "0" if zero else f"{c['ln_ppl_ratio']:+.2e}",
                f"{100 * c['same_top']:.2f}",
                _figure(row["sqnr_db"], ".1f"),
                _figure(row["out_of_range"], "d"),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(data: dict[str, Any]) -> str:
    about = [
        f"command: `{data['command']}`",
        f"model: {os.path.basename(data['model'])}",
        f"text: {data['text']}, {data['n_tokens']} tokens",
        chunks_text(data),
        f"PPL of the baseline: {data['ppl_base']:.4f}",
        f"numerics: {data['numerics']}",
        *(f"{text}: {'holds' if holds else 'DOES NOT HOLD'}" for text, holds in data["checks"]),
    ]
    return "".join(f"- {line}\n" for line in about) + "\n" + table(data["formats"]) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.formats", description=__doc__)
    parser.add_argument("-m", "--model", default="smollm2", help="GGUF file or alias (default: %(default)s)")
    parser.add_argument("-f", "--file", type=Path, required=True, help="text, UTF-8")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N", help="tokens per chunk")
    parser.add_argument(
        "--chunks", type=int, default=8, metavar="N", help="-1 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--chunk-order", choices=CHUNK_ORDERS, default="random", help="as of fq perplexity (default: random)"
    )
    parser.add_argument("--chunk-seed", type=int, metavar="N", help="of the random order (default: 0)")
    parser.add_argument(
        "--sites", default=SITES, help="which norms, as in --fake-quant (default: %(default)s)"
    )
    parser.add_argument("--format", action="append", help="a format; may be repeated (default: all)")
    parser.add_argument("-t", "--threads", type=int, default=default_threads(), metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write all figures there; - for stdout, alone")
    args = parser.parse_args(argv)
    try:
        inputs = {"the model": location(args.model), "the text": args.file}
        check_outputs({"--json": args.json}, inputs)
    except FqError as e:
        parser.error(str(e))
    return args


def command(args: argparse.Namespace) -> str:
    """What gives these figures, without the folders of this machine."""
    words = ["python", "-m", "bench.formats", "-f", args.file.name, "--chunks", str(args.chunks)]
    if args.model != "smollm2":
        words += ["-m", os.path.basename(args.model)]
    if args.ctx_size != 512:
        words += ["-c", str(args.ctx_size)]
    if args.chunk_order != "random":
        words += ["--chunk-order", args.chunk_order]
    if args.chunk_seed is not None:
        words += ["--chunk-seed", str(args.chunk_seed)]
    if args.sites != SITES:
        words += ["--sites", args.sites]
    for fmt in args.format or []:
        words += ["--format", fmt]
    return shlex.join(words)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Raises FqError, ValueError or OSError for bad input."""
    formats = [str(get_format(f)) for f in args.format or (*names(), *OPTIONS)]
    model = Model(find(args.model))
    tokens = model.tokenizer.encode(args.file.read_text(encoding="utf-8"))
    with Executor(args.threads) as executor:
        run = Streams(
            model,
            tokens,
            streams(model, list(dict.fromkeys(formats)), args.sites),
            n_ctx=args.ctx_size,
            chunks=args.chunks,
            chunk_order=args.chunk_order,
            chunk_seed=args.chunk_seed,
            executor=executor,
        )
        try:
            for _ in by_chunk(run):
                pass
        except KeyboardInterrupt:
            if not run.done:
                raise
    rows = rows_of(run)
    result = run.result()
    del result["streams"]
    numpy = package_version("numpy")
    return {
        **result,
        "text": args.file.name,
        "command": command(args),
        "numerics": f"{isa()}, {args.threads} threads, numpy {numpy}; "
        f"exact activations, but for the {DEPLOYED}",
        "formats": rows,
        "checks": checks(rows),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        data = measure(args)
        if args.json:
            text = json.dumps(data, indent=1)
            print(text) if args.json == "-" else write(text + "\n", args.json)
        if args.json != "-":
            print(markdown(data))
    except (FqError, ValueError, OSError) as e:
        print(f"bench.formats: {e}", file=sys.stderr)
        return 2
    return 0 if all(holds for _, holds in data["checks"]) and not data["partial"] else 1


if __name__ == "__main__":
    sys.exit(main())
