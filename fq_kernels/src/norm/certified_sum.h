/* The mean square of a row from a sum that was not taken in index order, when that is
 * provably the same float.
 *
 * Let p[i] >= 0 be the n float products (exact as doubles), S their exact sum and
 * u = 2^-53. Added in any order, n non-negative doubles give S (1 + d) with
 * |d| <= g = (n-1) u / (1 - (n-1) u): every partial sum is off by a factor within 1 +- u,
 * and no addend passes through more than n-1 of them. This holds for the sum in index
 * order, s, and for the one in lanes, s', so
 *
 *     |s - s'| <= 2 g S <= 2 g / (1 - g) s' = 2 (n-1) u / (1 - 2 (n-1) u) s' <= 2 n u s'
 *
 * as long as 2 n (n-1) u <= 1, that is n <= 2^26. The interval s' +- (2n + 4) u s' covers
 * this and the rounding of its own two ends (at most u s' each, plus n u^2 s' in the
 * product). Division by n and rounding to float are monotone: if both ends give the same
 * mean, so does s. The interval is about n 2^-51 wide, relatively, and floats lie at least
 * 2^-24 apart, so about one row of 2048 in 10^5 is not decided and is summed in order.
 *
 * NaN and infinity decide nothing. */
#ifndef FQ_CERTIFIED_SUM_H
#define FQ_CERTIFIED_SUM_H

#include <math.h>

#include "common.h"

#define FQ_CERTIFIED_MAX_N ((int64_t)1 << 26)

/* The sum by definition: in index order, in double, of float products. */
static inline double fq_sum_squares_in_order(const float *x, int64_t n) {
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) {
        s += (double)(x[i] * x[i]);
    }
    return s;
}

/* Whether the sum in lanes decides the mean, which is then in *mean. */
static inline int fq_mean_is_certain(double lane_sum, int64_t n, float *mean) {
    const double e = (double)(n + 2) * 0x1p-52 * lane_sum;
    const float low = (float)((lane_sum - e) / (double)n);
    const float high = (float)((lane_sum + e) / (double)n);
    *mean = low;
    return low == high && n <= FQ_CERTIFIED_MAX_N;
}

/* What a row is multiplied by; *certain says whether the sum in lanes decided it. */
static inline float fq_scale_of_row(const float *x, int64_t n, double lane_sum, float eps, int *certain) {
    float mean;
    *certain = fq_mean_is_certain(lane_sum, n, &mean);
    if (!*certain) {
        mean = (float)(fq_sum_squares_in_order(x, n) / (double)n);
    }
    return 1.0f / sqrtf(mean + eps);
}

/* Rows up to this long are read several at a time: the roots and quotients between a row's sum and its scale
 * take longer than such a row, but those of several rows at once hardly longer than those of one. */
#define FQ_SHORT_ROW 512
#define FQ_SHORT_ROWS 16

#endif
