"""Builds the one extension module; everything else is in pyproject.toml."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SRC = "fq_kernels/src"

COMMON_FLAGS = [
    "-std=gnu11",
    "-O3",  # gcc 12 vectorises selections and conversions at this level only
    "-ffp-contract=off",  # a fused multiply-add rounds once where the contract says twice
    "-fno-math-errno",  # sqrtf as an instruction; nobody reads errno
    "-fno-trapping-math",  # lets loops over selections vectorise; results are the same
    "-fvisibility=hidden",
    "-pthread",
]

# What lets a compiler compute something else than the C code says, or links crtfastmath.o, which sets FTZ in
# whoever imports the module. common.h refuses what defines a macro; much of this defines none.
INEXACT_FLAGS = {
    "-Ofast",
    "-fapprox-func",
    "-fassociative-math",
    "-ffast-math",
    "-ffinite-math-only",
    "-fno-honor-infinities",
    "-fno-honor-nans",
    "-fno-signed-zeros",
    "-freciprocal-math",
    "-fsingle-precision-constant",
    "-funsafe-math-optimizations",
    "-mdaz-ftz",
    "-mpc32",
    "-mpc64",
}
INEXACT_PREFIXES = (
    "-fdenormal-fp-math",
    "-ffp-model=fast",
    "-ffp-model=aggressive",
    "-mfpmath=387",
    "-mfpmath=both",
)


def refuse_inexact(flags):
    """Raises CompileError naming those of a compiler's or linker's flags that change results."""
    found = [f for f in flags if f in INEXACT_FLAGS or f.startswith(INEXACT_PREFIXES)]
    if found:
        raise CompileError(
            f"{' '.join(dict.fromkeys(found))}: the kernels are exact, and not so under this; "
            "take it out of CFLAGS, CPPFLAGS, LDFLAGS or CC"
        )


# FQ_SANITIZE="address,undefined" or "thread": a build for .ci/sanitize, which finds what tests of results
# do not. It has a build directory of its own, so that no other build picks up its objects.
SANITIZE = os.environ.get("FQ_SANITIZE")
SANITIZE_FLAGS = [
    f"-fsanitize={SANITIZE}",
    "-O1",  # after -O3: the same checks, compiled in half the time
    "-g1",  # reports name source lines; what -g says of variables besides takes long to compile
    "-fno-omit-frame-pointer",  # so that the unwinder gets through every frame
    "-fno-sanitize-recover=undefined",  # ends the process; by default it prints and goes on
    "-fno-wrapv",  # Python's own flags define signed overflow, and what is defined is not reported
]
if SANITIZE:
    COMMON_FLAGS += SANITIZE_FLAGS

# FQ_SIMDE=1: a build for .ci/simde, in which AVX-512's bodies are translated to AVX2 by SIMDe.
SIMDE = bool(os.environ.get("FQ_SIMDE"))
SIMDE_FLAGS = [
    "-DFQ_SIMDE",
    *("-mavx2", "-mfma", "-mf16c"),  # a fused multiply-add is one rounding, in this build too
    "-O1",  # compiled in a quarter of the time
]

# One table: instruction set -> flags for kernels_<set>.c. Which one runs is decided at run
# time, so that one build serves every machine.
SCALAR_FLAGS = ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"]
KERNELS = {
    "x86_64": {
        "scalar": SCALAR_FLAGS,
        "sse2": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        # without the preference gcc stays at 256 bits
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    },
    "aarch64": {"scalar": SCALAR_FLAGS, "neon": []},
}
if SIMDE:
    KERNELS["x86_64"]["avx512"] = SIMDE_FLAGS


def kernels_for(platform):
    """That table's part for what is built for, as sysconfig.get_platform() has it: linux-aarch64, win-amd64.

    Where a compiler crosses that is not the host.
    """
    machine = platform.rpartition("-")[2].lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return KERNELS.get(machine, {"scalar": SCALAR_FLAGS})


class BuildKernels(build_ext):
    """Compiles each kernels_<set>.c with its own flags, which an Extension alone cannot say."""

    def build_extension(self, ext):
        refuse_inexact([*self.compiler.compiler_so, *self.compiler.linker_so])

        def compiled(source_flags):
            source, flags = source_flags
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
                depends=ext.depends,
            )

        sets = kernels_for(self.plat_name)
        # the longest first, so that no processor waits for it in the end
        files = {f"{SRC}/kernels_{isa}.c": COMMON_FLAGS + flags for isa, flags in reversed(sets.items())}
        for source in ext.sources:
            # Cython's code, whose calls take as long without: compiled in two thirds of the time, and with
            # sanitizers in a quarter
            less = [] if source.startswith(SRC) else ["-O0" if SANITIZE else "-O1"]
            files[source] = ext.extra_compile_args + less
        with ThreadPoolExecutor() as pool:
            for objects in pool.map(compiled, files.items()):
                ext.extra_objects += objects
        ext.sources = []
        super().build_extension(ext)


# A change in any of them compiles every set anew.
INCLUDED = sorted(str(path) for kind in ("h", "inc") for path in Path(SRC).rglob(f"*.{kind}"))

setup(
    ext_modules=cythonize(
        [
            Extension(
                "fq_kernels._kernels",
                ["fq_kernels/_kernels.pyx", f"{SRC}/dispatch.c", f"{SRC}/executor.c"],
                include_dirs=[SRC],
                depends=INCLUDED,
                extra_compile_args=COMMON_FLAGS + ["-DFQ_SIMDE"] * SIMDE,
                extra_link_args=["-pthread", *(SANITIZE_FLAGS if SANITIZE else [])],
            )
        ],
        language_level=3,
    ),
    cmdclass={"build_ext": BuildKernels},
    options={"build": {"build_base": f"build/{SANITIZE or 'simde'}"}} if SANITIZE or SIMDE else {},
)
