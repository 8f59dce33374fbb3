from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "common.h" nogil:
    enum:
        FQ_MAX_DIMS
    ctypedef struct fq_rows:
        char *data
        int ndim
        int64_t shape[FQ_MAX_DIMS]
        int64_t stride[FQ_MAX_DIMS]
    ctypedef struct fq_fpenv:  # an integer on most machines: never looked into
        pass
    fq_fpenv fq_fpenv_enter()
    void fq_fpenv_leave(fq_fpenv)


cdef extern from "rounding/contract.h" nogil:
    enum:
        FQ_STAT_OUT_OF_RANGE
        FQ_STAT_COUNT
        FQ_QUANT_BLOCKS
        FQ_NEVER
    ctypedef struct fq_narrow:
        uint32_t rounding, shift, min_exponent, unit, flush, largest, overflow, one_zero, random_bits
        uint32_t count_from
    ctypedef struct fq_blocks:
        int rule
        int64_t size
        int hadamard
        float top
        int emax
        uint32_t carry
        float outer_top
        int four, given
        float scale, zero
        const float *scales
    ctypedef struct fq_rounding:
        int quant
        uint64_t seed
        fq_narrow narrow
        fq_blocks blocks
    ctypedef struct fq_round_args:
        fq_rows x, out
        int64_t n
        fq_rounding rounding
        uint64_t first_row
        int64_t quant_begin, quant_end
        int stream
        double *stats
    ctypedef struct fq_count_args:
        fq_rows value, result
        int64_t n
        double *stats


cdef extern from "norm/contract.h" nogil:
    ctypedef struct fq_rms_norm_args:
        fq_rows x, out
        int64_t n
        double eps
        const float *weight
        fq_rounding rounding
        int quant_weighted
        uint64_t first_row
        int64_t quant_begin, quant_end
        int stream
        double *stats
    ctypedef struct fq_add_rms_norm_args:
        fq_rms_norm_args norm
        fq_rows x, residual, total


cdef extern from "norm/unit.h" nogil:
    ctypedef struct fq_unit:
        fq_rounding x, square, acc, outer, mean, rsqrt, raw, out
        int in_double, order
        int64_t order_n
        int eps_outside, table_bits, linear, newton
    ctypedef struct fq_unit_args:
        fq_rows x, out
        int64_t n
        double eps
        const float *gain
        uint64_t first_row
        fq_unit unit


cdef extern from "unpack/contract.h" nogil:
    enum:
        FQ_TYPE_F16
        FQ_TYPE_COUNT
    ctypedef void (*fq_dequant_fn)(const uint8_t *, float *, int64_t)
    ctypedef struct fq_dequant_args:
        fq_dequant_fn fn
        fq_rows packed, out
        int64_t n


cdef extern from "matvec/contract.h" nogil:
    enum:
        FQ_MATVEC_MAX_TOKENS
    ctypedef struct fq_matvec_args:
        int type
        fq_dequant_fn fn
        const uint8_t *packed
        int64_t row_bytes
        const float *x
        int64_t x_stride
        float *out
        int64_t out_stride, n_tokens, k


cdef extern from "mul_mat/contract.h" nogil:
    enum:
        FQ_MUL_MAT_K
        FQ_MUL_MAT_ROWS
        FQ_MUL_MAT_PANELS
        FQ_MUL_MAT_TOKENS
    ctypedef struct fq_mul_mat_args:
        fq_dequant_fn fn
        const uint8_t *packed
        int64_t row_bytes, n_rows
        const float *x
        int64_t x_stride
        float *packed_x
        float *out
        int64_t out_stride, n_tokens, k


cdef extern from "rope/contract.h" nogil:
    ctypedef struct fq_rope_args:
        float *x
        int64_t token_stride, n_head, head_dim, n_rot
        int neox
        const float *cos
        const float *sin


cdef extern from "elementary/contract.h" nogil:
    enum:
        FQ_EXP, FQ_LOG, FQ_COS, FQ_SIN
    ctypedef struct fq_elementary_args:
        int fn
        const double *x
        double *out


cdef extern from "exp/contract.h" nogil:
    ctypedef struct fq_glu_args:
        float *gate
        const float *up
    ctypedef struct fq_soft_cap_args:
        float *x
        float cap
    ctypedef struct fq_causal_exp_args:
        float *x
        int64_t n_rows, n, n_first, window
        float *sums
    ctypedef struct fq_log_sum_exp_args:
        const float *x
        int64_t stride, n
        double *out
    ctypedef struct fq_log_softmax_args:
        const float *x
        int64_t stride, n
        double *log_p
        double *p
    ctypedef struct fq_kl_divergence_args:
        const float *x
        const double *log_p
        const double *p
        int64_t stride, n
        double *out


cdef extern from "errors/contract.h" nogil:
    int FQ_MAX_GRADS, FQ_ERROR_SUMS
    ctypedef struct fq_error_products_args:
        const float *x
        const float *y
        const float *weights
        const float *grads
        int64_t x_stride, y_stride, weights_stride, n, row_stride, grad_stride, n_grads
        float *out
    ctypedef struct fq_error_columns_args:
        const float *x
        const float *y
        const float *centre
        int64_t x_stride, y_stride, n, n_rows
        float *out
    int FQ_ERROR_ROWS
    ctypedef struct fq_format_errors_args:
        fq_error_products_args products
        int64_t n_rows, block, n_formats
        float *room
        const fq_rounding *formats
        uint64_t first_row
        const float *centre
        float *columns


cdef extern from "attention/contract.h" nogil:
    int FQ_ATTEND_MAX_DIM
    ctypedef struct fq_attention_args:
        const float *q
        float *k
        float *v
        int64_t kv_stride
        float *out
        int64_t out_stride, n_tokens, n_past, n_head, n_head_kv, d
        int64_t window
        float scale, soft_cap
        float *scores
    int64_t fq_attend_blocks(int64_t, int64_t, int64_t, int64_t)
    void fq_attend_append(const fq_attention_args *, const float *, const float *)


cdef extern from "executor.h" nogil:
    ctypedef void (*fq_task_fn)(void *, int64_t, int64_t)
    ctypedef struct fq_pool:
        pass
    fq_pool *fq_pool_new(int)
    void fq_pool_free(fq_pool *)
    void fq_pool_run(fq_pool *, fq_task_fn, void *, int64_t, int64_t)
    void fq_pool_work(fq_pool *)
    void fq_pool_stop(fq_pool *)
    void fq_pool_after_fork(fq_pool *)
    int fq_pool_threads(const fq_pool *)


cdef extern from "dispatch.h" nogil:
    ctypedef struct fq_kernel_table:
        const char *name
        fq_task_fn rms_norm_f32, add_rms_norm_f32, rms_norm_unit, round_trip_f32, count_rows, float_to_codes, bf16_to_float
        void (*matvec_begin)(fq_matvec_args *, float *) noexcept nogil
        fq_task_fn dequantize, matvec, mul_mat_begin, mul_mat, attend_few, attend_many, rope
        fq_task_fn swiglu, geglu, soft_cap, causal_exp, log_sum_exp, log_softmax, elementary, kl_divergence
        fq_task_fn error_products, error_columns, format_errors
        fq_dequant_fn dequant[FQ_TYPE_COUNT]
    const fq_kernel_table *fq_table(int)
    int fq_table_supported(int)
