/* fq_kernels for C: a table of functions, which fq_kernels_import() finds.
 *
 *     #include <Python.h>
 *     #include <fq_kernels.h>        (in the folder that fq_kernels.get_include() names)
 *
 *     const fq_kernels_api *fq = fq_kernels_import();       // NULL with a Python exception set
 *     const fq_kernels_format *bf16 = fq->format("bf16", n);  // the same
 *     fq->rms_norm_f32(x, n, weight, 1e-5, bf16, 1, 0, out, n, rows, n);
 *
 * `format` needs the GIL (or an attached thread), the others nothing of Python's: they may be called from any thread,
 * take what they are given without a look, and have the bits of the functions of the same name in Python, whose
 * documentation says more. Later versions of the table add at its end. */
#ifndef FQ_KERNELS_API_H
#define FQ_KERNELS_API_H

#include <stdint.h>

#define FQ_KERNELS_API_VERSION 1
#define FQ_KERNELS_API_NAME "fq_kernels._kernels._C_API"

typedef struct fq_kernels_format fq_kernels_format;

typedef struct {
    int version; /* FQ_KERNELS_API_VERSION of the table */

    /* The instruction set in use. */
    const char *(*isa)(void);

    /* A format by its name and options, for rows of n elements; it stays for good. NULL, and a Python exception, if
     * there is none of that name, or if it is one that Python rounds to or whose scale belongs to a whole tensor. */
    const fq_kernels_format *(*format)(const char *name, int64_t n);

    /* Rows of n floats; strides in floats. weight: n floats or NULL; quant: NULL for none, which is rounded to
     * before the weight or, if quant_weighted, after it; first_row: what stochastic rounding counts the first row
     * as. out may be x, with the same stride. */
    void (*rms_norm_f32)(const float *x, int64_t x_stride, const float *weight, double eps,
                         const fq_kernels_format *quant, int quant_weighted, uint64_t first_row, float *out,
                         int64_t out_stride, int64_t n_rows, int64_t n);

    /* total = x + residual, each with its stride, and the norm of total. total may be x or residual; out is apart
     * from total. */
    void (*add_rms_norm_f32)(const float *x, int64_t x_stride, const float *residual, int64_t residual_stride,
                             const float *weight, double eps, const fq_kernels_format *quant, int quant_weighted,
                             uint64_t first_row, float *out, int64_t out_stride, float *total, int64_t total_stride,
                             int64_t n_rows, int64_t n);

    /* float -> quant -> float. out may be x, with the same stride. */
    void (*round_trip)(const float *x, int64_t x_stride, const fq_kernels_format *quant, uint64_t first_row,
                       float *out, int64_t out_stride, int64_t n_rows, int64_t n);

    /* n floats to bf16's bits, to nearest even, and back. */
    void (*float_to_bf16)(const float *x, uint16_t *out, int64_t n);
    void (*bf16_to_float)(const uint16_t *x, float *out, int64_t n);
} fq_kernels_api;

#ifdef Py_PYTHON_H
static inline const fq_kernels_api *fq_kernels_import(void) {
    const fq_kernels_api *api = (const fq_kernels_api *)PyCapsule_Import(FQ_KERNELS_API_NAME, 0);
    if (api && api->version < FQ_KERNELS_API_VERSION) {
        PyErr_Format(PyExc_ImportError, "fq_kernels has version %d of its table for C, %d is needed", api->version,
                     FQ_KERNELS_API_VERSION);
        return 0;
    }
    return api;
}
#endif

#endif
