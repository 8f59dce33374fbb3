#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

#if defined(__x86_64__)
/* Which of the two sets with registers of their own this machine has, as bits: 1 AVX2, FMA and F16C; 2 AVX-512 F, BW,
 * DQ and VL. By CPUID itself: __builtin_cpu_supports reads a table of gcc's runtime, which other linkers leave empty. */
static int wide_sets(void) {
    const unsigned leaf1_c = bit_FMA | bit_F16C | bit_OSXSAVE | bit_AVX;
    const unsigned leaf7_b_512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    const unsigned sse_and_avx = 0x6, masks_and_zmm = 0xe0; /* in XCR0: what the operating system saves */
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & leaf1_c) != leaf1_c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return 0;
    }
    unsigned saved, upper;
    __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    if ((saved & sse_and_avx) != sse_and_avx || !(b & bit_AVX2)) {
        return 0;
    }
    const int zmm = (saved & masks_and_zmm) == masks_and_zmm && (b & leaf7_b_512) == leaf7_b_512;
    return 1 | zmm << 1;
}
#endif

int fq_table_supported(int i) {
    if (i < 0 || i >= N_TABLES) {
        return 0;
    }
#if defined(__x86_64__)
    if (i == 2) {
        return wide_sets() & 1;
    }
    if (i == 3) {
#ifdef FQ_SIMDE
        return wide_sets() & 1;
#else
        return wide_sets() >> 1;
#endif
    }
#endif
    return 1;
}
