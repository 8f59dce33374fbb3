"""Benchmarks: ``python -m bench.report`` and ``pytest bench`` of kernels, ``bench.formats`` of formats."""
