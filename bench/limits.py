"""What the machine can do at most, measured by loops in C that are compiled here and now (limits.c)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from fq import Executor, FqError
from fq_kernels import isa

SOURCE = Path(__file__).with_name("limits.c")
FLAGS = ("-O3", "-ffp-contract=fast")
# of the kernels' set, whatever else the processor has; 512 bits, where the compiler would rather take 256
OF_THE_SET = {"avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx512f", "-mprefer-vector-width=512")}
FMA_SECONDS = 0.02


class Limits:
    """The loops for the instruction set that the kernels run, on an executor's threads.

    Raises FqError where there is no C compiler.
    """

    def __init__(self, build: Path) -> None:
        target = build / "limits.so"
        compiler = (os.environ.get("CC") or shutil.which("cc") or "gcc").split()
        flags = (*FLAGS, *OF_THE_SET.get(isa(), ()), "-shared", "-fPIC")
        command = [*compiler, *flags, str(SOURCE), "-o", str(target)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as e:
            raise FqError(f"the limits need a C compiler: {compiler[0]}: {e.strerror}") from None
        if run.returncode != 0:
            raise FqError(f"cannot compile {SOURCE.name}: {run.stderr.strip().splitlines()[-1]}")
        library = ctypes.CDLL(str(target))
        self._fma, self._read = library.fma_chains, library.read_parts
        self._fma.restype = ctypes.c_double
        self._fma.argtypes = ctypes.c_long, ctypes.POINTER(ctypes.c_float)
        self._read.restype = ctypes.c_uint64
        self._read.argtypes = ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 3
        self._rounds = self._calibrate()

    def _calibrate(self) -> int:
        rounds, seconds = 1000, 0.0
        while seconds < FMA_SECONDS / 4:
            rounds *= 2
            begin = perf_counter()
            self._fma(rounds, ctypes.c_float())
            seconds = perf_counter() - begin
        return int(rounds * FMA_SECONDS / seconds)

    def fma(self, executor: Executor) -> float:
        """Floating-point operations per second of independent fused multiply-adds in registers."""
        done = [0.0] * executor.threads

        def run(part: int) -> None:
            done[part] = self._fma(self._rounds, ctypes.c_float())

        begin = perf_counter()
        executor.map(run, executor.threads)
        return sum(done) / (perf_counter() - begin)

    def read(self, arrays: Sequence[np.ndarray], executor: Executor) -> float:
        """Bytes per second of reading the arrays, one after the other, each shared by the threads."""
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        sizes = (ctypes.c_size_t * len(arrays))(*(a.nbytes for a in arrays))

        def run(part: int) -> None:
            self._read(pointers, sizes, len(arrays), part, executor.threads)

        begin = perf_counter()
        executor.map(run, executor.threads)
        return sum(a.nbytes for a in arrays) / (perf_counter() - begin)
