/* Floating-point formats of a sign, e <= 8 bits of exponent and m <= 22 of mantissa, by their parameters.
 *
 * Contract. x is rounded to the nearest numbers of the format below and above, as if the range had no end, in
 * the direction that the rounding says:
 *
 *   nearest-even   to the nearer, of a tie to that with an even last bit
 *   nearest-away   to the nearer, of a tie away from zero
 *   truncate       towards zero
 *   up, down       towards plus or minus infinity
 *   odd            to that with an odd last bit, unless x is a number of the format
 *   stochastic     away from zero if what falls away, and the first `random_bits` bits of a random number added at
 *                  its top, carry; what falls away counts to its 31st bit. The random number is a function of seed
 *                  and element index alone (fq_random)
 *
 * Between zero and the smallest normal number the format's numbers lie one smallest subnormal apart. A result
 * below `flush` is zero. What then is beyond the largest number becomes `overflow`, but a finite one the largest
 * number where the rounding points towards zero, or is odd. A NaN becomes a quiet NaN of its sign. A zero keeps its
 * sign where the format has two. */
#ifndef FQ_NARROW_H
#define FQ_NARROW_H

#include "common.h"

/* Order is shared with fq_kernels/formats/narrow_floats.py. */
enum {
    FQ_ROUND_NEAREST_EVEN = 0,
    FQ_ROUND_NEAREST_AWAY = 1,
    FQ_ROUND_TRUNCATE = 2,
    FQ_ROUND_UP = 3,
    FQ_ROUND_DOWN = 4,
    FQ_ROUND_ODD = 5,
    FQ_ROUND_STOCHASTIC = 6
};

/* Bits are those of float32. */
typedef struct {
    uint32_t rounding;
    uint32_t shift;        /* bits of float32's mantissa that the format has not, 1 to 23 */
    uint32_t min_exponent; /* biased as float32's, of the smallest normal number: 0 where it is float32's own, else at
                              least 49 - shift, so that float32's subnormals are below all that matters */
    uint32_t unit;         /* the smallest subnormal number; not used where min_exponent is 0 */
    uint32_t flush;        /* the smallest normal number, or 0 */
    uint32_t largest, overflow;
    uint32_t one_zero;    /* whether -0 becomes 0 */
    uint32_t random_bits; /* 1 to 31 */
    uint32_t count_from;  /* from this magnitude on a value with a finite result counts as out of range */
} fq_narrow;

static inline uint64_t fq_splitmix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 64 random bits of an element. */
static inline uint64_t fq_random(uint64_t seed, uint64_t index) {
    return fq_splitmix64(fq_splitmix64(seed) + (index + 1) * 0x9e3779b97f4a7c15u);
}

/* nearest-even, the usual one, in half the operations: a sum with 2^23 units is rounded to one of them. */
static inline __attribute__((always_inline)) uint32_t fq_narrow_nearest(uint32_t u, const fq_narrow *f) {
    const uint32_t sign = u & 0x80000000u, a = u ^ sign;
    const uint32_t rest = (1u << f->shift) - 1u;
    const float units = fq_float(f->unit + (23u << 23));
    const uint32_t normal = (a + (rest >> 1) + (a >> f->shift & 1u)) & ~rest;
    uint32_t r = a >> 23 < f->min_exponent ? fq_bits(fq_float(a) + units - units) : normal;
    r = r < f->flush ? 0 : r;
    r = r > f->largest ? f->overflow : r;
    r = a > 0x7f800000u ? 0x7fc00000u : r;
    return r | (f->one_zero & (r == 0) ? 0 : sign);
}

/* Whether `fq_narrow_by_sum` serves: mantissas of a bit or more, a range whose sums stay finite, and subnormals as far
 * apart as the smallest normal numbers. */
static inline int fq_narrow_sums(const fq_narrow *f) {
    return f->rounding == FQ_ROUND_NEAREST_EVEN && f->shift < 23 && f->min_exponent > 0 &&
           (f->largest >> 23) + f->shift <= 254 && f->unit == (f->min_exponent + f->shift - 23) << 23;
}

