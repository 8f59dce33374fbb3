# Arrays of other libraries, in their own memory: by DLPack, as numpy's own import has no bfloat16.

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_WRITABLE
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t

import numpy as np
from numpy import asarray as np_asarray


cdef extern from "dlpack.h":
    enum:
        FQ_DL_CPU
        FQ_DL_UINT
        FQ_DL_FLOAT
        FQ_DL_BFLOAT
        FQ_DL_READ_ONLY
        FQ_DL_IS_COPIED
        FQ_DL_MAX_DIMS
    ctypedef struct fq_dl_tensor:
        void *data
        int32_t device_type, device_id
        int32_t ndim
        uint8_t code, bits
        uint16_t lanes
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset
    ctypedef struct fq_dl_managed:
        fq_dl_tensor tensor
        void (*deleter)(fq_dl_managed *)
    ctypedef struct fq_dl_versioned:
        uint32_t major
        void (*deleter)(fq_dl_versioned *)
        uint64_t flags
        fq_dl_tensor tensor


cdef class _Tensor:
    """A tensor's memory, with numpy's dtype of its elements; that of bfloat16 is uint16. It is given back with the
    last array that looks at it."""

    cdef fq_dl_managed *managed
    cdef fq_dl_versioned *versioned
    cdef fq_dl_tensor tensor
    cdef bint read_only
    cdef Py_ssize_t shape[FQ_DL_MAX_DIMS]
    cdef Py_ssize_t strides[FQ_DL_MAX_DIMS]
    cdef Py_ssize_t bytes
    cdef char *format

    def __cinit__(self, str name, capsule):
        if PyCapsule_IsValid(capsule, b"dltensor_versioned"):
            self.versioned = <fq_dl_versioned *> PyCapsule_GetPointer(capsule, b"dltensor_versioned")
            if self.versioned.major != 1:  # where the rest lies is not known
                self.versioned = NULL
                raise TypeError(f"{name} is of another version of DLPack")
            PyCapsule_SetName(capsule, b"used_dltensor_versioned")
            self.tensor = self.versioned.tensor
            self.read_only = self.versioned.flags & (FQ_DL_READ_ONLY | FQ_DL_IS_COPIED)  # nobody would see a copy
        elif PyCapsule_IsValid(capsule, b"dltensor"):
            self.managed = <fq_dl_managed *> PyCapsule_GetPointer(capsule, b"dltensor")
            PyCapsule_SetName(capsule, b"used_dltensor")
            self.tensor = self.managed.tensor
            self.read_only = True  # this version cannot say whether it is
        else:
            raise TypeError(f"{name} does not give its memory: no capsule of DLPack")
        cdef int64_t step = 1, most, n, stride
        cdef int d
        kind = self.tensor.code, self.tensor.bits, self.tensor.lanes
        if self.tensor.device_type != FQ_DL_CPU:
            raise TypeError(f"{name} is not in the processor's memory")
        if kind == (FQ_DL_FLOAT, 32, 1):
            self.format = b"f"
        elif kind == (FQ_DL_FLOAT, 16, 1):
            self.format = b"e"
        elif kind == (FQ_DL_BFLOAT, 16, 1) or kind == (FQ_DL_UINT, 16, 1):
            self.format = b"H"
        else:
            raise TypeError(f"{name} must have elements of float32, float16 or bfloat16")
        if not 0 <= self.tensor.ndim <= FQ_DL_MAX_DIMS:
            raise TypeError(f"{name} has {self.tensor.ndim} axes")
        self.bytes = self.tensor.bits // 8
        most = INT64_MAX // self.bytes  # elements that an address can tell apart
        for d in range(self.tensor.ndim - 1, -1, -1):
            n = self.tensor.shape[d]
            stride = step if n <= 1 or self.tensor.strides == NULL else self.tensor.strides[d]
            if n < 0 or (n > 0 and step > most // n) or not -most <= stride <= most:
                raise TypeError(f"{name}: no array has {n} elements along axis {d}, {stride} apart")
            self.shape[d] = n
            self.strides[d] = stride * self.bytes
            step *= n
        self.bytes *= step

    def __dealloc__(self):
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)
        elif self.managed != NULL and self.managed.deleter != NULL:
            self.managed.deleter(self.managed)

    def __getbuffer__(self, Py_buffer *b, int flags):
        if self.read_only and flags & PyBUF_WRITABLE:
            raise BufferError("the tensor is read-only")
        b.buf = <char *> self.tensor.data + self.tensor.byte_offset
        if self.bytes == 0:
            b.buf = <void *> self.shape  # which may be NULL, what numpy would not take
        b.obj = self
        b.len = self.bytes
        b.itemsize = self.tensor.bits // 8
        b.readonly = self.read_only
        b.ndim = self.tensor.ndim
        b.format = self.format if flags & PyBUF_FORMAT else NULL
        b.shape = self.shape
        b.strides = self.strides
        b.suboffsets = NULL
        b.internal = NULL


cdef object _numpy_of(str name, array):
    """A tensor of another library as a numpy array over the same memory; what is none, as it is."""
    if array is None or isinstance(array, np_ndarray) or not hasattr(array, "__dlpack__"):
        return array
    try:
        try:
            capsule = array.__dlpack__(max_version=(1, 0))
        except TypeError:  # a library from before versions
            capsule = array.__dlpack__()
    except Exception as e:
        raise TypeError(f"{name} does not give its memory: {e}") from e
    tensor = _Tensor(name, capsule)
    try:
        return np_asarray(tensor)
    except ValueError as e:  # a shape that no array can have
        raise TypeError(f"{name}: {e}") from None
