// What the machine can do at most, compiled where it runs, for the instruction set of the kernels:
// fused multiply-adds that need no memory, and memory that is read for no arithmetic.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif

typedef float floats __attribute__((vector_size(BYTES)));
typedef uint64_t words __attribute__((vector_size(BYTES)));

// Chains of dependent multiply-adds: as many as the latency (4 cycles) times the ports (2) needs,
// and no more than there are registers. Returns how many floating-point operations that were.
double fma_chains(long rounds, float *result) {
    // arrays indexed by constants alone are registers, hence the unrolling
    enum { CHAINS = 12 };
    floats a, b, x[CHAINS];
    for (int i = 0; i < BYTES / 4; i++) a[i] = 0.999f + 1e-6f * i, b[i] = 1e-3f;
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; c++) x[c] = b * (float)c;
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) x[c] = x[c] * a + b;
    }
#pragma GCC unroll 12
    for (int c = 1; c < CHAINS; c++) x[0] += x[c];
    *result = 0;
    for (int i = 0; i < BYTES / 4; i++) *result += x[0][i];
    return 2.0 * (BYTES / 4) * CHAINS * rounds;
}

static words load(const char *p) {
    words w;
    memcpy(&w, p, sizeof w);
    return w;
}

static uint64_t read_one(const char *p, size_t n) {
    words sums[4] = {0};
    size_t i = 0;
    for (; i + 4 * BYTES <= n; i += 4 * BYTES) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) sums[k] ^= load(p + i + k * BYTES);
    }
    uint64_t sum = 0;
    for (int k = 0; k < 4; k++)
        for (int j = 0; j < BYTES / 8; j++) sum ^= sums[k][j];
    for (; i < n; i++) sum ^= p[i];
    return sum;
}

// Reads a part-th of every array, in order, as the threads of a product share its rows.
uint64_t read_parts(const char *const *arrays, const size_t *bytes, int count, int part, int parts) {
    uint64_t sum = 0;
    for (int i = 0; i < count; i++) {
        size_t begin = bytes[i] / parts * part, end = part + 1 == parts ? bytes[i] : bytes[i] / parts * (part + 1);
        sum ^= read_one(arrays[i] + begin, end - begin);
    }
    return sum;
}
