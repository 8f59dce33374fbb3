# cython: language_level=3, embedsignature=True, freethreading_compatible=True
"""Validation, the GIL, and the call into C. The contracts are in src/*/contract.h.

One module of several files, in the order in which they build on each other: C's dispatch table and
executor are in it once, and a program loads it once.
"""

import functools
import os

cdef const fq_kernel_table *table = NULL


cdef dict _supported():
    cdef int i = 0
    cdef dict found = {}
    while fq_table(i) != NULL:
        if fq_table_supported(i):
            found[fq_table(i).name.decode()] = i
        i += 1
    return found


def supported_isas():
    """Names of the instruction sets that this machine runs, best last."""
    return list(_supported())


def isa():
    """Name of the instruction set in use."""
    return table.name.decode()


def force_isa(name):
    """Use the instruction set ``name`` from now on, in the whole process.

    Raises ValueError if this machine or this build does not have it.
    """
    global table
    found = _supported()
    if name not in found:
        raise ValueError(f"instruction set {name!r} is not available here; there are {', '.join(found)}")
    table = fq_table(found[name])


try:
    force_isa(os.environ.get("FQ_KERNELS_ISA") or supported_isas()[-1])
except ValueError as e:
    raise ImportError(f"FQ_KERNELS_ISA: {e}", name="fq_kernels") from None


cdef class default_fpu:
    """The IEEE default environment on this thread: nearest even, subnormals kept, as the kernels have it.

    For numpy and Python, which compute in whatever state another library left. A ``with`` block, or a
    decorator; not around a ``yield``, whose other side would be in it too. The state comes back in the end.
    """

    cdef fq_fpenv before

    def __enter__(self):
        self.before = fq_fpenv_enter()

    def __exit__(self, *exc):
        fq_fpenv_leave(self.before)

    def __call__(self, fn):
        @functools.wraps(fn)
        def in_default_fpu(*args, **kwargs):
            with default_fpu():
                return fn(*args, **kwargs)

        return in_default_fpu


include "_executor.pxi"
include "_arguments.pxi"
include "_dlpack.pxi"
include "_sixteen.pxi"
include "_norms.pxi"
include "_units.pxi"
include "_c_api.pxi"
include "_products.pxi"
include "_ops.pxi"
include "_errors.pxi"
include "_strings.pxi"
