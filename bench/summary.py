"""The figures that matter of each processor's tables in bench/results, a line for each processor."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SMOLLM2, TINYLLAMA = "SmolLM2", "tinyllama"
# (heading, model, pattern of what the row is of): of peers.md, fq / llama.cpp by 1 and by 2 threads
PEERS = (
    ("SmolLM2: prompt", SMOLLM2, "prompt of 512, "),
    ("decode", SMOLLM2, "decode, 32 after 16, "),
    ("perplexity", SMOLLM2, r"perplexity, .*, whole process, tok/s"),
    ("on F32", SMOLLM2, r"perplexity, .*, llama.cpp on F32"),
    ("time of `run -n 5`", SMOLLM2, "run -n 5, whole process, s"),
    ("TinyLlama's shape: prompt", TINYLLAMA, "prompt of 512, "),
    ("decode", TINYLLAMA, "decode, 32 after 16, "),
)
# (heading, what the row is of): of kernels.md, in L2
KERNELS = (
    ("rms_norm / ggml", "rms_norm, ggml's time over ours"),
    ("time with bf16 in it", "rms_norm with bf16 fused in, time over that without"),
)
MADE = re.compile(r", (\d{4}-\d\d-\d\d) <!-- \w+ -->")


def rows(path: Path) -> Iterator[list[str]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("| "):
                yield [cell.strip() for cell in line.strip("| ").split("|")]


def figure(cell: str) -> str:
    """The median of a cell that has its quartiles, too."""
    return cell.partition(" (")[0]


def line(folder: Path) -> list[str]:
    peers, kernels = list(rows(folder / "peers.md")), list(rows(folder / "kernels.md"))
    cells = [f"[{folder.name}]({RESULTS.name}/{folder.name}/)"]
    for _, model, what in PEERS:
        found = [row for row in peers if row[0].startswith(model) and re.match(what, row[1])]
        cells.append(" / ".join(figure(row[5]) for row in sorted(found, key=lambda row: int(row[2]))))
    for _, what in KERNELS:
        cells.append(" / ".join(figure(row[2]) for row in kernels if row[:2] == [what, "L2"]))
    made = [date for path in folder.glob("*.md") for date in MADE.findall(path.read_text(encoding="utf-8"))]
    return [*cells, max(made, default="")]


def main() -> int:
    head = ["processor, set", *(column[0] for column in PEERS + KERNELS), "last made"]
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    table = [head, ["---", *["--:"] * (len(head) - 1)], *map(line, folders)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
