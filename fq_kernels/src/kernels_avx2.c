/* AVX2, FMA and F16C. */
#define FQ_ISA avx2
#include "isa.h"
#include <immintrin.h>

#include "norm/avx2.inc"
#include "matvec/avx2.inc"
#include "mul_mat/avx2.inc"
#include "portable.inc"
