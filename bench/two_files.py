"""What one file costs beside another: fq's figures, and llama-perplexity's on the same files and chunks.

Of a model its float32 twin is made, and the twin's Q8_0. The file beside its twin must be exactly 0; Q8_0
beside the twin, with exact activations and with ggml's on its side; then llama-perplexity's --kl-divergence,
whose baseline is in 16 bits: its comparison of the twin with itself is its floor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fq import find
from fq.machine import processor
from fq_kernels import isa

from .peers.f32 import write_f32, write_q8_0


def ours(model: Path, base: Path, text: str, chunks: int, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fq", "perplexity", "-m", model, "--base-model", base, "-f", text]
    command += ["--chunks", chunks, "--chunk-order", "first", *options, "--json", "-"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)["comparison"]
    return found


def theirs(program: str, text: str, chunks: int, base: Path, models: Sequence[Path]) -> list[str]:
    """Mean KLD of each beside the first, as it is printed."""
    common = [
        program,
        "-f",
        text,
        "-c",
        "512",
        "--chunks",
        str(chunks),
        "-t",
        "2",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
    ]
    common += ["-fa", "off", "--kl-divergence-base", str(base)]
    subprocess.run([*common, "-m", str(models[0])], check=True, capture_output=True)
    found = []
    for model in models:
        done = subprocess.run(
            [*common, "-m", str(model), "--kl-divergence"], check=True, capture_output=True, text=True
        )
        line = re.search(r"Mean\s+KLD:\s*(\S+)\s*±\s*(\S+)", done.stdout + done.stderr)
        assert line, done.stdout
        found.append(f"{float(line[1]):.3e} ± {float(line[2]):.1e}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.two_files", description=__doc__)
    parser.add_argument("-m", "--model", default="smollm2", metavar="MODEL")
    parser.add_argument("-f", "--file", required=True, metavar="FILE")
    parser.add_argument("--chunks", type=int, default=8, metavar="N")
    parser.add_argument(
        "--llama-perplexity", metavar="PROGRAM", help="llama.cpp's (default: fq's figures alone)"
    )
    args = parser.parse_args(argv)
    model, rows = Path(find(args.model)), []
    with tempfile.TemporaryDirectory() as name:
        twin, q8_0 = Path(name, "f32.gguf"), Path(name, "q8_0.gguf")
        write_f32(model, twin)
        write_q8_0(twin, q8_0)
        same = ours(model, twin, args.file, args.chunks)
        exact = ours(q8_0, twin, args.file, args.chunks)
        ggml = ours(
            q8_0, twin, args.file, args.chunks, "--activations", "ggml", "--baseline-activations", "exact"
        )
        for what, c in (
            (f"fq: {model.name} beside its F32 twin", same),
            ("fq: Q8_0 beside the twin", exact),
            ("fq: the same, ggml's activations in Q8_0", ggml),
        ):
            ends = c["mean_kld_ci95_chunks"]
            interval = f"{ends[0]:.3e} to {ends[1]:.3e}" if ends else ""
            rows.append((what, f"{c['mean_kld']:.3e}" if c["mean_kld"] else "0", interval))
        if args.llama_perplexity:
            found = theirs(
                args.llama_perplexity, args.file, args.chunks, Path(name, "base.kld"), [twin, q8_0]
            )
            rows.append(("llama-perplexity: the twin beside itself, its floor", found[0], ""))
            rows.append(("llama-perplexity: Q8_0 beside the twin", found[1], ""))
    print(f"{processor()}, {isa()}; {args.chunks} chunks of 512\n")
    print("| | mean KL divergence | 95 % over chunks |\n| --- | --: | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return int(same["max_kld"] != 0)


if __name__ == "__main__":
    sys.exit(main())
