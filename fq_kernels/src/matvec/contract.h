/* out[t, r] = sum over k of x[t, k] * packed[r, k], for few tokens: each packed row comes
 * from memory once.
 *
 * Contract: fused multiply-adds in float32 into 64 partial sums by k modulo 64, in the order of k and from zero.
 * The sums are folded: sum j and sum j + 32 are added, then j and j + 16 of those, and so on; a zero is positive.
 * So the bits depend on neither the instruction set nor the thread count nor the number of tokens. */
#ifndef FQ_MATVEC_H
#define FQ_MATVEC_H

#include "unpack/contract.h"

#define FQ_MATVEC_MAX_TOKENS 7 /* from 8 on mul_mat is faster */
typedef struct {
    int type;
    fq_dequant_fn fn; /* the type's */
    const uint8_t *packed;
    int64_t row_bytes;
    const float *x;
    int64_t x_stride; /* floats between tokens */
    float *out;
    int64_t out_stride;
    int64_t n_tokens, k;
} fq_matvec_args;

/* matvec_begin comes before the ranges: it may put x in another order into scratch, n_tokens times k floats and as
 * many as are missing to a multiple of 64, which then takes the place of x. */

#endif
