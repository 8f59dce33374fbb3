/* AVX-512's intrinsics by SIMDe, in AVX2, FMA and F16C, and here what SIMDe 0.7.4 lacks of those that
 * are used: lane by lane. For tests alone; nobody should time it. */
#ifndef FQ_SIMDE_H
#define FQ_SIMDE_H

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "without FMA a fused multiply-add would be two roundings: compile with -mavx2 -mfma -mf16c"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

typedef union {
    __m512 ps;
    __m512d pd;
    __m512i i;
    float f32[16];
    double f64[8];
    int32_t i32[16];
    uint32_t u32[16];
    __m256 ps256[2];
    __m128 ps128[4];
} fq_lanes_512;

typedef union {
    __m256i i;
    __m128i i128[2];
    uint16_t u16[16];
} fq_lanes_256;

typedef union {
    __m128i i;
    uint8_t u8[16];
    int8_t i8[16];
} fq_lanes_128;

#define FQ_EACH_LANE(n) for (int j = 0; j < (n); j++)

/* ------------------------------------------------ masks */

static inline __mmask16 fq_mm512_testn_epi32_mask(__m512i a, __m512i b) {
    const fq_lanes_512 x = {.i = a}, y = {.i = b};
    unsigned mask = 0;
    FQ_EACH_LANE(16) { mask |= (unsigned)((x.u32[j] & y.u32[j]) == 0) << j; }
    return (__mmask16)mask;
}
#define _mm512_testn_epi32_mask fq_mm512_testn_epi32_mask

static inline __mmask16 fq_mm_test_epi8_mask(__m128i a, __m128i b) {
    const fq_lanes_128 x = {.i = a}, y = {.i = b};
    unsigned mask = 0;
    FQ_EACH_LANE(16) { mask |= (unsigned)((x.u8[j] & y.u8[j]) != 0) << j; }
    return (__mmask16)mask;
}
#define _mm_test_epi8_mask fq_mm_test_epi8_mask

/* ------------------------------------------------ doubles to floats */

static inline __m256 fq_mm512_cvtpd_ps(__m512d a) {
    const fq_lanes_512 x = {.pd = a};
    float f[8];
    FQ_EACH_LANE(8) { f[j] = (float)x.f64[j]; }
    return _mm256_loadu_ps(f);
}
#define _mm512_cvtpd_ps fq_mm512_cvtpd_ps

/* ------------------------------------------------ half floats */

static inline __m512 fq_mm512_cvtph_ps(__m256i a) {
    const fq_lanes_256 h = {.i = a};
    return (fq_lanes_512){.ps256 = {_mm256_cvtph_ps(h.i128[0]), _mm256_cvtph_ps(h.i128[1])}}.ps;
}
#define _mm512_cvtph_ps fq_mm512_cvtph_ps

