#define FQ_ISA avx512
#include "kernels.inc"
