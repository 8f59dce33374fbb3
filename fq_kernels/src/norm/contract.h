/* rms_norm_f32: root-mean-square normalisation of rows, with an optional weight and an
 * optional round trip through a narrow format.
 *
 * Contract. For each row x[0..n), IEEE binary32 unless said otherwise, no contraction:
 *
 *   s     = sum over i, in index order, of (double)(x[i] * x[i])   product in float
 *   mean  = (float)(s / n)                                         division in double
 *   scale = 1.0f / sqrtf(mean + eps)
 *   raw[i]      = x[i] * scale          rounded here when point is raw
 *   weighted[i] = raw[i] * w[i]         rounded here when point is weighted
 *
 * The bits do not depend on threads, instruction set or FPU state. out may be x itself
 * (same address and strides); any other overlap is the caller's error. Payload and sign of a NaN
 * are free. Rows outside [quant_begin, quant_end) are not rounded. */
#ifndef FQ_NORM_H
#define FQ_NORM_H

#include "rounding/contract.h"

typedef struct {
    fq_rows x, out;
    int64_t n;
    double eps; /* rounded to float by the kernel, in the default environment */
    const float *weight; /* n floats or NULL */
    fq_rounding rounding;
    int quant_weighted; /* 0: point raw, 1: point weighted */
    uint64_t first_row; /* what stochastic rounding counts row 0 as */
    int64_t quant_begin, quant_end;
    int stream;    /* out is apart from x and will not stay in the cache: it may be written past it */
    double *stats; /* (rows, FQ_STAT_COUNT), zeroed by the caller, or NULL */
} fq_rms_norm_args;

/* add_rms_norm_f32: total = x + residual, in float, and then rms_norm_f32 of total, which is norm.x. total may be x or
 * residual itself; norm.out is apart from all three, or one of x and residual that total is not. */
typedef struct {
    fq_rms_norm_args norm;
    fq_rows x, residual, total;
} fq_add_rms_norm_args;

#endif