/* The same as nearest-even, for such formats: a sum with 2^(e + shift), e being x's exponent or the smallest one, is
 * rounded to the format's places. Beyond the largest number's binade it is too fine, but all there overflows. */
static inline __attribute__((always_inline)) uint32_t fq_narrow_by_sum(uint32_t u, const fq_narrow *f) {
    const uint32_t sign = u & 0x80000000u, a = u ^ sign;
    const uint32_t low = f->min_exponent << 23, high = f->largest & 0x7f800000u;
    uint32_t e = u & 0x7f800000u;
    e = e < low ? low : e;
    e = e > high ? high : e;
    const float places = fq_float(e + (f->shift << 23));
    uint32_t r = fq_bits(fq_float(a) + places - places);
    r = r < f->flush ? 0 : r;
    r = r > f->largest ? f->overflow : r;
    r = a > 0x7f800000u ? 0x7fc00000u : r;
    return r | (f->one_zero & (r == 0) ? 0 : sign);
}

/* Whether it is IEEE's binary16, to nearest even. */
static inline int fq_is_f16(const fq_narrow *f) {
    return f->rounding == FQ_ROUND_NEAREST_EVEN && f->shift == 13 && f->min_exponent == 113 && f->unit == 0x33800000u &&
           f->flush == 0 && f->largest == 0x477fe000u && f->overflow == 0x7f800000u && !f->one_zero;
}

/* The round trip of the float with the bits u. Of `random` stochastic rounding takes the first bits. */
static inline __attribute__((always_inline)) uint32_t fq_narrow_trip(uint32_t u, const fq_narrow *f, int rounding,
                                                                     uint32_t random) {
    if (rounding == FQ_ROUND_NEAREST_EVEN) {
        return fq_narrow_nearest(u, f);
    }
    const uint32_t sign = u & 0x80000000u, a = u ^ sign, exponent = a >> 23;
    const int small = exponent < f->min_exponent;
    const uint32_t wanted = f->shift + (small ? f->min_exponent - exponent : 0);
    const uint32_t shift = wanted < 31 ? wanted : 31;
    const uint32_t far = wanted - shift < 31 ? wanted - shift : 31; /* below half the smallest number */
    uint32_t mantissa = small ? (a & 0x7fffffu) | 0x800000u : a;
    mantissa = far ? mantissa >> far | (rounding != FQ_ROUND_STOCHASTIC) : mantissa;
    mantissa = a ? mantissa : 0;
    const uint32_t rest = (1u << shift) - 1u;
    uint32_t add = 0, over = f->overflow;
    switch (rounding) {
    case FQ_ROUND_NEAREST_AWAY: add = (rest >> 1) + 1u; break;
    case FQ_ROUND_UP: add = sign ? 0 : rest; over = sign ? f->largest : over; break;
    case FQ_ROUND_DOWN: add = sign ? rest : 0; over = sign ? over : f->largest; break;
    case FQ_ROUND_ODD: add = (mantissa >> shift & 1u) || !(mantissa & rest) ? 0 : rest; over = f->largest; break;
    case FQ_ROUND_STOCHASTIC: {
        const uint32_t few = f->random_bits < shift ? f->random_bits : shift;
        add = random >> (32 - few) << (shift - few);
        break;
    }
    default: over = f->largest;
    }
    const uint32_t sum = mantissa + add;
    uint32_t r = small ? fq_bits((float)(int32_t)(sum >> shift) * fq_float(f->unit)) : sum & ~rest;
    r = r < f->flush ? 0 : r;
    r = r > f->largest ? over : r;
    r = a == 0x7f800000u ? f->overflow : r;
    r = a > 0x7f800000u ? 0x7fc00000u : r;
    return r | (f->one_zero & (r == 0) ? 0 : sign);
}

#endif
