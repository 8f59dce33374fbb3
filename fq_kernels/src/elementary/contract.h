/* exp, ln, cos and sin of float64, element by element.
 *
 * Contract: the same bits on every instruction set; libraries choose theirs by processor. Products and sums in
 * float64, none fused. exp and ln are within 1 ulp, cos and sin within 2e-16
 * for |x| <= 2^20, of which larger arguments take the rest by 2 pi as float64 has it. Infinities, NaN and arguments out
 * of range give what C's functions give. */
#ifndef FQ_ELEMENTARY_H
#define FQ_ELEMENTARY_H

#include "common.h"

enum { FQ_EXP, FQ_LOG, FQ_COS, FQ_SIN };

/* out may be x. Ranges count elements. */
typedef struct {
    int fn;
    const double *x;
    double *out;
} fq_elementary_args;

#endif
