/* out[t, r] = sum over k of x[t, k] * packed[r, k], for up to FQ_MUL_MAT_TOKENS tokens. Ranges count
 * panels of FQ_MUL_MAT_ROWS packed rows, the last of which may be shorter; up to
 * FQ_MUL_MAT_PANELS in a range share reads of x. All ranges of mul_mat_begin come before, which count
 * blocks of FQ_MUL_MAT_K columns of x.
 *
 * Contract: fused multiply-adds in float32 in the order of k, from zero, a sum for every FQ_MUL_MAT_K of
 * them, these sums added in order; so the bits depend on neither the instruction set nor the thread
 * count nor the number of tokens. Without such an instruction it is C's fmaf, which is slow. */
#ifndef FQ_MUL_MAT_H
#define FQ_MUL_MAT_H

#include "unpack/contract.h"

#define FQ_MUL_MAT_K 256 /* a multiple of every type's block */
#define FQ_MUL_MAT_ROWS 32
#define FQ_MUL_MAT_PANELS 3
#define FQ_MUL_MAT_TOKENS 512

/* Floats of packed x, which lie as they are read, from those that are read to those fetched into L2. A long row's do
 * not all stay there from one range to the next. */
#define FQ_X_AHEAD 8192

typedef struct {
    fq_dequant_fn fn;
    const uint8_t *packed;
    int64_t row_bytes, n_rows;
    const float *x;
    int64_t x_stride; /* floats between tokens */
    float *packed_x; /* n_tokens * k floats, which mul_mat_begin writes and mul_mat reads */
    float *out;
    int64_t out_stride;
    int64_t n_tokens, k; /* 0 < n_tokens <= FQ_MUL_MAT_TOKENS, k > 0 */
} fq_mul_mat_args;

#endif
