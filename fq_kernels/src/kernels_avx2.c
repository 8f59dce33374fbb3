/* AVX2, FMA and F16C. */
#define FQ_ISA avx2
#include "isa.h"
#include <immintrin.h>

#include "rounding/avx2.inc"
#include "rounding/portable.inc"
#include "norm/finish_row.inc"
#include "norm/avx2.inc"
#include "norm/add.inc"
#include "norm/unit.inc"
#include "unpack/rows.inc"
#include "unpack/portable.inc"
#include "matvec/avx2.inc"
#include "matvec/portable.inc"
#include "mul_mat/avx2.inc"
#include "mul_mat/panels.inc"
#include "rope/portable.inc"
#include "elementary/portable.inc"
#include "exp/portable.inc"
#include "errors/portable.inc"
#include "attention/few_none.inc"
#include "attention/portable.inc"
#include "attention/many.inc"

#include "table.inc"
