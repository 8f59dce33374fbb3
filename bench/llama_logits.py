"""llama.cpp's own logits of the tests' tiny files, which tests/arch holds fq to.

    python -m bench.llama_logits --llama-python llama/bin/python granite

writes the entries of these names into tests/arch/llama_cpp_logits.json; without a name nothing is written,
and all that are there are compared with what llama.cpp computes now. PYTHON is one with llama-cpp-python
(bench/peers/README.md). For an architecture with a GELU it must have been built to compute that by its
formula: llama.cpp's own is a table of float16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from tiny_models import TINY, some_tokens, write_tiny

KEPT = Path(__file__).parents[1] / "tests/arch/llama_cpp_logits.json"
CONTEXTS = 200, 300  # below and above what RoPE's long factors are for
N_TOKENS, ROWS, COLUMNS = 40, (11, 39), 8

# Arguments: the file, the length of context, the tokens as JSON. Prints the logits of each token as JSON.
_PEER = """
import json, sys
import llama_cpp
path, n_ctx, tokens = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=n_ctx, n_batch=64, n_threads=1, logits_all=True, verbose=False,
                        type_k=0, type_v=0, flash_attn=False)
model.eval(tokens)
print(json.dumps(model.scores[: len(tokens)].tolist()))
"""


def logits_of(python: str, name: str, folder: Path) -> dict[str, Any]:
    """The entry of a tiny file: of each context the largest logit, and the first ones of some tokens."""
    path = write_tiny(folder / f"{name}.gguf", TINY[name])
    entry = {}
    for n_ctx in CONTEXTS:
        command = [python, "-c", _PEER, str(path), str(n_ctx), json.dumps(some_tokens(N_TOKENS).tolist())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"bench.llama_logits: {name}: {done.stderr.strip()[-500:]}")
        rows = json.loads(done.stdout)
        largest = max(abs(logit) for row in rows for logit in row)
        found = {str(row): [_short(logit) for logit in rows[row][:COLUMNS]] for row in ROWS}
        entry[str(n_ctx)] = {"largest": _short(largest), "rows": found}
    return entry


def _short(value: float) -> float:
    return float(f"{value:.8g}")


def difference(entry: dict[str, Any], kept: dict[str, Any]) -> float:
    """The largest of all contexts and rows, over the largest logit."""
    return max(
        abs(a - b) / of["largest"]
        for n_ctx, of in kept.items()
        for row, logits in of["rows"].items()
        for a, b in zip(logits, entry[n_ctx]["rows"][row], strict=True)
    )


def text_of(entries: dict[str, Any]) -> str:
    """A line for each context, so that a change of one shows as one."""
    blocks = []
    for name, entry in entries.items():
        lines = ",\n".join(f'  "{n_ctx}": {json.dumps(of)}' for n_ctx, of in entry.items())
        blocks.append(f' "{name}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.llama_logits", description=__doc__)
    parser.add_argument("--llama-python", required=True, metavar="PYTHON")
    parser.add_argument("name", nargs="*", choices=[[], *TINY], help="of tests/tiny_models.py")
    args = parser.parse_args(argv)
    kept = json.loads(KEPT.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for name in args.name or kept:
            entry = logits_of(args.llama_python, name, Path(folder))
            if name in kept:
                print(f"{name}: {difference(entry, kept[name]):.1e} of the largest logit from what is kept")
            if args.name:
                kept[name] = entry
    if args.name:
        KEPT.write_text(text_of({name: kept[name] for name in TINY if name in kept}), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
