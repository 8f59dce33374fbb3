/* ggml's packed tensor types to float32.
 *
 * Contract: bit-equal to gguf-py's reference dequantiser. Scales are widened to float32
 * and multiplied by the sub-scale first, then by the quant; the minimum is subtracted or
 * added last; each step rounds to float32, nothing is contracted. */
#ifndef FQ_DEQUANT_H
#define FQ_DEQUANT_H

#include "common.h"

/* n is a multiple of the type's block size. */
typedef void (*fq_dequant_fn)(const uint8_t *src, float *dst, int64_t n);

/* ggml's numbers for tensor types. */
enum {
    FQ_TYPE_F32 = 0,
    FQ_TYPE_F16 = 1,
    FQ_TYPE_Q4_0 = 2,
    FQ_TYPE_Q4_1 = 3,
    FQ_TYPE_Q5_0 = 6,
    FQ_TYPE_Q5_1 = 7,
    FQ_TYPE_Q8_0 = 8,
    FQ_TYPE_Q2_K = 10,
    FQ_TYPE_Q3_K = 11,
    FQ_TYPE_Q4_K = 12,
    FQ_TYPE_Q5_K = 13,
    FQ_TYPE_Q6_K = 14,
    FQ_TYPE_BF16 = 30,
    FQ_TYPE_COUNT = 31
};

typedef struct {
    fq_dequant_fn fn;
    fq_rows packed; /* rows of whole blocks */
    fq_rows out;
    int64_t n;
} fq_dequant_args;

/* out[t, r] = sum over k of x[t, k] * packed[r, k], for few tokens: each packed row comes
 * from memory once.
 *
 * Contract: products and sums in float32, 64 partial sums by k modulo 64, added pairwise
 * at the end; so the bits depend on neither the instruction set nor the thread count nor
 * the number of tokens. */
#define FQ_MATVEC_MAX_TOKENS 7 /* from 8 on mul_mat is faster, and so is BLAS */
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

/* out[t, r] = sum over k of x[t, k] * packed[r, k], for any number of tokens. Ranges count
 * panels of FQ_MUL_MAT_ROWS packed rows, the last of which may be shorter; up to
 * FQ_MUL_MAT_PANELS in a range share reads of x.
 *
 * Contract: fused multiply-adds in float32 in the order of k, a sum for every 256 of them,
 * these sums added in order; so the bits depend on neither the thread count nor the number of
 * tokens. Not every table has it: only where it beats BLAS. */
#define FQ_MUL_MAT_ROWS 32
#define FQ_MUL_MAT_PANELS 6
typedef struct {
    fq_dequant_fn fn;
    const uint8_t *packed;
    int64_t row_bytes, n_rows;
    const float *x;
    int64_t x_stride; /* floats between tokens */
    float *out;
    int64_t out_stride;
    int64_t n_tokens, k; /* k > 0 */
} fq_mul_mat_args;

/* Rotary embedding in place, llama.cpp's pairing for the llama architecture: elements
 * (2i, 2i+1) of a head are one pair. x is (n_tokens, n_head, head_dim) with n_rot <=
 * head_dim; cos and sin are (n_tokens, n_rot / 2). Ranges count tokens. */
typedef struct {
    float *x;
    int64_t token_stride, n_head, head_dim, n_rot; /* strides in floats */
    const float *cos, *sin;
} fq_rope_args;

#endif
