# Arrays as arguments: dtype, layout, overlap.

from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport strchr, strcmp

import sys

import numpy as np
from numpy import empty as np_empty, ndarray as np_ndarray


cdef class _Array:
    """A numpy array's buffer, held for one call, seen as rows of its last axis."""

    cdef Py_buffer b
    cdef bint held
    cdef object array
    cdef str name
    cdef char *low   # first byte of any element
    cdef char *high  # one past the last

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.b)

    cdef int64_t n(self) noexcept:
        return self.b.shape[self.b.ndim - 1]

    cdef int64_t n_rows(self) noexcept:
        cdef int64_t rows = 1
        cdef int d
        for d in range(self.b.ndim - 1):
            rows *= self.b.shape[d]
        return rows

    cdef bint dense(self, int ndim) noexcept:
        """Whether it has that many axes and is C-contiguous."""
        return self.b.ndim == ndim and PyBuffer_IsContiguous(&self.b, b"C")

    cdef void rows(self, fq_rows *r) noexcept:
        """Outer axes, merged wherever two of them step evenly."""
        cdef int d, k = 0
        for d in range(self.b.ndim - 1):
            if self.b.shape[d] == 1:
                continue
            if k > 0 and r.stride[k - 1] == self.b.strides[d] * self.b.shape[d]:
                r.shape[k - 1] *= self.b.shape[d]
                r.stride[k - 1] = self.b.strides[d]
            else:
                r.shape[k] = self.b.shape[d]
                r.stride[k] = self.b.strides[d]
                k += 1
        if k == 0:
            r.shape[0] = 1
            r.stride[0] = 0
            k = 1
        r.ndim = k
        r.data = <char *> self.b.buf

    cdef bint same_layout(self, _Array other) noexcept:
        cdef int d
        if self.b.buf != other.b.buf or self.b.ndim != other.b.ndim or self.b.itemsize != other.b.itemsize:
            return False
        for d in range(self.b.ndim):
            if self.b.shape[d] != other.b.shape[d] or self.b.strides[d] != other.b.strides[d]:
                return False
        return True

    cdef bint overlaps(self, _Array other) except -1:
        # bounds first: the exact test is a search that can be slow, so it has a limit
        if self.low >= other.high or other.low >= self.high:
            return False
        try:
            return np.shares_memory(self.array, other.array, max_work=10**6)
        except np.exceptions.TooHardError:
            return True

    cdef bint overlaps_itself(self) except -1:
        if PyBuffer_IsContiguous(&self.b, b"C") or self.low == self.high:
            return False
        axes = sorted((abs(self.b.strides[d]), self.b.shape[d])
                      for d in range(self.b.ndim) if self.b.shape[d] > 1)
        extent = self.b.itemsize
        for stride, size in axes:
            if stride < extent:
                return True
            extent += stride * (size - 1)
        return False


cdef bytes _native_order = b"@=<" if sys.byteorder == "little" else b"@=>!"
cdef const char *_NATIVE_ORDER = _native_order
cdef dict _DTYPE_NAMES = {b"f": "float32", b"d": "float64", b"H": "uint16", b"B": "uint8"}


cdef _Array _open(str name, array, const char *code, bint writable=False):
    """The array's buffer if it has the dtype of the buffer protocol's ``code``, is aligned and
    has a contiguous last axis."""
    cdef _Array a = _Array.__new__(_Array)
    cdef int d, last
    if not isinstance(array, np_ndarray):
        raise TypeError(f"{name} must be a numpy array of {_DTYPE_NAMES[code]}, not {type(array).__name__}")
    try:
        PyObject_GetBuffer(array, &a.b, PyBUF_STRIDES | PyBUF_FORMAT)
    except ValueError:  # dtypes that the buffer protocol has no code for
        raise TypeError(f"{name} must have dtype {_DTYPE_NAMES[code]}, not {array.dtype}") from None
    a.held = True
    a.array = array
    a.name = name
    # the code may say native byte order in several ways
    if strcmp(a.b.format + (strchr(_NATIVE_ORDER, a.b.format[0]) != NULL), code) != 0:
        raise TypeError(f"{name} must have dtype {_DTYPE_NAMES[code]}, not {array.dtype}")
    if writable and a.b.readonly:
        raise ValueError(f"{name} is read-only")
    if a.b.ndim == 0:
        raise ValueError(f"{name} must have at least one axis")
    last = a.b.ndim - 1
    if a.b.shape[last] > 1 and a.b.strides[last] != a.b.itemsize:
        raise ValueError(f"the last axis of {name} must be contiguous")
    a.low = a.high = <char *> a.b.buf
    a.high += a.b.itemsize
    for d in range(a.b.ndim):
        if a.b.shape[d] == 0:
            a.high = a.low = <char *> a.b.buf
            return a
        if a.b.shape[d] > 1:
            if a.b.strides[d] % a.b.itemsize != 0:
                raise ValueError(f"{name} is not aligned to its element size")
            if a.b.strides[d] > 0:
                a.high += a.b.strides[d] * (a.b.shape[d] - 1)
            else:
                a.low += a.b.strides[d] * (a.b.shape[d] - 1)
    if <uintptr_t> a.b.buf % a.b.itemsize != 0:
        raise ValueError(f"{name} is not aligned to its element size")
    return a


cdef bint _same_shape(_Array a, _Array b) noexcept:
    cdef int d
    if a.b.ndim != b.b.ndim:
        return False
    for d in range(a.b.ndim):
        if a.b.shape[d] != b.b.shape[d]:
            return False
    return True


cdef _Array _output(out, const char *code, _Array x, str name="out"):
    """``out``, or a new array, checked against x."""
    cdef _Array a
    if out is None:
        return _open(name, np_empty(x.array.shape, _DTYPE_NAMES[code]), code)
    a = _open(name, out, code, True)
    _check_output(a, x)
    return a


cdef int _check_output(_Array a, _Array x) except -1:
    """That it is x, element by element, or shares no memory with it."""
    if not _same_shape(a, x):
        raise ValueError(f"{a.name} has shape {a.array.shape}, {x.name} has {x.array.shape}")
    if not a.same_layout(x) and a.overlaps(x):
        raise ValueError(f"{a.name} overlaps {x.name} in part; it must be {x.name} itself or apart from it")
    if a.overlaps_itself():
        raise ValueError(f"{a.name} has elements that share memory")
    return 0


cdef int _apart(_Array a, _Array b) except -1:
    if a.overlaps(b):
        raise ValueError(f"{a.name} overlaps {b.name}")
    return 0
