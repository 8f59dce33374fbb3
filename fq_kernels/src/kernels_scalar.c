/* The truth that every other instruction set must equal byte for byte. */
#define FQ_ISA scalar
#define FQ_SCALAR
#include "kernels.inc"
