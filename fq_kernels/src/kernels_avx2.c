#define FQ_ISA avx2
#include "isa.h"

#include "norm/lanes.inc"
#include "portable.inc"