static inline __m256i fq_mm512_cvtps_ph_to_nearest(__m512 a) {
    const fq_lanes_512 x = {.ps = a};
    return (fq_lanes_256){.i128 = {_mm256_cvtps_ph(x.ps256[0], _MM_FROUND_TO_NEAREST_INT),
                                   _mm256_cvtps_ph(x.ps256[1], _MM_FROUND_TO_NEAREST_INT)}}
        .i;
}
#define _mm512_cvtps_ph(a, rounding)                                                                     \
    (((rounding) & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_NEAREST_INT ? fq_mm512_cvtps_ph_to_nearest(a)    \
                                                                    : (abort(), _mm256_setzero_si256()))

static inline __m128 fq_mm_maskz_cvtph_ps(__mmask8 mask, __m128i a) {
    union {
        __m128 ps;
        float f32[4];
    } x = {_mm_cvtph_ps(a)};
    FQ_EACH_LANE(4) { x.f32[j] = mask >> j & 1 ? x.f32[j] : 0.0f; }
    return x.ps;
}
#define _mm_maskz_cvtph_ps fq_mm_maskz_cvtph_ps

/* ------------------------------------------------ memory: no lane outside the mask is touched */

static inline __m512 fq_mm512_maskz_loadu_ps(__mmask16 mask, const void *p) {
    fq_lanes_512 x = {.f32 = {0}};
    FQ_EACH_LANE(16) {
        if (mask >> j & 1) {
            memcpy(&x.f32[j], (const char *)p + 4 * j, 4);
        }
    }
    return x.ps;
}
#define _mm512_maskz_loadu_ps fq_mm512_maskz_loadu_ps

static inline void fq_mm512_mask_storeu_ps(void *p, __mmask16 mask, __m512 a) {
    const fq_lanes_512 x = {.ps = a};
    FQ_EACH_LANE(16) {
        if (mask >> j & 1) {
            memcpy((char *)p + 4 * j, &x.f32[j], 4);
        }
    }
}
#define _mm512_mask_storeu_ps fq_mm512_mask_storeu_ps

static inline __m256i fq_mm256_maskz_loadu_epi16(__mmask16 mask, const void *p) {
    fq_lanes_256 x = {.u16 = {0}};
    FQ_EACH_LANE(16) {
        if (mask >> j & 1) {
            memcpy(&x.u16[j], (const char *)p + 2 * j, 2);
        }
    }
    return x.i;
}
#define _mm256_maskz_loadu_epi16 fq_mm256_maskz_loadu_epi16

/* faults, as the instruction does, where p is no whole cache line */
static inline void fq_mm512_stream_ps(float *p, __m512 a) {
    const fq_lanes_512 x = {.ps = a};
    if ((uintptr_t)p % 64) {
        __builtin_trap();
    }
    _mm256_stream_ps(p, x.ps256[0]);
    _mm256_stream_ps(p + 8, x.ps256[1]);
}
#define _mm512_stream_ps fq_mm512_stream_ps

/* ------------------------------------------------ widening */

static inline __m512i fq_mm512_cvtepu8_epi32(__m128i a) {
    const fq_lanes_128 from = {.i = a};
    fq_lanes_512 x;
    FQ_EACH_LANE(16) { x.u32[j] = from.u8[j]; }
    return x.i;
}
#define _mm512_cvtepu8_epi32 fq_mm512_cvtepu8_epi32

static inline __m512i fq_mm512_cvtepi8_epi32(__m128i a) {
    const fq_lanes_128 from = {.i = a};
    fq_lanes_512 x;
    FQ_EACH_LANE(16) { x.i32[j] = from.i8[j]; }
    return x.i;
}
#define _mm512_cvtepi8_epi32 fq_mm512_cvtepi8_epi32

static inline __m512i fq_mm512_cvtepu16_epi32(__m256i a) {
    const fq_lanes_256 from = {.i = a};
    fq_lanes_512 x;
    FQ_EACH_LANE(16) { x.u32[j] = from.u16[j]; }
    return x.i;
}
#define _mm512_cvtepu16_epi32 fq_mm512_cvtepu16_epi32

static inline __m512 fq_mm512_cvtepi32_ps(__m512i a) {
    const fq_lanes_512 from = {.i = a};
    fq_lanes_512 x;
    FQ_EACH_LANE(16) { x.f32[j] = (float)from.i32[j]; }
    return x.ps;
}
#define _mm512_cvtepi32_ps fq_mm512_cvtepi32_ps

/* ------------------------------------------------ between lanes */

static inline __m256 fq_mm512_extractf32x8_ps(__m512 a, int half) {
    const fq_lanes_512 x = {.ps = a};
    return x.ps256[half];
}
#define _mm512_extractf32x8_ps fq_mm512_extractf32x8_ps

static inline __m512 fq_mm512_shuffle_f32x4(__m512 a, __m512 b, int from) {
    const fq_lanes_512 x = {.ps = a}, y = {.ps = b};
    return (fq_lanes_512){.ps128 = {x.ps128[from & 3], x.ps128[from >> 2 & 3], y.ps128[from >> 4 & 3],
                                    y.ps128[from >> 6 & 3]}}
        .ps;
}
#define _mm512_shuffle_f32x4 fq_mm512_shuffle_f32x4

static inline double fq_mm512_reduce_add_pd(__m512d a) {
    fq_lanes_512 x = {.pd = a};
    for (int width = 4; width > 0; width /= 2) {
        FQ_EACH_LANE(width) { x.f64[j] += x.f64[j + width]; }
    }
    return x.f64[0];
}
#define _mm512_reduce_add_pd fq_mm512_reduce_add_pd

static inline float fq_mm512_reduce_min_ps(__m512 a) {
    const fq_lanes_512 x = {.ps = a};
    float least = x.f32[0];
    FQ_EACH_LANE(16) { least = x.f32[j] < least ? x.f32[j] : least; }
    return least;
}
#define _mm512_reduce_min_ps fq_mm512_reduce_min_ps

#endif
