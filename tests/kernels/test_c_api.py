"""The table for C, called from an extension in C and from one in Cython, which are compiled here."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from strategies import assert_same_bits

import fq_kernels
from fq_kernels import add_rms_norm_f32, force_isa, rms_norm_f32, round_trip, supported_isas

CALLERS = Path(__file__).parent / "callers"
SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup
import fq_kernels
strict = ["-O1", "-Wall", "-Wextra", "-Werror"]
setup(name="callers", ext_modules=[
    Extension("in_c", ["in_c.c"], include_dirs=[fq_kernels.get_include()], extra_compile_args=strict),
    *cythonize([Extension("in_cython", ["in_cython.pyx"], include_dirs=[fq_kernels.get_include()])]),
])
"""


@pytest.fixture(scope="module")
def callers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("callers")
    for source in CALLERS.iterdir():
        shutil.copy(source, folder)
    (folder / "setup.py").write_text(SETUP)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    def load(name):
        (file,) = folder.glob(f"{name}.*.so")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load("in_c"), load("in_cython")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FORMATS = ("bf16", "bf16:stochastic", "fp8_e4m3fn", "int8", "mxfp4:ceil", "nvfp4:row", "q8_0")


@pytest.mark.parametrize("quant", FORMATS)
def test_c_has_pythons_bits(callers, quant):
    x, residual, weight = normal(9, 96), normal(9, 96, seed=1), normal(96, seed=2)
    out, total = np.empty_like(x), np.empty_like(x)
    addresses = [array.ctypes.data for array in (x, residual, weight, out, total)]
    for isa in supported_isas():
        force_isa(isa)
        assert callers[0].everything(*addresses, 9, 96, quant) == isa
        wanted, wanted_total = add_rms_norm_f32(x, residual, weight=weight)
        assert_same_bits(out, round_trip(wanted, quant, first_row=7))
        assert_same_bits(total, round_trip(wanted_total, "bf16"))


@pytest.mark.parametrize("point", ["raw", "weighted"])
def test_cython_has_pythons_bits(callers, point):
    room, weight = normal(8, 128), normal(64)
    x = room[::2, :64]
    out = np.zeros_like(room)
    callers[1].rms_norm(x, weight, b"fp8_e5m2", point == "weighted", out[::2, :64])
    assert_same_bits(out[::2, :64], rms_norm_f32(x, eps=1e-6, weight=weight, quant="fp8_e5m2", point=point))
    assert not out[1::2].any() and not out[:, 64:].any()


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("int9", "unknown format"),
        ("int8:tensor", "row by row"),
        ("bf16:dither", "row by row"),
        ("\xff", "codec"),
    ],
)
def test_a_format_that_c_cannot_have_is_an_error(callers, quant, message):
    x = normal(2, 32)
    with pytest.raises(ValueError, match=message):
        callers[1].rms_norm(x, x[0], quant.encode("latin-1"), False, x)


def test_the_header_says_the_version_that_the_table_has():
    header = Path(fq_kernels.get_include()) / "fq_kernels.h"
    assert "#define FQ_KERNELS_API_VERSION 1\n" in header.read_text()
    assert '"fq_kernels._kernels._C_API"' in repr(fq_kernels._kernels._C_API)
