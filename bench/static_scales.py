"""Static scales beside those that a format takes from the values it rounds: mean KL divergence.

Each model is calibrated on the sample text of the package, and measured on another: every FFN norm after
its weight, in int8 and fp8_e4m3fn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fq import FqError, Model, Stream, Streams, find
from fq.commands.files import SAMPLE_TEXT, text_sha256
from fq.commands.progress import by_chunk
from fq.commands.show import chunks_text
from fq.machine import default_threads
from fq.measure.calibration import PER, Calibrating, Method
from fq.measure.chunks import Settings
from fq.measure.statistics import summarise
from fq_kernels import Executor
from fq_kernels.rules import FakeQuant, RowStat

SITES = "ffn_norm[*].weighted"
FORMATS = ("int8", "fp8_e4m3fn")
# what it is rounded to without a static scale, and where its scale comes from then
DYNAMIC = {
    "int8": {"int8": "of the row", "int8:tensor": "of the chunk's rows"},
    "fp8_e4m3fn": {"fp8_e4m3fn": "none"},
}
METHODS = ("largest", "percentile=99.9", "mse=FORMAT")
CALIBRATION_CHUNKS = 8


def calibrate(model: Model, method: str, per: str, executor: Executor, n_ctx: int) -> dict[str, Any]:
    text = SAMPLE_TEXT.read_text(encoding="utf-8")
    settings = Settings(n_ctx=n_ctx, chunks=CALIBRATION_CHUNKS)
    tokens = model.tokenizer.encode(text)
    run = Calibrating(
        model, tokens, [SITES], method=Method.parse(method), per=per, executor=executor, settings=settings
    )
    for _ in run:
        pass
    return run.result("sample text of the package", text_sha256(text), "")


def streams_of(
    model: Model, formats: Sequence[str], executor: Executor, n_ctx: int, folder: Path
) -> list[Stream]:
    """Named by scale and format; the files of static scales go into the folder."""
    streams = []
    for fmt in formats:
        for spec, of in DYNAMIC[fmt].items():
            streams.append(Stream(f"{fmt}|{of}|", FakeQuant(model.values, f"{SITES}={spec}")))
        for method in METHODS:
            chosen = method.replace("FORMAT", fmt)
            for per in PER:
                file = folder / f"{fmt}-{method}-{per}.json"
                file.write_text(json.dumps(calibrate(model, chosen, per, executor, n_ctx)))
                rules = FakeQuant(model.values, f"{SITES}={fmt}:scale=@{file}")
                streams.append(Stream(f"{fmt}|static, per {per}|{method.partition('=FORMAT')[0]}", rules))
    return streams


def table(run: Streams) -> str:
    lines = [
        "| format | scale | method | mean KL | 95 % over chunks | ln(PPL ratio) | out of range |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for i, stream in enumerate(run.streams):
        c = summarise(run.paired_of(i))
        fmt, scale, method = stream.name.split("|")
        ci = c["mean_kld_ci95_chunks"]
        assert stream.fake_quant is not None
        cut = int(sum(counter.totals[RowStat.OUT_OF_RANGE] for counter in stream.fake_quant.matched))
        interval = f"{ci[0]:.2e} to {ci[1]:.2e}" if ci else ""
        lines.append(
            f"| `{fmt}` | {scale} | {method} | {c['mean_kld']:.3e} | {interval} | {c['ln_ppl_ratio']:+.2e} "
            f"| {cut} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static_scales", description=__doc__)
    parser.add_argument(
        "-m", "--model", action="append", metavar="FILE", help="may be repeated (default: smollm2)"
    )
    parser.add_argument("-f", "--file", metavar="TEXT", required=True, help="what is measured on")
    parser.add_argument("--format", action="append", choices=FORMATS, help="(default: all)")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with Executor(default_threads()) as executor, tempfile.TemporaryDirectory() as folder:
        for name in args.model or ["smollm2"]:
            model = Model(find(name))
            streams = streams_of(model, args.format or FORMATS, executor, args.ctx_size, Path(folder))
            tokens = model.tokenizer.encode(Path(args.file).read_text(encoding="utf-8"))
            settings = Settings(n_ctx=args.ctx_size, chunks=args.chunks)
            run = Streams(model, tokens, streams, executor=executor, settings=settings)
            for _ in by_chunk(run):
                pass
            print(
                f"{os.path.basename(model.path)}, {os.path.basename(args.file)}, {chunks_text(run.about())}\n"
            )
            print(table(run), flush=True)
            print()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FqError as e:
        sys.exit(f"bench.static_scales: error: {e}")
