/* Rotary embedding in place. Elements (2i, 2i+1) of a head are one pair, or with neox, llama.cpp's
 * other pairing, elements (i, i + n_rot / 2). x is (n_tokens, n_head, head_dim) with n_rot <=
 * head_dim; cos and sin are (n_tokens, n_rot / 2). Ranges count tokens. */
#ifndef FQ_ROPE_H
#define FQ_ROPE_H

#include "common.h"

typedef struct {
    float *x;
    int64_t token_stride, n_head, head_dim, n_rot; /* strides in floats */
    int neox;
    const float *cos, *sin;
} fq_rope_args;

#endif
