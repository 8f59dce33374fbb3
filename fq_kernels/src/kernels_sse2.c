#define FQ_ISA sse2
#include "isa.h"

#include "norm/lanes.inc"
#include "portable.inc"
