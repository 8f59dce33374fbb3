"""fq against llama.cpp on the same GGUF files, in turns: prompt, decode, perplexity, cold start, memory.

Both evaluate the same tokens with the same number of threads; a ratio is the median of the ratios
within pairs of turns. bench/peers/README.md says how llama.cpp is built and what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fq import FqError, find, machine
from fq.commands.files import check_outputs, write
from fq.gguf.cache import cache_folder, location

from . import llama, measure
from .measure import Row
from .table import cells, markdown

PARTS = ("speed", "perplexity", "cold-start")
SETTINGS = (
    "llama.cpp: its library's defaults (F16 KV cache, flash attention auto, weights repacked), "
    "but for what a row says"
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument(
        "--llama-python",
        required=True,
        metavar="PATH",
        help="the Python that has llama-cpp-python installed",
    )
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        metavar="FILE",
        help="GGUF file or alias; may be repeated (default: smollm2 and tinyllama-shape)",
    )
    parser.add_argument(
        "-f", "--file", type=Path, metavar="TEXT", help="UTF-8 text of the perplexity, left out without it"
    )
    parser.add_argument(
        "--perplexity-model", metavar="FILE", default="smollm2", help="its model (default: %(default)s)"
    )
    parser.add_argument(
        "--chunks", type=int, default=6, metavar="N", help="of the text (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument(
        "--perplexity-threads", type=int, nargs="+", default=[2], metavar="N", help="default: 2"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="pairs of turns, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=4,
        metavar="S",
        help=f"after which a row has no further pair, if it has {measure.MIN_ROUNDS} (default: %(default)s)",
    )
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="a part; may be repeated (default: all)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    args = parser.parse_args(argv)
    for name in ("threads", "perplexity_threads", "rounds", "chunks"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.only and "perplexity" in args.only and args.file is None:
        parser.error("--only perplexity needs a text: -f TEXT")
    try:
        inputs = {f"the model {name}": location(name) for name in (*models(args), args.perplexity_model)}
        check_outputs({"--json": args.json}, inputs | {"the text": args.file, "the F32 model": f32_of(args)})
    except FqError as e:
        parser.error(str(e))
    return args


def models(args: argparse.Namespace) -> list[str]:
    return args.model or ["smollm2", "tinyllama-shape"]


def f32_of(args: argparse.Namespace) -> Path:
    """The cached file with the values of the perplexity's model."""
    return cache_folder() / f"{location(args.perplexity_model).stem}.F32.gguf"


def rows(args: argparse.Namespace, peer: llama.LlamaCpp) -> Iterator[Row]:
    """Raises FqError or OSError for bad input."""
    parts = args.only or PARTS
    rounds = measure.Rounds(args.rounds, args.seconds)
    for model in [Path(find(name)) for name in models(args)]:
        for threads in args.threads:
            if "speed" in parts:
                yield from measure.speed(model, peer, threads, rounds)
            if "cold-start" in parts:
                yield from measure.cold_start(model, peer, threads, rounds)
    if "perplexity" in parts and args.file is not None:
        args.file.open().close()  # found out before the work
        model = Path(find(args.perplexity_model))
        f32 = f32_of(args)
        if not f32.exists():
            from .f32 import write_f32

            write_f32(model, f32)
        for threads in args.perplexity_threads:
            yield from measure.perplexity(model, f32, args.file, peer, threads, args.chunks, rounds)


def command(argv: list[str]) -> str:
    """What gives these figures, without the folders of this machine."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in argv]
    return shlex.join(["python", "-m", "bench.peers", *words])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            peer = llama.find(args.llama_python, Path(folder))
            about = {"command": f"`{command(sys.argv[1:] if argv is None else argv)}`"}
            about |= machine.describe("fq", "numpy")
            about |= {"llama.cpp": peer.about, "settings": SETTINGS}
            found = []
            for row in rows(args, peer):
                found.append(row)
                print(" | ".join(cells(row)), file=sys.stderr, flush=True)
        text = markdown(about, found)
        print(text)
        if args.json:
            data = {"machine": about, "rows": [row.as_json() for row in found]}
            write(json.dumps(data, indent=1) + "\n", args.json)
    except (FqError, ValueError, OSError) as e:
        print(f"bench.peers: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if all(row.holds is not False for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
