/* What a rounding's errors are worth: row by row their products with themselves, with what was rounded, and with
 * gradients; the first two also with each element weighted. And column by column how they go with what was rounded.
 *
 * Contract: the same bits on every instruction set and with any number of threads. An error is y - x in float32; a
 * product is rounded to float32. Of a row it is added to one of 16 sums, by index modulo 16, in order, of which then
 * j and j + 8 are added, j and j + 4 of those, and so on; of a column, to one sum, in the order of rows. Nothing is
 * fused. */
#ifndef FQ_ERRORS_H
#define FQ_ERRORS_H

#include "common.h"

#define FQ_ERROR_LANES 16
#define FQ_MAX_GRADS 64

#define FQ_ERROR_SUMS 4 /* before those of gradients */

/* out[i] = e.e, e.x, (w e).e, (w e).x, and e.g for each gradient g, of row i of e = y - x. Ranges count rows. */
typedef struct {
    const float *x, *y, *weights, *grads;        /* (rows, n) each, and (n_grads, rows, n) */
    int64_t x_stride, y_stride, weights_stride;  /* in floats */
    int64_t n, row_stride, grad_stride, n_grads; /* of grads from row to row, and from one to the next */
    float *out;                                  /* (rows, FQ_ERROR_SUMS + n_grads), n_grads <= FQ_MAX_GRADS */
} fq_error_products_args;

/* out[0][j] = sum of e, out[1][j] = sum of e (x - centre[j]), of column j of e = y - x. Ranges count columns. */
typedef struct {
    const float *x, *y, *centre; /* (rows, n) each, and (n) */
    int64_t x_stride, y_stride;  /* in floats */
    int64_t n, n_rows;
    float *out; /* (2, n) */
} fq_error_columns_args;

#endif
