/* ggml's packed tensor types to float32.
 *
 * Contract: bit-equal to gguf-py's reference dequantiser. Scales are widened to float32
 * and multiplied by the sub-scale first, then by the quant; the minimum is subtracted or
 * added last; each step rounds to float32, nothing is contracted. */
#ifndef FQ_UNPACK_H
#define FQ_UNPACK_H

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

#endif
