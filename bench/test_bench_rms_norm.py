"""rms_norm by itself and by others; the report has the ratios, this has pytest-benchmark's tooling."""

from __future__ import annotations

import pytest

from bench.cases import OPS, Bench, Place, rows_in

PLACES = {level: Place(2048, rows_in(level, 2048, 64 << 20)) for level in ("one row", "L2", "memory")}
NORMS = [op for op in OPS.values() if not op.round_trip]


def by_name(op):
    return op.name


@pytest.mark.parametrize("level", PLACES)
@pytest.mark.parametrize("op", NORMS, ids=by_name)
def test_ours(benchmark, timed, isa, op, level):
    benchmark.group = f"{op.name}, {level}"
    with Bench(op, PLACES[level]) as bench:
        timed(bench.ours(isa), bench.x.size)


@pytest.mark.parametrize("by", ["ggml", "numpy", "torch", "memcpy"])
@pytest.mark.parametrize("level", PLACES)
@pytest.mark.parametrize("op", [OPS["rms_norm"], OPS["rms_norm, weight"]], ids=by_name)
def test_others(benchmark, timed, by, op, level):
    benchmark.group = f"{op.name}, {level}"
    with Bench(op, PLACES[level]) as bench:
        timed(getattr(bench, by)(), bench.x.size)
