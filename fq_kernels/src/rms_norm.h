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
 * (same address and strides); any other overlap is the caller's error. NaN payloads are
 * free. Rows outside [quant_begin, quant_end) are not rounded. */
#ifndef FQ_RMS_NORM_H
#define FQ_RMS_NORM_H

#include "common.h"
#include "rounding.h"

/* Per rounded row, in double; elements where value or result is not finite are left out
 * of the sums and counted instead. Order is shared with fq_kernels/rules.py. */
enum {
    FQ_STAT_MAX_ABS_ERROR = 0,
    FQ_STAT_SUM_ABS_ERROR = 1,
    FQ_STAT_SUM_ERROR = 2,
    FQ_STAT_SUM_SQ_ERROR = 3,
    FQ_STAT_SUM_SQ_VALUE = 4,
    FQ_STAT_CHANGED = 5,
    FQ_STAT_NOT_FINITE = 6,
    FQ_STAT_FIRST_ERROR = 7, /* |result - value| of the row's first element */
    FQ_STAT_LAST_ERROR = 8,
    FQ_STAT_SUMMED_IN_ORDER = 9, /* 1 where the sum in lanes did not decide the mean; every row */
    FQ_STAT_OUT_OF_RANGE = 10,   /* finite values whose result is not */
    FQ_STAT_COUNT
};

typedef struct {
    fq_rows x, out;
    int64_t n;
    double eps; /* rounded to float by the kernel, in the default environment */
    const float *weight; /* n floats or NULL */
    int quant;           /* fq_quant_kind */
    int quant_weighted;  /* 0: point raw, 1: point weighted */
    uint64_t seed;
    uint64_t first_row; /* what stochastic rounding counts row 0 as */
    int64_t quant_begin, quant_end;
    int stream;    /* out is apart from x and will not stay in the cache: it may be written past it */
    double *stats; /* (rows, FQ_STAT_COUNT), zeroed by the caller, or NULL */
} fq_rms_norm_args;

/* Element-wise: the round trip x -> format -> float, float -> bf16 codes and back.
 * The stochastic rule counts elements by (first_row + row) * n + i. The fields from
 * first_row on are as above and for the round trip; rows that are not rounded are copied. */
typedef struct {
    fq_rows x, out;
    int64_t n;
    int quant;
    uint64_t seed, first_row;
    int64_t quant_begin, quant_end;
    int stream;
    double *stats;
} fq_round_args;

/* Counts what a rounding done elsewhere did: rows of values and of results. */
typedef struct {
    fq_rows value, result;
    int64_t n;
    double *stats;
} fq_count_args;

#endif
