/* Rounding rules, one element at a time.
 *
 * Contract. Every rule keeps the sign, keeps zero and infinity, and maps NaN to a NaN.
 *
 *   bf16 nearest-even      to nearest, ties to even; subnormals kept; overflow to
 *                          infinity; NaN -> (bits >> 16) | 64  (ggml_compute_fp32_to_bf16)
 *   bf16 nearest-even-ftz  the same, but subnormal input gives zero of its sign
 *                          (VCVTNEPS2BF16, TPU)
 *   bf16 truncate          the low 16 bits are dropped
 *   bf16 nearest-away      to nearest, ties away from zero
 *   bf16 stochastic        up with probability (low 16 bits) / 2^16; the random number is
 *                          a function of seed and element index alone (SplitMix64)
 *   narrow                 any other format of a few bits, by its parameters (narrow.h)
 *   blocks                 formats whose elements share a scale (blocks.h)
 *
 * The functions are branch-free selections, so that compilers vectorise loops over them. Subnormal ranges take
 * float arithmetic and so need the default floating-point environment. */
#ifndef FQ_ROUNDING_H
#define FQ_ROUNDING_H

#include "rounding/blocks.h"

/* Order is shared with fq_kernels/formats/sixteen_bits.py. */
typedef enum {
    FQ_QUANT_NONE = 0,
    FQ_QUANT_BF16_NEAREST_EVEN = 1,
    FQ_QUANT_BF16_NEAREST_EVEN_FTZ = 2,
    FQ_QUANT_BF16_TRUNCATE = 3,
    FQ_QUANT_BF16_NEAREST_AWAY = 4,
    FQ_QUANT_BF16_STOCHASTIC = 5,
    FQ_QUANT_NARROW = 6,
    FQ_QUANT_BLOCKS = 7,
    FQ_QUANT_COUNT
} fq_quant_kind;

#define FQ_NEVER 0xffffffffu /* a count_from that no value reaches */

/* How elements are rounded. */
typedef struct {
    int quant; /* fq_quant_kind */
    uint64_t seed; /* of stochastic rounding */
    fq_narrow narrow; /* of FQ_QUANT_NARROW and of the elements of FQ_QUANT_BLOCKS; of the others count_from alone */
    fq_blocks blocks;
} fq_rounding;

/* The smallest normal number of a format that rounds each element alone. */
static inline uint32_t fq_smallest_normal(const fq_rounding *r) {
    return r->quant == FQ_QUANT_NARROW && r->narrow.min_exponent ? r->narrow.min_exponent << 23 : 1u << 23;
}

static inline uint32_t fq_bf16_nan_or(uint32_t u, uint32_t rounded) {
    return (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64u : rounded;
}

static inline uint32_t fq_bf16_nearest_even(uint32_t u) {
    return fq_bf16_nan_or(u, (u + (0x7fffu + ((u >> 16) & 1u))) >> 16);
}

static inline uint32_t fq_bf16_nearest_even_ftz(uint32_t u) {
    return (u & 0x7f800000u) == 0 ? (u >> 16) & 0x8000u : fq_bf16_nearest_even(u);
}

static inline uint32_t fq_bf16_truncate(uint32_t u) { return fq_bf16_nan_or(u, u >> 16); }

static inline uint32_t fq_bf16_nearest_away(uint32_t u) { return fq_bf16_nan_or(u, (u + 0x8000u) >> 16); }

static inline uint32_t fq_bf16_stochastic(uint32_t u, uint64_t seed, uint64_t index) {
    uint32_t r = (uint32_t)(fq_random(seed, index) >> 48);
    uint32_t rounded = (u & 0x7fffffffu) == 0x7f800000u ? u >> 16 : (u + r) >> 16;
    return fq_bf16_nan_or(u, rounded);
}

static inline float fq_f16_to_float(uint32_t h) {
    uint32_t sign = (h & 0x8000u) << 16;
    uint32_t em = h & 0x7fffu;
    uint32_t normal = (em << 13) + (112u << 23);
    uint32_t small = fq_bits((float)(int32_t)em * 0x1p-24f);
    uint32_t bits = em < 0x400u ? small : normal;
    bits = em >= 0x7c00u ? (em << 13) | 0x7f800000u : bits;
    return fq_float(sign | bits);
}

/* The bits of a float that is a binary16. */
static inline uint32_t fq_f16_of_float(float f) {
    const uint32_t u = fq_bits(f), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    const uint32_t normal = (a >> 13) - (112u << 10);
    const uint32_t small = (uint32_t)(int32_t)(fq_float(a < (113u << 23) ? a : 0) * 0x1p24f);
    uint32_t h = a < (113u << 23) ? small : normal;
    h = a >= 0x7f800000u ? 0x7c00u | (a > 0x7f800000u) << 9 : h;
    return sign | h;
}

/* Per rounded row, in double; elements where value or result is not finite are left out
 * of the sums and counted instead. Order is shared with fq_kernels/rules/counter.py. */
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
    FQ_STAT_OUT_OF_RANGE = 10,   /* finite values whose result is not; any that are cut to the range's end */
    FQ_STAT_TO_ZERO = 11,        /* values that are not zero whose results are */
    FQ_STAT_SUBNORMAL = 12,      /* results below the format's smallest normal number, zeros apart; NaN where elements
                                    share a scale, or a function elsewhere rounds */
    FQ_STAT_COUNT
};

/* Element-wise: the round trip x -> format -> float, float -> bf16 or f16 codes, bf16 codes -> float.
 * The stochastic rule counts elements by (first_row + row) * n + i. The fields from
 * first_row on are for the round trip; rows that are not rounded are copied. */
typedef struct {
    fq_rows x, out;
    int64_t n;
    fq_rounding rounding;
    uint64_t first_row; /* what stochastic rounding counts row 0 as */
    int64_t quant_begin, quant_end; /* rows that are rounded */
    int stream;    /* out is apart from x and will not stay in the cache: it may be written past it */
    double *stats; /* (rows, FQ_STAT_COUNT), zeroed by the caller, or NULL */
} fq_round_args;

/* Counts what a rounding done elsewhere did: rows of values and of results. */
typedef struct {
    fq_rows value, result;
    int64_t n;
    double *stats;
} fq_count_args;

#endif
