#define FQ_ISA neon
#include "isa.h"

#include "norm/lanes.inc"
#include "portable.inc"
