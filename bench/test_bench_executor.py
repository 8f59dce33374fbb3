"""What handing work out costs, and what two threads gain."""

from __future__ import annotations

import pytest

from bench.cases import OPS, Bench, Place, rows_in
from fq_kernels import Executor
from fq_kernels._kernels import _dispatch_ns


@pytest.mark.parametrize("threads", [1, 2])
def test_empty_task(benchmark, threads):
    """A thousand at a time: through Python, one by one, Python is what would be timed."""
    benchmark.group = "1000 empty tasks"
    with Executor(threads) as executor:
        benchmark(_dispatch_ns, executor, 1000)


@pytest.mark.parametrize("threads", [1, 2])
def test_empty_python_function(benchmark, threads):
    benchmark.group = "Executor.map of an empty function"
    with Executor(threads) as executor:
        benchmark(executor.map, int, threads)


@pytest.mark.parametrize("one_thread", [True, False], ids=["one thread", "two threads"])
def test_rms_norm(benchmark, timed, isa, one_thread):
    benchmark.group = f"rms_norm in L2, {isa}"
    with Bench(OPS["rms_norm"], Place(2048, rows_in("L2", 2048, 0, threads=2), threads=2)) as bench:
        timed(bench.ours(isa, one_thread=one_thread), bench.x.size)
