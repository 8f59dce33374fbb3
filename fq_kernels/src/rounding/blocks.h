/* Formats whose elements share a scale.
 *
 * Contract. A row is cut into blocks of `size` elements; the last may be shorter and counts as filled up with
 * zeros. Every operation below is one of float32, in the order written; rint is to nearest even; a block's largest is
 * its largest magnitude. Where a scale comes from a block, row or tensor with a NaN or an infinity, all of that is NaN.
 *
 *   int         scale = largest / top, at least the smallest normal number; rint(x / scale) * scale
 *   zero-point  low, high = those of the block and 0; scale = (high - low) / top, in double and rounded, at least the
 *               smallest normal number; zero = rint(-low / scale);
 *               (min(max(rint(x / scale) + zero, 0), top) - zero) * scale
 *   narrow      scale as of int; narrow(x / scale) * scale; narrow is narrow.h's, to nearest even
 *   mx          scale = 2^e, e from -127 to 127: `carry` says when e is one above floor(log2(largest)) - emax;
 *               narrow(x * (1 / scale)) * scale
 *   mx-int      as mx; clip(rint(x * (1 / scale) * 64), -127, 127) / 64 * scale
 *   nvfp4       outer = largest of the row / outer_top, at least the smallest normal number;
 *               scale = e4m3(largest / 6 / outer); narrow(x / (scale * outer)) * scale * outer, 0 where scale * outer
 *               is; with `four`: also with e4m3(largest / 6 / outer * 1.5), and the one of both that has the smaller
 *               sum of squared errors, added in halves
 *   q8_0 ... iq4_nl
 *               ggml's (ggml-quants.c, quantize_row_*_ref and dequantize_row_*); fq_kernels/formats/ggml_blocks.py
 *
 * Where a scale is given by other values, codes of int are cut to -top ... top. A result is +0, not -0, where codes are
 * integers. What is beyond float32's range, but for q8_0 to iq4_nl, becomes its end. */
#ifndef FQ_BLOCKS_H
#define FQ_BLOCKS_H

#include "rounding/narrow.h"

/* Order is shared with fq_kernels/formats/kernels.py. */
typedef enum {
    FQ_BLOCK_INT = 0,
    FQ_BLOCK_ZERO_POINT = 1,
    FQ_BLOCK_NARROW = 2,
    FQ_BLOCK_MX = 3,
    FQ_BLOCK_MX_INT = 4,
    FQ_BLOCK_NVFP4 = 5,
    FQ_BLOCK_Q8_0 = 6,
    FQ_BLOCK_Q8_0_NEAREST_EVEN = 7,
    FQ_BLOCK_Q8_K = 8,
    FQ_BLOCK_AROUND_ZERO = 9,
    FQ_BLOCK_FROM_MINIMUM = 10,
    FQ_BLOCK_IQ4_NL = 11
} fq_block_rule;

/* Order is shared with fq_kernels/formats/kernels.py. */
typedef enum {
    FQ_GIVEN_NOT = 0,       /* each block, row or call looks for its own */
    FQ_GIVEN_BY_TENSOR = 1, /* from all rows of these values */
    FQ_GIVEN_BY_OTHERS = 2, /* from other values: what is beyond is cut, and counted */
} fq_given;

typedef struct {
    int rule;     /* fq_block_rule */
    int64_t size; /* 0: the row */
    int hadamard; /* elements that are rotated together before, and back after: a power of two, 0 for none */
    float top;    /* largest code or number of an element; number of codes of around-zero */
    int32_t emax; /* of mx: exponent of the largest number of an element */
    uint32_t carry; /* of mx: what is added to the largest's mantissa before its exponent is taken */
    float outer_top; /* of nvfp4 */
    int four;
    int given;         /* fq_given: where scale and zero below (nvfp4: the outer scale) come from */
    float scale, zero;
    const float *scales; /* one for each element of a row, in place of `scale`; NULL for none */
} fq_blocks;

#define FQ_SMALLEST_NORMAL 0x1p-126f
#define FQ_FLOAT_MAX 0x1.fffffep127f

/* What is looked for in a block or row. */
typedef struct {
    int32_t largest; /* bits of the largest magnitude; from infinity's on one is not finite */
    int32_t low, high; /* places of the lowest and the highest value (fq_place) */
} fq_extent;

/* A number that orders as the floats do, -0 below 0, and back. */
static inline __attribute__((always_inline)) int32_t fq_place(uint32_t u) {
    const int32_t i = (int32_t)u;
    return i ^ ((i >> 31) & 0x7fffffff);
}

static inline float fq_at_place(int32_t place) { return fq_float((uint32_t)(place ^ ((place >> 31) & 0x7fffffff))); }

static inline int fq_is_finite(const fq_extent *e) { return e->largest < 0x7f800000; }

/* Below 2^22 in magnitude; 0 and not -0. */
static inline __attribute__((always_inline)) float fq_rint(float x) { return x + 0x1.8p23f - 0x1.8p23f; }

static inline float fq_at_least_normal(float scale) { return scale > FQ_SMALLEST_NORMAL ? scale : FQ_SMALLEST_NORMAL; }

/* Scale and zero point of a block, or outer scale of a row, that is finite. */
typedef struct {
    float scale, zero;
} fq_scale;

static inline fq_scale fq_scale_of(const fq_blocks *b, const fq_extent *e) {
    const float largest = fq_float((uint32_t)e->largest);
    if (b->rule == FQ_BLOCK_ZERO_POINT) {
        const float lowest = fq_at_place(e->low), highest = fq_at_place(e->high);
        const float low = lowest < 0 ? lowest : 0, high = highest > 0 ? highest : 0;
        const float scale = fq_at_least_normal((float)(((double)high - (double)low) / (double)b->top));
        return (fq_scale){scale, fq_rint(-low / scale)};
    }
    return (fq_scale){fq_at_least_normal(largest / (b->rule == FQ_BLOCK_NVFP4 ? b->outer_top : b->top)), 0};
}

/* MX's, from the largest magnitude's bits. */
static inline float fq_mx_scale(const fq_blocks *b, uint32_t largest) {
    if (largest < 0x800000u) { /* below 2^-126: as if float32 had the exponent -127 too, and nothing below */
        largest = largest < 0x400000u ? 0 : (largest << 1) & 0x7fffffu;
    }
    const int32_t exponent = (int32_t)((largest + b->carry) >> 23) - 127 - b->emax;
    const int32_t e = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    return fq_float(e == -127 ? 0x400000u : (uint32_t)(e + 127) << 23);
}

#endif
