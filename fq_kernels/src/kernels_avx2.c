#define FQ_ISA avx2
#include "kernels.inc"
