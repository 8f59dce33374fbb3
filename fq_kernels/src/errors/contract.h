/* What a rounding's errors are worth: row by row their products with themselves, with what was rounded, and with
 * gradients.
 *
 * Contract: the same bits on every instruction set and with any number of threads. An error is y - x in float32; a
 * product is rounded to float32 and added to one of 16 sums, by index modulo 16, in order, of which then j and j + 8
 * are added, j and j + 4 of those, and so on. Nothing is fused. */
#ifndef FQ_ERRORS_H
#define FQ_ERRORS_H

#include "common.h"

#define FQ_ERROR_LANES 16
#define FQ_MAX_GRADS 64

/* out[i] = e.e, e.x, and e.g for each gradient g, of row i of e = y - x. Ranges count rows. */
typedef struct {
    const float *x, *y, *grads;                     /* (rows, n), (rows, n), (n_grads, rows, n) */
    int64_t n, x_stride, y_stride, stride, n_grads; /* strides in floats; of grads from row to row */
    int64_t grad_stride;                            /* from gradient to gradient; n_grads <= FQ_MAX_GRADS */
    float *out;                                     /* (rows, 2 + n_grads) */
} fq_error_products_args;

#endif
