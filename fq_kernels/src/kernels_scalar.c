/* The truth that every other instruction set must equal byte for byte. */
#define FQ_ISA scalar
#include "isa.h"

#include "norm/in_order.inc"
#include "mul_mat/portable.inc"
#include "portable.inc"
