/* rms_norm_unit: root-mean-square normalisation by a unit that keeps the value of each step in a format of its own.
 *
 * Contract. R_s rounds to the format of step s, each element alone; a step without one leaves its value. For each
 * row x[0..n), IEEE binary32 unless said otherwise, no contraction:
 *
 *   a[i]   = R_x(x[i])
 *   q[i]   = R_square(a[i] * a[i])
 *   s      = the sum of q: in double, in index order; or in float, R_acc after every addition, in an order below
 *   m      = R_mean(s / n)                    in the sum's type, the quotient rounded to float
 *   v      = R_mean(m + eps)                  or m, where eps is outside the root
 *   y      = R_rsqrt(1 / sqrt(v))             or 1 / (sqrt(m) + eps); by a table or Newton's steps, see below
 *   raw[i] = R_raw(a[i] * y)
 *   out[i] = R_out(raw[i] * g[i])             R_out(raw[i]) without g
 *
 * Orders of the sum in float:
 *
 *   in order  from 0, element by element
 *   lanes     N of them, a power of two: lane j adds the elements i = j mod N in order, from 0. Then lane j adds lane
 *             j + N/2, j + N/4 ... until one is left
 *   tree      neighbours are added, then the sums of neighbours ...; an odd one at the end is carried up as it is
 *   chunks    of N elements, each from 0 in order; then the chunks' sums, from 0 in order, R_outer after every addition
 *
 *   torch     as its sum on x86 does: 32 lanes, of which lane j adds the elements i = j mod 32 of whole blocks of 32, 16
 *             blocks at a time, from 0; 16 such sums are added in order, from 0, then 16 of these, then all of these. What
 *             is left of the levels is added to the first, second to fourth. Lanes 0 to 7 then add what is left in eights,
 *             lanes 8 to 15, 16 to 23, 24 to 31. The elements left, from 0 in order, add lanes 0 to 7 in order
 *
 * A single element is added to 0 in every order. Inverse roots that are not exact, of a positive, finite
 * v = f * 4^k, 1 <= f < 4; of any other they are 1 / sqrt(v):
 *
 *   table   2^bits cells, half of them in [1, 2), half in [2, 4), each of one width; of a cell [a, b) it holds
 *           2 / (sqrt(a) + sqrt(b)), whose relative error is as large at both ends, rounded from double to float
 *   linear  1 / sqrt of a and of b, rounded to float; between them y0 + t * (y1 - y0), t = (f - a) / (b - a)
 *   Newton  y * (1.5 - (0.5 * v * y) * y), so many times, from a table or from the bits 0x5f3759df - (bits of v >> 1)
 *
 * What a step draws of random numbers is a function of its seed and of row * n + i, i counted as its operation's
 * elements are. At the step acc an element's first addition is counted as it is; later ones have other seeds: seed + 1 +
 * which fold, of lanes; seed + 1 + level, of a tree; seed + 1, of chunks; of torch's levels seed + 1, 2 and 3, of what is
 * left of them 4, of eights 5, in the end 6. v has mean's seed + 1. */
#ifndef FQ_NORM_UNIT_H
#define FQ_NORM_UNIT_H

#include "rounding/contract.h"

/* Order is shared with fq_kernels/units/unit.py. */
enum { FQ_SUM_IN_ORDER, FQ_SUM_LANES, FQ_SUM_TREE, FQ_SUM_CHUNKS, FQ_SUM_TORCH };

#define FQ_UNIT_MAX_LANES 512

typedef struct {
    fq_rounding x, square, acc, outer, mean, rsqrt, raw, out; /* none has blocks */
    int in_double;     /* the sum, which is in order then, and has no R_acc */
    int order;
    int64_t order_n;   /* of lanes and chunks */
    int eps_outside;   /* the root is exact then */
    int table_bits;    /* 1 to 16, or 0 for none */
    int linear;
    int newton;        /* steps; without a table from the bits */
} fq_unit;

typedef struct {
    fq_rows x, out;
    int64_t n;
    double eps; /* rounded to float by the kernel */
    const float *gain; /* n floats or NULL */
    uint64_t first_row;
    fq_unit unit;
} fq_unit_args;

#endif
