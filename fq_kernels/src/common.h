/* What every kernel shares: row views and the floating-point environment. */
#ifndef FQ_COMMON_H
#define FQ_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The contracts are exact: no operation is left out, reordered or done in another precision. */
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "the kernels are exact: compile without -ffast-math, -Ofast and their parts (see CFLAGS)"
#endif
#if __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16 /* 16: _Float16 alone is rounded anew */
#error "the kernels are exact: float must be computed as float (on x86: -msse2 -mfpmath=sse)"
#endif
_Static_assert(sizeof 1.0 == sizeof(double), "the kernels are exact: compile without -fsingle-precision-constant");

#define FQ_MAX_DIMS 64 /* numpy's own limit */

/* The rows of an N-d array whose last axis is contiguous. Outer axes may have any
 * stride, negative ones included; `ndim` counts outer axes only, already collapsed. */
typedef struct {
    char *data;
    int ndim;
    int64_t shape[FQ_MAX_DIMS];
    int64_t stride[FQ_MAX_DIMS]; /* bytes */
} fq_rows;

static inline char *fq_row(const fq_rows *rows, int64_t i) {
    if (rows->ndim == 1) {
        return rows->data + i * rows->stride[0];
    }
    char *p = rows->data;
    for (int d = rows->ndim - 1; d >= 0; d--) {
        p += (i % rows->shape[d]) * rows->stride[d];
        i /= rows->shape[d];
    }
    return p;
}

static inline uint32_t fq_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float fq_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* Kernels compute in the IEEE default environment: round to nearest even, subnormals
 * kept. Other libraries (-ffast-math start-up code among them) leave FTZ/DAZ or another
 * rounding mode set, and a new thread inherits its creator's. */
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
typedef unsigned int fq_fpenv;
static inline fq_fpenv fq_fpenv_enter(void) {
    fq_fpenv old = _mm_getcsr();
    _mm_setcsr(0x1f80u); /* all exceptions masked, nearest even, no FTZ, no DAZ */
    return old;
}
static inline void fq_fpenv_leave(fq_fpenv old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
typedef uint64_t fq_fpenv;
static inline fq_fpenv fq_fpenv_enter(void) {
    fq_fpenv old;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(old));
    __asm__ __volatile__("msr fpcr, %0" : : "r"((uint64_t)0));
    return old;
}
static inline void fq_fpenv_leave(fq_fpenv old) { __asm__ __volatile__("msr fpcr, %0" : : "r"(old)); }
#else
#include <fenv.h>
typedef fenv_t fq_fpenv;
static inline fq_fpenv fq_fpenv_enter(void) {
    fenv_t old;
    fegetenv(&old);
    fesetenv(FE_DFL_ENV);
    return old;
}
static inline void fq_fpenv_leave(fq_fpenv old) { fesetenv(&old); }
#endif

#endif
