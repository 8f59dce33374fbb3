"""The states that other libraries leave the floating-point unit in."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import struct
import sys
from contextlib import contextmanager

X86_64_GLIBC = (
    sys.platform == "linux" and platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
)


# The floating-point environment of the caller

LIBM = ctypes.CDLL(ctypes.util.find_library("m") or None)
FTZ_AND_DAZ = 0x8040
MXCSR_CONTROL = 0xFFC0  # the lower six bits are sticky flags that any operation may set
ROUNDING_MODES = {
    "x86_64": {"down": 0x400, "up": 0x800, "to zero": 0xC00},
    "aarch64": {"up": 0x400000, "down": 0x800000, "to zero": 0xC00000},
}.get(platform.machine(), {})


class FloatEnvironment(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 256)]  # larger than any fenv_t

    @property
    def mxcsr(self) -> int:
        return struct.unpack_from("<I", bytes(self.bytes), 28)[0]

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        struct.pack_into("<I", self.bytes, 28, value)


def float_environment() -> FloatEnvironment:
    env = FloatEnvironment()
    assert LIBM.fegetenv(ctypes.byref(env)) == 0
    return env


@contextmanager
def foreign_environment(mode: int | None = None, mxcsr_bits: int = 0):
    before = float_environment()
    try:
        if mode is not None:
            assert LIBM.fesetround(mode) == 0
        if mxcsr_bits:
            env = float_environment()
            env.mxcsr |= mxcsr_bits
            LIBM.fesetenv(ctypes.byref(env))
        yield
    finally:
        LIBM.fesetenv(ctypes.byref(before))
