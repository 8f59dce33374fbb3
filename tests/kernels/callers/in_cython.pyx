# cython: language_level=3
"""An extension in Cython that calls the kernels by their table."""

from libc.stdint cimport int64_t, uint64_t


cdef extern from *:
    """
    #include <Python.h>
    #include <fq_kernels.h>
    """
    ctypedef struct fq_kernels_format:
        pass
    ctypedef struct fq_kernels_api:
        const fq_kernels_format *(*format)(const char *, int64_t) except NULL
        void (*rms_norm_f32)(const float *, int64_t, const float *, double, const fq_kernels_format *, int, uint64_t,
                             float *, int64_t, int64_t, int64_t) noexcept nogil
    const fq_kernels_api *fq_kernels_import() except NULL


def rms_norm(const float[:, :] x, const float[:] weight, bytes quant, bint weighted, float[:, :] out):
    """Rows of any stride; x and out have at least one element."""
    cdef const fq_kernels_api *fq = fq_kernels_import()
    cdef const fq_kernels_format *fmt = fq.format(quant, x.shape[1])
    with nogil:
        fq.rms_norm_f32(&x[0, 0], x.strides[0] // sizeof(float), &weight[0], 1e-6, fmt, weighted, 0, &out[0, 0],
                        out.strides[0] // sizeof(float), x.shape[0], x.shape[1])
