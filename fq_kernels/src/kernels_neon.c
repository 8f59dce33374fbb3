#define FQ_ISA neon
#include "isa.h"

#include "norm/lanes.inc"
#include "mul_mat/portable.inc"
#include "portable.inc"
