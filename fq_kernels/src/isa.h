/* What the bodies of one instruction set share; kernels_<set>.c defines FQ_ISA, its name, before. */
#include <math.h>

#include "dispatch.h"

#define FQ_PASTE_(a, b) a##_##b
#define FQ_PASTE(a, b) FQ_PASTE_(a, b)
#define FQ_NAME(op) FQ_PASTE(op, FQ_ISA)
#define FQ_STRING_(a) #a
#define FQ_STRING(a) FQ_STRING_(a)

#define FQ_INLINE static inline __attribute__((always_inline))
#define FQ_UNROLL _Pragma("GCC unroll 8")
/* Fully unrolled first, a loop of 16 or 32 steps is no loop any more when the vectoriser
 * comes to it. */
#define FQ_KEEP_LOOP _Pragma("GCC unroll 1")
