from __future__ import annotations

import sys
from pathlib import Path

import pytest

# last, so that an installed package goes before the sources beside this directory
sys.path.append(str(Path(__file__).parents[1]))

import fq_kernels


@pytest.fixture(params=fq_kernels.supported_isas())
def isa(request):
    return request.param


@pytest.fixture
def timed(benchmark):
    """Times a contestant of bench.cases, between its ``before`` and ``after``."""

    def run(contestant, elements):
        if contestant is None:
            pytest.skip("not installed, or has no such operation")
        contestant.before()
        try:
            benchmark.extra_info["bytes"] = 8 * elements  # read and written
            benchmark(contestant.call)
        finally:
            contestant.after()

    return run
