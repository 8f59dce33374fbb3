#define FQ_ISA sse2
#include "isa.h"

#include "norm/lanes.inc"
#include "mul_mat/portable.inc"
#include "portable.inc"
