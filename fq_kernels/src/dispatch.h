/* One table of kernels per instruction set; the executor calls them with row ranges. */
#ifndef FQ_DISPATCH_H
#define FQ_DISPATCH_H

#include "attention/contract.h"
#include "errors/contract.h"
#include "exp/contract.h"
#include "matvec/contract.h"
#include "mul_mat/contract.h"
#include "norm/contract.h"
#include "norm/unit.h"
#include "rope/contract.h"
#include "rounding/contract.h"
#include "unpack/contract.h"

typedef struct {
    const char *name;
    void (*rms_norm_f32)(void *args, int64_t begin, int64_t end);
    void (*add_rms_norm_f32)(void *args, int64_t begin, int64_t end);
    void (*rms_norm_unit)(void *args, int64_t begin, int64_t end);
    void (*round_trip_f32)(void *args, int64_t begin, int64_t end);
    void (*count_rows)(void *args, int64_t begin, int64_t end);
    void (*float_to_codes)(void *args, int64_t begin, int64_t end);
    void (*bf16_to_float)(void *args, int64_t begin, int64_t end);
    void (*dequantize)(void *args, int64_t begin, int64_t end);
    void (*matvec_begin)(fq_matvec_args *args, float *scratch);
    void (*matvec)(void *args, int64_t begin, int64_t end);
    void (*mul_mat_begin)(void *args, int64_t begin, int64_t end);
    void (*mul_mat)(void *args, int64_t begin, int64_t end);
    void (*attend_few)(void *args, int64_t begin, int64_t end);
    void (*attend_many)(void *args, int64_t begin, int64_t end);
    void (*rope)(void *args, int64_t begin, int64_t end);
    void (*swiglu)(void *args, int64_t begin, int64_t end);
    void (*geglu)(void *args, int64_t begin, int64_t end);
    void (*soft_cap)(void *args, int64_t begin, int64_t end);
    void (*causal_exp)(void *args, int64_t begin, int64_t end);
    void (*log_sum_exp)(void *args, int64_t begin, int64_t end);
    void (*log_softmax)(void *args, int64_t begin, int64_t end);
    void (*elementary)(void *args, int64_t begin, int64_t end);
    void (*kl_divergence)(void *args, int64_t begin, int64_t end);
    void (*error_products)(void *args, int64_t begin, int64_t end);
    void (*error_columns)(void *args, int64_t begin, int64_t end);
    void (*format_errors)(void *args, int64_t begin, int64_t end);
    fq_dequant_fn dequant[FQ_TYPE_COUNT]; /* NULL where C has none */
} fq_kernel_table;

/* Tables the build holds, best last; NULL past the end. */
const fq_kernel_table *fq_table(int i);
/* Does this CPU, with this operating system, run table i? */
int fq_table_supported(int i);

#endif
