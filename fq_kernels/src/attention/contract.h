/* Causal attention of one sequence, over the keys and values in its cache.
 *
 * With g = h / (n_head / n_head_kv) and j to n_past + t, from 0 or, where there is a window, from
 * n_past + t - window + 1:
 *     out[t, h] = sum of p[j] * v[g, j] / sum of p[j],  p[j] = exp(s[j] - m),
 *     s[j] = cap(scale * (q[t, h] . k[g, j])),  m the largest s[j],
 *     cap(x) = soft_cap * tanh(x / soft_cap), or x where soft_cap is 0 */
#ifndef FQ_ATTENTION_H
#define FQ_ATTENTION_H

#include "common.h"

typedef struct {
    const float *q; /* (n_tokens, n_head, d) */
    float *k, *v; /* the caches, (n_head_kv, kv_stride / d, d) */
    int64_t kv_stride; /* floats between heads */
    float *out;
    int64_t out_stride; /* floats between tokens; a token's heads follow one another */
    int64_t n_tokens, n_past, n_head, n_head_kv, d;
    int64_t window; /* 0: none */
    float scale, soft_cap;
    float *scores; /* for attend_few: (n_tokens, n_head, n_past + n_tokens) */
} fq_attention_args;

/* attend_few, for few tokens. Ranges count n_tokens * n_head.
 *
 * Contract: fused multiply-adds in float32 from zero. A dot product has 16 partial sums by index modulo 16, in the
 * order of the elements; sum j and sum j + 8 are added, then j and j + 4 of those, and so on. Values are added in
 * the order of the keys. The bits depend on neither the instruction set nor the number of tokens. */

#define FQ_DOT_LANES 16

/* attend_many. Ranges count n_head_kv * fq_attend_blocks; the first blocks have the most to do.
 *
 * Contract: fused multiply-adds in float32 in the order of the elements, and of the keys by
 * FQ_ATTEND_KEYS of them, whose exponentials refer to the largest score so far. The bits of finite
 * values depend on neither the instruction set nor the ranges nor the number of tokens; an infinity or
 * NaN among the values may reach a few tokens before it. */
#define FQ_ATTEND_KEYS 256
#define FQ_ATTEND_TOKENS 12 /* rows whose values are added together: up to the last one's key */
#define FQ_ATTEND_MAX_DIM 1024

/* Rows, which are the heads of a group at one token after the other, that a range takes: as many
 * as fit FQ_ATTEND_FLOATS with what is computed for them. */
#define FQ_ATTEND_FLOATS (96 << 10)
#define FQ_ATTEND_PADDED(n) (((n) + 31) / 32 * 32)
static inline int64_t fq_attend_rows(int64_t d) {
    return FQ_ATTEND_FLOATS / (FQ_ATTEND_KEYS + 16 + 2 * FQ_ATTEND_PADDED(d));
}

static inline int64_t fq_attend_blocks(int64_t n_tokens, int64_t n_head, int64_t n_head_kv, int64_t d) {
    const int64_t rows = n_tokens * (n_head / n_head_kv), block = fq_attend_rows(d);
    return (rows + block - 1) / block;
}

/* Keys and values of the tokens, (n_tokens, n_head_kv, d), into the caches. */
static inline void fq_attend_append(const fq_attention_args *a, const float *k, const float *v) {
    for (int64_t t = 0; t < a->n_tokens; t++) {
        for (int64_t g = 0; g < a->n_head_kv; g++, k += a->d, v += a->d) {
            const int64_t at = g * a->kv_stride + (a->n_past + t) * a->d;
            memcpy(a->k + at, k, (size_t)a->d * sizeof *k);
            memcpy(a->v + at, v, (size_t)a->d * sizeof *v);
        }
    }
}

#endif
