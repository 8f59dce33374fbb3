/* AVX-512 F, BW, DQ and VL; with FQ_SIMDE translated to AVX2, for tests on processors without it. */
#ifdef FQ_SIMDE
#define FQ_ISA avx512_simde
#include "isa.h"
#include "simde.h"
#else
#define FQ_ISA avx512
#include "isa.h"
#include <immintrin.h>
#endif

#include "rounding/avx512.inc"
#include "rounding/portable.inc"
#include "norm/finish_row.inc"
#include "norm/avx512.inc"
#include "norm/add.inc"
#include "norm/unit.inc"
#include "unpack/rows.inc"
#include "unpack/avx512.inc"
#include "matvec/avx512.inc"
#include "matvec/portable.inc"
#include "mul_mat/avx512.inc"
#include "mul_mat/panels.inc"
#include "rope/portable.inc"
#include "elementary/portable.inc"
#include "exp/portable.inc"
#include "errors/portable.inc"
#include "attention/few_avx512.inc"
#include "attention/portable.inc"
#include "attention/many.inc"

#include "table.inc"
