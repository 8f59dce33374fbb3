"""Benchmarks of the kernels: ``python -m bench.report``, or ``pytest bench``. See README.md."""
