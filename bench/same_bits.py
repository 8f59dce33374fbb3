"""Whether `fq perplexity --json` is the same, byte for byte, whatever computes it.

Runs the command on each model with each instruction set, number of threads and batch size, and compares what
it writes but for its seconds, its instruction set and its number of threads. The last column is the first 12
digits of the SHA-256: of other machines, too, it must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fq import FqError, find, machine
from fq_kernels import supported_isas

MACHINES_OWN = ("isa", "threads")  # of a result's numerics


class Case(NamedTuple):
    model: str
    isa: str
    threads: int
    batch: int
    chunks: int


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits", description=__doc__)
    parser.add_argument(
        "-m", "--model", action="append", metavar="FILE", help="may be repeated (default: smollm2)"
    )
    parser.add_argument("-f", "--file", metavar="TEXT", help="default: the sample text of the package")
    parser.add_argument("--fake-quant", default="ffn_norm=bf16", metavar="RULE", help="default: %(default)s")
    parser.add_argument("--chunks", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--isa", nargs="+", metavar="NAME", help="default: all that this machine has")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2, 3, 7], metavar="N", help="default: 1 2 3 7"
    )
    parser.add_argument(
        "-b", "--batch-size", type=int, nargs="+", default=[5, 64, 512], metavar="N", help="default: 5 64 512"
    )
    args = parser.parse_args(argv)
    args.model = args.model or ["smollm2"]
    args.isa = args.isa or supported_isas()
    if unknown := set(args.isa) - set(supported_isas()):
        parser.error(f"this machine has {', '.join(supported_isas())}, not {', '.join(sorted(unknown))}")
    return args


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """All combinations of the vector sets; of others, which take minutes, one with one chunk."""
    for model in args.model:
        for isa in args.isa:
            if isa in ("scalar", "sse2"):
                yield Case(model, isa, max(args.threads), max(args.batch_size), 1)
                continue
            for threads in args.threads:
                for batch in args.batch_size:
                    yield Case(model, isa, threads, batch, args.chunks)
            yield Case(model, isa, max(args.threads), max(args.batch_size), 1)


def digest(case: Case, args: argparse.Namespace) -> str:
    """Raises CalledProcessError where the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "fq", "perplexity", f"--model={find(case.model)}"]
        command += [
            f"--fake-quant={args.fake_quant}",
            f"--ctx-size={args.ctx_size}",
            f"--chunks={case.chunks}",
        ]
        command += [f"--threads={case.threads}", f"--batch-size={case.batch}", f"--json={path}"]
        command += [] if args.file is None else [f"--file={args.file}"]
        environment = os.environ | {"FQ_KERNELS_ISA": case.isa}
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        result = json.loads(path.read_text())
    del result["schema"], result["seconds"]
    for name in ("model", "text"):
        result[name] = os.path.basename(result[name])
    result["numerics"] = {k: v for k, v in result["numerics"].items() if k not in MACHINES_OWN}
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()[:12]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    found: dict[tuple[str, int], set[str]] = {}
    print(f"{machine.processor()}\n\n| model | set | threads | batch | chunks | SHA-256 |")
    print("| --- | --- | --: | --: | --: | --- |")
    try:
        for case in cases(args):
            of = digest(case, args)
            found.setdefault((case.model, case.chunks), set()).add(of)
            print("|", " | ".join(map(str, (*case, of))), "|", flush=True)
    except subprocess.CalledProcessError as e:
        print(f"bench.same_bits: {e.stderr.strip() or e}", file=sys.stderr)
        return 2
    except FqError as e:
        print(f"bench.same_bits: {e}", file=sys.stderr)
        return 2
    unlike = [f"{model}, {chunks} chunks" for (model, chunks), of in found.items() if len(of) > 1]
    print(f"\n{'not the same: ' + '; '.join(unlike) if unlike else 'the same in all'}")
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
