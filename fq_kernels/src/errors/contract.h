/* What a rounding's errors are worth: row by row their products with themselves, with what was rounded, and with
 * gradients; the first two also with each element weighted. And column by column how they go with what was rounded.
 *
 * Contract: the same bits on every instruction set and with any number of threads. An error is y - x in float32; a
 * product is rounded to float32. Of a row it is added to one of 16 sums, by index modulo 16, in order, of which then
 * j and j + 8 are added, j and j + 4 of those, and so on; of a column, to one sum, in the order of rows. Nothing is
 * fused. */
#ifndef FQ_ERRORS_H
#define FQ_ERRORS_H

#include "rounding/contract.h"

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

#define FQ_ERROR_ROWS 32 /* of a piece */

/* Both of x rounded to each of formats, of which none has a scale over several rows. The columns' sums are those of
 * FQ_ERROR_ROWS rows. Ranges count such pieces. */
typedef struct {
    fq_error_products_args products; /* of all rows, but for y; out is (n_formats, n_rows, FQ_ERROR_SUMS + n_grads) */
    int64_t n_rows, block;           /* rows that are rounded at a time, at most FQ_ERROR_ROWS */
    float *room;                     /* (pieces, block, n) */
    const fq_rounding *formats;
    int64_t n_formats;
    uint64_t first_row;  /* what stochastic rounding counts row 0 as */
    const float *centre; /* (n) */
    float *columns;      /* (pieces, n_formats, 2, n), or NULL */
} fq_format_errors_args;

#endif
