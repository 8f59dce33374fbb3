#define FQ_ISA neon
#include "kernels.inc"
