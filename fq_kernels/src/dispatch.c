#include "dispatch.h"

extern const fq_kernel_table fq_table_scalar;
#if defined(__x86_64__)
#ifdef FQ_SIMDE
#define fq_table_avx512 fq_table_avx512_simde /* tells by its name that it is no AVX-512 */
#endif
extern const fq_kernel_table fq_table_sse2, fq_table_avx2, fq_table_avx512;
static const fq_kernel_table *const tables[] = {&fq_table_scalar, &fq_table_sse2, &fq_table_avx2,
                                                &fq_table_avx512};
#elif defined(__aarch64__)
extern const fq_kernel_table fq_table_neon;
static const fq_kernel_table *const tables[] = {&fq_table_scalar, &fq_table_neon};
#else
static const fq_kernel_table *const tables[] = {&fq_table_scalar};
#endif

#define N_TABLES ((int)(sizeof tables / sizeof *tables))

const fq_kernel_table *fq_table(int i) { return i >= 0 && i < N_TABLES ? tables[i] : NULL; }

int fq_table_supported(int i) {
    if (i < 0 || i >= N_TABLES) {
        return 0;
    }
#if defined(__x86_64__)
    /* the compiler's own check reads XCR0 too: the operating system must save the registers */
    __builtin_cpu_init();
    const int avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (i == 2) {
        return avx2;
    }
    if (i == 3) {
#ifdef FQ_SIMDE
        return avx2;
#else
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    }
#endif
    return 1;
}
