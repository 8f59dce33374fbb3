# The table for C, include/fq_kernels.h.

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free

import os.path


cdef extern from "../include/fq_kernels.h" nogil:
    enum:
        FQ_KERNELS_API_VERSION
    const char *FQ_KERNELS_API_NAME
    ctypedef struct fq_kernels_format:
        pass
    ctypedef struct fq_kernels_api:
        int version
        const char *(*isa)() noexcept nogil
        const fq_kernels_format *(*format)(const char *, int64_t) except NULL with gil
        void (*rms_norm_f32)(const float *, int64_t, const float *, double, const fq_kernels_format *, int, uint64_t,
                             float *, int64_t, int64_t, int64_t) noexcept nogil
        void (*add_rms_norm_f32)(const float *, int64_t, const float *, int64_t, const float *, double,
                                 const fq_kernels_format *, int, uint64_t, float *, int64_t, float *, int64_t,
                                 int64_t, int64_t) noexcept nogil
        void (*round_trip)(const float *, int64_t, const fq_kernels_format *, uint64_t, float *, int64_t, int64_t,
                           int64_t) noexcept nogil
        void (*float_to_bf16)(const float *, uint16_t *, int64_t) noexcept nogil
        void (*bf16_to_float)(const uint16_t *, float *, int64_t) noexcept nogil


# By name and length: (address, the format, which holds what the rounding points at). They stay for good.
cdef dict _c_formats = {}


cdef const char *_c_isa() noexcept nogil:
    return table.name


cdef const fq_kernels_format *_c_format(const char *name, int64_t n) except NULL with gil:
    cdef fq_rounding rounding
    cdef fq_rounding *kept
    if name == NULL or n < 1:
        raise ValueError("a format for C needs a name, and rows of one element at least")
    key = (<bytes> name, n)
    found = _c_formats.get(key)
    if found is None:
        fmt = get_format(key[0].decode())
        if fmt.whole_tensor or fmt.kernel.quant == 0:
            raise ValueError(f"format {fmt}: C cannot round to it row by row")
        _rounding_of(fmt, n, &rounding)
        kept = <fq_rounding *> calloc(1, sizeof(fq_rounding))
        if kept == NULL:
            raise MemoryError
        kept[0] = rounding
        found = _c_formats.setdefault(key, (<uintptr_t> kept, fmt))
        if <uintptr_t> found[0] != <uintptr_t> kept:
            free(kept)
    return <const fq_kernels_format *> <uintptr_t> found[0]


cdef void _c_rows(fq_rows *rows, const void *data, int64_t stride) noexcept nogil:
    rows.data = <char *> data
    rows.ndim = 1
    rows.shape[0] = 0  # nobody asks for that of one axis
    rows.stride[0] = stride * sizeof(float)


cdef void _c_rounding(fq_rounding *r, const fq_kernels_format *quant) noexcept nogil:
    if quant != NULL:
        r[0] = (<const fq_rounding *> quant)[0]
    else:
        r.quant = 0


cdef void _c_norm_args(fq_rms_norm_args *a, const float *x, int64_t x_stride, const float *weight, double eps,
                       const fq_kernels_format *quant, int quant_weighted, uint64_t first_row, float *out,
                       int64_t out_stride, int64_t n_rows, int64_t n) noexcept nogil:
    _c_rows(&a.x, x, x_stride)
    _c_rows(&a.out, out, out_stride)
    _c_rounding(&a.rounding, quant)
    a.n, a.eps, a.weight, a.quant_weighted = n, eps, weight, quant_weighted
    a.first_row, a.quant_begin, a.quant_end = first_row, 0, n_rows
    a.stream, a.stats = 0, NULL


cdef void _c_rms_norm(const float *x, int64_t x_stride, const float *weight, double eps,
                      const fq_kernels_format *quant, int quant_weighted, uint64_t first_row, float *out,
                      int64_t out_stride, int64_t n_rows, int64_t n) noexcept nogil:
    cdef fq_rms_norm_args a
    if n > 0 and n_rows > 0:
        _c_norm_args(&a, x, x_stride, weight, eps, quant, quant_weighted, first_row, out, out_stride, n_rows, n)
        fq_pool_run(NULL, table.rms_norm_f32, &a, n_rows, n_rows)


cdef void _c_add_rms_norm(const float *x, int64_t x_stride, const float *residual, int64_t residual_stride,
                          const float *weight, double eps, const fq_kernels_format *quant, int quant_weighted,
                          uint64_t first_row, float *out, int64_t out_stride, float *total, int64_t total_stride,
                          int64_t n_rows, int64_t n) noexcept nogil:
    cdef fq_add_rms_norm_args a
    if n > 0 and n_rows > 0:
        _c_norm_args(&a.norm, total, total_stride, weight, eps, quant, quant_weighted, first_row, out, out_stride,
                     n_rows, n)
        _c_rows(&a.x, x, x_stride)
        _c_rows(&a.residual, residual, residual_stride)
        a.total = a.norm.x
        fq_pool_run(NULL, table.add_rms_norm_f32, &a, n_rows, n_rows)


cdef void _c_round_args(fq_round_args *a, const void *x, void *out, int64_t n_rows, int64_t n) noexcept nogil:
    _c_rows(&a.x, x, 0)
    _c_rows(&a.out, out, 0)
    a.n = n
    a.first_row, a.quant_begin, a.quant_end = 0, 0, n_rows
    a.stream, a.stats = 0, NULL


cdef void _c_round_trip(const float *x, int64_t x_stride, const fq_kernels_format *quant, uint64_t first_row,
                        float *out, int64_t out_stride, int64_t n_rows, int64_t n) noexcept nogil:
    cdef fq_round_args a
    if n > 0 and n_rows > 0:
        _c_round_args(&a, x, out, n_rows, n)
        _c_rows(&a.x, x, x_stride)
        _c_rows(&a.out, out, out_stride)
        _c_rounding(&a.rounding, quant)
        a.first_row = first_row
        fq_pool_run(NULL, table.round_trip_f32, &a, n_rows, n_rows)


cdef fq_rounding _c_bf16


cdef void _c_float_to_bf16(const float *x, uint16_t *out, int64_t n) noexcept nogil:
    cdef fq_round_args a
    if n > 0:
        _c_round_args(&a, x, out, 1, n)
        a.rounding = _c_bf16
        fq_pool_run(NULL, table.float_to_codes, &a, 1, 1)


cdef void _c_bf16_to_float(const uint16_t *x, float *out, int64_t n) noexcept nogil:
    cdef fq_round_args a
    if n > 0:
        _c_round_args(&a, x, out, 1, n)
        a.rounding = _c_bf16
        fq_pool_run(NULL, table.bf16_to_float, &a, 1, 1)


def get_include():
    """The folder of fq_kernels.h, by which C and Cython call the kernels."""
    return os.path.join(os.path.dirname(__file__), "include")


_rounding_of(_bf16("nearest-even", 0), 1, &_c_bf16)

cdef fq_kernels_api _c_table
_c_table.version = FQ_KERNELS_API_VERSION
_c_table.isa = _c_isa
_c_table.format = _c_format
_c_table.rms_norm_f32 = _c_rms_norm
_c_table.add_rms_norm_f32 = _c_add_rms_norm
_c_table.round_trip = _c_round_trip
_c_table.float_to_bf16 = _c_float_to_bf16
_c_table.bf16_to_float = _c_bf16_to_float
_C_API = PyCapsule_New(&_c_table, FQ_KERNELS_API_NAME, NULL)
