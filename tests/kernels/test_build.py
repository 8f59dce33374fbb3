"""A build under flags that change results is refused, and the module that is loaded changes nothing else."""

from __future__ import annotations

import platform
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fq_kernels

ROOT = Path(__file__).parents[2]
UNIT = '#include "common.h"\nint unit(float f) { return (int)fq_bits(f); }\n'


@pytest.fixture
def setup_py(monkeypatch) -> dict[str, Any]:
    """setup.py's names. It is run without setuptools and Cython, which a test environment need not have."""

    class CompileError(Exception):
        pass

    for name, names in {
        "setuptools": {"Extension": lambda *a, **k: None, "setup": lambda **k: None},
        "setuptools.command": {},
        "setuptools.command.build_ext": {"build_ext": object},
        "setuptools.errors": {"CompileError": CompileError},
        "Cython": {},
        "Cython.Build": {"cythonize": lambda *a, **k: None},
    }.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("FQ_SANITIZE", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def compiled(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """What the compiler says of a unit that includes common.h."""
    (tmp_path / "unit.c").write_text(UNIT)
    cc = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    include = f"-I{ROOT / 'fq_kernels/src'}"
    command = [cc, *flags, include, "-c", "unit.c", "-o", "unit.o"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


PARTS = [
    "-ffast-math",
    "-Ofast",
    "-funsafe-math-optimizations",
    "-ffinite-math-only",
    "-freciprocal-math",
    "-fno-signed-zeros",
    "-fsingle-precision-constant",
]
if platform.machine() == "x86_64":
    PARTS.append("-mfpmath=387")


@pytest.mark.parametrize("flag", PARTS)
def test_the_header_refuses_inexact_arithmetic(tmp_path, flag):
    done = compiled(tmp_path, "-O2", flag)
    if flag == "-fsingle-precision-constant" and "ignored" in done.stderr + done.stdout:
        return  # clang has no such mode
    assert done.returncode != 0
    assert "the kernels are exact" in done.stderr


def test_the_header_takes_the_flags_of_setup_py(tmp_path, setup_py):
    done = compiled(tmp_path, *setup_py["COMMON_FLAGS"])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flag", [*PARTS, "-fno-honor-nans", "-fdenormal-fp-math=positive-zero", "-mdaz-ftz"])
def test_setup_refuses_inexact_arithmetic(setup_py, flag):
    """Whatever variable it comes from, compiler or linker: distutils joins them all in these two lists."""
    build = object.__new__(setup_py["BuildKernels"])
    for where in ("compiler_so", "linker_so"):
        commands = {"compiler_so": ["cc", "-O2", "-fPIC"], "linker_so": ["cc", "-shared"]}
        commands[where].append(flag)
        build.compiler = type("Compiler", (), commands)
        with pytest.raises(Exception, match=f"^{flag}: the kernels are exact"):
            build.build_extension(None)
    setup_py["refuse_inexact"](["cc", "-O3", "-march=native", "-ffp-contract=fast", "-fwrapv"])


def test_importing_leaves_the_control_register_alone():
    """crtfastmath.o in the module would set FTZ and DAZ, for the importing thread and all that it starts."""
    program = """
import ctypes, ctypes.util
libm = ctypes.CDLL(ctypes.util.find_library("m") or None)
def state():
    env = (ctypes.c_ubyte * 256)()
    assert libm.fegetenv(ctypes.byref(env)) == 0
    return bytes(env)[28:32] if "x86_64" in machine else bytes(env)[:8]
import platform, numpy
machine = platform.machine()
before = int.from_bytes(state(), "little") & ~0x3F  # flags that any operation may set
import fq_kernels
after = int.from_bytes(state(), "little") & ~0x3F
assert before == after, (hex(before), hex(after))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "built_for, sets",
    [
        ("linux-x86_64", ["scalar", "sse2", "avx2", "avx512"]),
        ("win-amd64", ["scalar", "sse2", "avx2", "avx512"]),
        ("linux-aarch64", ["scalar", "neon"]),
        ("macosx-11.0-arm64", ["scalar", "neon"]),
        ("macosx-10.9-universal2", ["scalar"]),
        ("linux-riscv64", ["scalar"]),
    ],
)
def test_the_sets_are_those_of_what_is_built_for(setup_py, monkeypatch, built_for, sets):
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert list(setup_py["kernels_for"](built_for)) == sets


@pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is x86's")
def test_what_the_processor_has_is_found():
    flags = set(
        re.findall(r"\S+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0])
    )
    there = ["scalar", "sse2"]
    if flags >= {"avx2", "fma", "f16c"}:
        there.append("avx2")
        if flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}:
            there.append("avx512")
    assert fq_kernels.supported_isas() == there
