"""The calls that are compared, over one and the same memory: the report and the suites time these."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import fq_kernels
from fq.machine import cache_sizes

from .harness import Contestant, own_processors

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # ggml is driven by the tests' oracle

import ggml_oracle

EPS = 1e-5
LEVELS = ("one row", "L1", "L2", "L3", "memory")


def rows_in(level: str, n: int, memory: int, threads: int = 1) -> int:
    """How many rows of n keep x and out in the cache of that level; 0 where none does.

    For several threads more of L2 is filled, the one of the first thread still holding all:
    handing out work takes as long for few rows as for many.
    """
    caches = cache_sizes()
    l1, l2 = caches.get("L1", 32 << 10), caches.get("L2", 1 << 20)
    l3 = 4 * l2 if caches.get("L3", 0) >= 8 * l2 else 0
    # the rest of L1 is for Python's own data, that of L2 for whatever else the pages collide with
    budget = {"L1": l1 * 2 // 3, "L2": l2 // 2 if threads == 1 else l2 * 3 // 4, "L3": l3, "memory": memory}
    return 1 if level == "one row" else budget[level] // (2 * 4 * n)


@dataclass(frozen=True)
class Op:
    """One operation on rows, the ggml calls that do the same or the nearest to it."""

    name: str
    weighted: bool = False
    quant: str | None = None
    in_place: bool = False
    round_trip: bool = False  # the rounding alone

    def unfused(self) -> Op:
        return replace(self, quant=None)


OPS = {
    op.name: op
    for op in (
        Op("rms_norm"),
        Op("rms_norm, bf16", quant="bf16"),
        Op("rms_norm, weight", weighted=True),
        Op("rms_norm, weight, bf16", weighted=True, quant="bf16"),
        Op("rms_norm, in place", in_place=True),
        Op("rms_norm, bf16, in place", in_place=True, quant="bf16"),
        Op("round trip", round_trip=True),
        Op("round trip, in place", round_trip=True, in_place=True),
    )
}


@dataclass(frozen=True)
class Place:
    """Rows of n elements, and how many threads of each library share them."""

    n: int
    rows: int
    threads: int = 1


def _numpy_rms_norm(x: np.ndarray, weight: np.ndarray | None, out: np.ndarray) -> None:
    np.multiply(x, 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(EPS)), out=out)
    if weight is not None:
        np.multiply(out, weight, out=out)


def _numpy_round_trip(x: np.ndarray, out: np.ndarray) -> None:
    """Nearest even; NaNs are not looked for."""
    u, v = x.view(np.uint32), out.view(np.uint32)
    odd = (u >> 16) & 1
    np.bitwise_and(u + (odd + 0x7FFF), 0xFFFF0000, out=v)


def _torch_round_trip(x, out) -> None:
    out.copy_(x.bfloat16())


class Bench:
    """The contestants of one operation at one place, over ggml's own arrays; use in a with block."""

    def __init__(self, op: Op, place: Place, *, pin: bool = True):
        self.op, self.place, self._pin = op, place, pin
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        place = self.place
        self._executor = self._stack.enter_context(fq_kernels.Executor(place.threads))
        if place.threads > 1 and self._pin:
            self._stack.enter_context(own_processors(self._start))
        else:
            self._start()
        self._stack.callback(fq_kernels.force_isa, fq_kernels.isa())
        return self

    def _start(self) -> None:
        """The memory, and every library's threads."""
        op, place = self.op, self.place
        self._ggml = self._stack.enter_context(
            ggml_oracle.PreparedRmsNorm(
                place.rows,
                place.n,
                EPS,
                weighted=op.weighted,
                in_place=op.in_place,
                threads=place.threads,
            )
        )
        self._ggml.pause()
        self.x, self.weight, self.out = self._ggml.x, self._ggml.weight, self._ggml.out
        rng = np.random.default_rng(0)
        rng.standard_normal(dtype=np.float32, out=self.x)
        if self.weight is not None:
            rng.standard_normal(dtype=np.float32, out=self.weight)
        # in place, memcpy needs somewhere else to write to
        self.copy = np.zeros_like(self.x) if op.in_place else self.out
        self._executor.map(int, place.threads)
        if place.threads > 1 and (torch := self.torch()):
            torch.before()
            torch.call()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _call(self, op: Op, executor: fq_kernels.Executor | None) -> Callable[[], object]:
        x, out, weight, quant = self.x, self.out, self.weight, op.quant
        if op.round_trip:
            return lambda: fq_kernels.bf16_round_trip(x, out=out, executor=executor)
        if weight is None and quant is None:
            return lambda: fq_kernels.rms_norm_f32(x, eps=EPS, out=out, executor=executor)
        return lambda: fq_kernels.rms_norm_f32(
            x, eps=EPS, weight=weight, quant=quant, out=out, executor=executor
        )

    def ours(self, isa: str, *, unfused: bool = False, one_thread: bool = False) -> Contestant:
        executor = self._executor if self.place.threads > 1 and not one_thread else None
        op = self.op.unfused() if unfused else self.op
        return Contestant(self._call(op, executor), before=partial(fq_kernels.force_isa, isa))

    def memcpy(self) -> Contestant:
        """The C library's memmove of the rows, on one thread."""
        return Contestant(partial(ctypes.memmove, self.copy.ctypes.data, self.x.ctypes.data, self.x.nbytes))

    def ggml(self) -> Contestant | None:
        """ggml's norm, without the rounding that it cannot fuse; or its two row conversions."""
        if self.op.round_trip:
            if self.place.threads > 1:
                return None  # they are calls on one thread
            to_bf16, to_float = ggml_oracle.bf16_conversions()
            bits = np.empty(self.x.shape, np.uint16)
            there = partial(to_bf16, self.x.ctypes.data, bits.ctypes.data, self.x.size)
            back = partial(to_float, bits.ctypes.data, self.out.ctypes.data, self.x.size)
            return Contestant(lambda: (there(), back(), bits))
        if self.place.threads == 1:
            return Contestant(self._ggml.compute)
        # its threads poll between two calls, and would take a processor from the next contestant
        return Contestant(self._ggml.compute, before=self._wake_ggml, after=self._ggml.pause)

    def _wake_ggml(self) -> None:
        self._ggml.resume()
        time.sleep(2e-4)

    def numpy(self) -> Contestant:
        if self.op.round_trip:
            return Contestant(lambda: _numpy_round_trip(self.x, self.out))
        return Contestant(lambda: _numpy_rms_norm(self.x, self.weight, self.out))

    def torch(self) -> Contestant | None:
        """torch's own rms_norm, which allocates its result; None where torch is not installed."""
        try:
            import torch
        except ImportError:
            return None
        if self.op.round_trip:
            x, out = torch.from_numpy(self.x), torch.from_numpy(self.out)
            call = partial(_torch_round_trip, x, out)
        else:
            weight = None if self.weight is None else torch.from_numpy(self.weight)
            x, shape = torch.from_numpy(self.x), (self.place.n,)
            call = partial(torch.nn.functional.rms_norm, x, shape, weight, EPS)
        # after a call its threads spin for a while too, and it has no way to stop them
        after = partial(time.sleep, 0.02 if self.place.threads > 1 else 0)
        return Contestant(call, partial(torch.set_num_threads, self.place.threads), after)
