"""Damaged stores: each must be one line on stderr and exit status 2, soon and in little memory; or, where
the damage is to what holds nothing, what the whole one gives.

Copies of a store that a sweep and an estimate of the tiny model are in: flipped bits, cut short, values of
other types, huge numbers, other programs' SQLite files. Each is read by `fq results check`, or by another.
"""

from __future__ import annotations

import argparse
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

SECONDS, BYTES = 1.0, 500e6
VALUES = (None, -1, 1 << 62, 1e308, float("inf"), "", "text", b"", b"\xff" * 4096, "[" * 100000, "9" * 100000)


def make(folder: Path) -> Path:
    from fq.gguf.synthetic import tiny_shape, write_llama_gguf

    model, path = folder / "tiny.gguf", folder / "store.sqlite"
    write_llama_gguf(model, tiny_shape())
    common = ["-m", model, "-c", "64", "--chunks", "4", "--store", path]
    for command in (["sweep", *common], ["sensitivity", *common, "--verify", "4", "--sites", "l_out"]):
        subprocess.run(
            [sys.executable, "-m", "fq", *map(str, command)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("PRAGMA journal_mode = DELETE")
    return path


def flipped(data: bytes, rng: random.Random, path: Path) -> None:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 8, 64])):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)


def cut_short(data: bytes, rng: random.Random, path: Path) -> None:
    path.write_bytes(data[: rng.randrange(1, len(data))])


def other_value(data: bytes, rng: random.Random, path: Path) -> None:
    path.write_bytes(data)
    with sqlite3.connect(path) as db:
        table = rng.choice(["runs", "chunks", "baselines", "estimates", "count_columns"])
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        (rowid,) = rng.choice(db.execute(f"SELECT rowid FROM {table}").fetchall())
        try:
            db.execute(
                f"UPDATE {table} SET {rng.choice(columns)} = ? WHERE rowid = ?", (rng.choice(VALUES), rowid)
            )
        except sqlite3.Error:  # a column that takes no such value
            flipped(data, rng, path)


def another_programs(data: bytes, rng: random.Random, path: Path) -> None:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE " + rng.choice(["bookmarks", "runs", "chunks"]) + " (id INTEGER, data BLOB)")
        db.execute(f"PRAGMA user_version = {rng.choice([0, 1, 2, 5, 77])}")


KINDS = {
    "flipped bits": flipped,
    "cut short": cut_short,
    "other values": other_value,
    "another program's": another_programs,
}


def read(path: Path, *words: str) -> tuple[int, str, str, float, int]:
    """Exit status, stdout, stderr, seconds, bytes."""
    program = [sys.executable, "-m", "fq", "results", *words, "--store", str(path)]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(program, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return os.waitstatus_to_exitcode(status), *texts, seconds, used.ru_maxrss * 1024


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.damaged_stores", description=__doc__)
    parser.add_argument("-n", type=int, default=200, metavar="N", help="stores (default %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = make(folder)
        pristine, path = whole.read_bytes(), folder / "damaged.sqlite"
        whole.rename(path)
        commands = (["check"], ["1"], ["2"], [])
        asked = {words: read(path, *words)[1] for words in map(tuple, commands)}
        found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        worst_seconds, worst_bytes, wrong = 0.0, 0, []
        for k in range(args.n):
            kind = list(KINDS)[k % len(KINDS)]
            rng = random.Random(k)
            for end in ("", "-wal", "-shm"):
                Path(f"{path}{end}").unlink(missing_ok=True)
            KINDS[kind](pristine, rng, path)
            words = ("check",) if rng.random() < 0.5 else rng.choice(list(asked))
            status, out, err, seconds, size = read(path, *words)
            worst_seconds, worst_bytes = max(worst_seconds, seconds), max(worst_bytes, size)
            if status == 2 and err.startswith("fq: error: ") and err.count("\n") == 1 and str(path) in err:
                found[kind]["refused"] += 1
            elif status == 0 and not words and any(line.endswith(" damaged") for line in out.splitlines()):
                found[kind]["refused"] += 1  # of the list one run
            elif status == 0 and out == asked[words]:
                found[kind]["read as it was"] += 1
            else:
                wrong.append(
                    f"{kind}, {k}: fq results {' '.join(words)}: status {status}: {err[-300:]}{out[:200]}"
                )
    print("| | refused in one line | read as it was: nothing that it holds was hit |\n| --- | --: | --: |")
    for kind, counts in found.items():
        print(f"| {kind} | {counts['refused']} | {counts['read as it was']} |")
    print(
        f"\nat most {worst_seconds:.2f} s and {worst_bytes / 1e6:.0f} MB a process; otherwise: {len(wrong)}"
    )
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong) or worst_seconds > SECONDS or worst_bytes > BYTES)


if __name__ == "__main__":
    sys.exit(main())
