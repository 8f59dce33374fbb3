#define FQ_ISA sse2
#include "kernels.inc"
