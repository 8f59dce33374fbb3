#define FQ_ISA scalar
#include "kernels.inc"
