"""The bf16 round trip by itself, by others, and beside a plain copy."""

from __future__ import annotations

import pytest

from bench.cases import OPS, Bench, Place, rows_in

PLACES = {level: Place(2048, rows_in(level, 2048, 64 << 20)) for level in ("one row", "L2", "memory")}


@pytest.mark.parametrize("level", PLACES)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.round_trip], ids=lambda op: op.name)
def test_ours(benchmark, timed, isa, op, level):
    benchmark.group = f"{op.name}, {level}"
    with Bench(op, PLACES[level]) as bench:
        timed(bench.ours(isa), bench.x.size)


@pytest.mark.parametrize("by", ["ggml", "numpy", "torch", "memcpy"])
@pytest.mark.parametrize("level", PLACES)
def test_others(benchmark, timed, by, level):
    op = OPS["round trip"]
    benchmark.group = f"{op.name}, {level}"
    with Bench(op, PLACES[level]) as bench:
        timed(getattr(bench, by)(), bench.x.size)
