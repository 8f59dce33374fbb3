"""Benchmarks: ``python -m bench.report`` and ``pytest bench`` of kernels, ``bench.formats`` of formats."""

import os

# OpenBLAS's own threads look for work for tens of milliseconds, from numpy's import on: on two
# processors one of ours would have to share its with them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
