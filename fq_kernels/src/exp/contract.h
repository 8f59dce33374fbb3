/* What the graph and its figures compute with exponentials.
 *
 * Contract: the same bits on every instruction set and with any number of threads. exp is within 2 ulp, in
 * float64 elementary/contract.h's, as ln is. Its argument is limited to -87 (float64: -700) and 88, since slow
 * subnormals would change no sum that has a 1 in it. Sums have 64 parts, by index modulo 64, in order and then
 * folded: part j and part j + 32 are added, then j and j + 16 of those, and so on. Nothing is fused. */
#ifndef FQ_EXP_H
#define FQ_EXP_H

#include "elementary/contract.h"

#define FQ_SUM_PARTS 64

/* gate = act(gate) * up, in place. Ranges count elements.
 *     swiglu: act(x) = x / (1 + exp(-x))
 *     geglu:  act(x) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 * x^3): GELU as tanh has it */
typedef struct {
    float *gate;
    const float *up;
} fq_glu_args;

/* x = cap * tanh(x / cap), in place, within 2e-7 * cap. Ranges count elements. */
typedef struct {
    float *x, cap;
} fq_soft_cap_args;

/* Row i of each of the heads: of its first n_first + i elements the last `window`, all if it is 0,
 * become exp(x - their maximum), the others 0; sums[head, i] = sum of the row. Ranges count
 * heads * n_rows rows. */
typedef struct {
    float *x;
    int64_t n_rows, n; /* n >= n_first + n_rows - 1 elements from row to row; n_first >= 1 */
    int64_t n_first, window;
    float *sums;
} fq_causal_exp_args;

/* out[i] = m, ln(sum of exp(x - m)) in float64, where m is row i's maximum: added up they are
 * ln(sum of exp(x)), but where m is huge the second would be lost. */
typedef struct {
    const float *x;
    int64_t stride, n; /* n >= 1; stride in floats */
    double *out; /* (rows, 2) */
} fq_log_sum_exp_args;

/* Row i's ln softmax, (x - m) - ln(sum), and its softmax: exp of that, or 0 where it is below -700. */
typedef struct {
    const float *x;
    int64_t stride, n; /* n >= 1; stride in floats */
    double *log_p, *p; /* (rows, n) */
} fq_log_softmax_args;

/* out[i] = m, ln(sum) as of fq_log_sum_exp_args, and the KL divergence of row i of p from q =
 * softmax(x): with ln q = (x - m) - ln(sum) and d = ln q - log_p the sum of p * (exp(d) - 1 - d), which is
 * that of p * -d but for the sums of p and q, both 1. No term is below 0, and what is lost to rounding is
 * a part of the term, where p * -d loses a part of p. A term with p = 0 is q. */
typedef struct {
    const float *x;
    const double *log_p, *p; /* (rows, n) */
    int64_t stride, n;       /* of x, n >= 1 */
    double *out;             /* (rows, 3) */
} fq_kl_divergence_args;

#endif
