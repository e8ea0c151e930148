/* Peak rates of one core: multiply-adds per second, and bytes read per second. See peak.py. */

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

/* Independent sums, so that no instruction waits for the one before; with two operands they fit 16 registers. */
#define SUMS 12

typedef float floats __attribute__((vector_size(WIDTH)));
typedef uint64_t words __attribute__((vector_size(WIDTH)));

/* Runs `rounds` rounds of multiply-adds without memory; returns their floating point operations. */
int64_t multiply_add(int64_t rounds)
{
    floats sum[SUMS], factor = (floats){0} + 0.5f, term = (floats){0} + (float)rounds;
    for (int i = 0; i < SUMS; i++)
        sum[i] = (floats){0} + (float)i;
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++)
            sum[i] = sum[i] * factor + term;
    for (int i = 1; i < SUMS; i++)
        sum[0] += sum[i];
    volatile floats kept = sum[0];
    (void)kept;
    return rounds * SUMS * 2 * (int64_t)(WIDTH / sizeof(float));
}

/* Reads `bytes` bytes, a multiple of 8 vectors, from an address aligned to a vector; returns their number. */
int64_t read_all(const void *data, int64_t bytes)
{
    const words *from = data;
    words seen[8] = {{0}};
    int64_t vectors = bytes / WIDTH;
    for (int64_t i = 0; i < vectors; i += 8)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            seen[j] ^= from[i + j];
    for (int j = 1; j < 8; j++)
        seen[0] ^= seen[j];
    volatile words kept = seen[0];
    (void)kept;
    return bytes;
}
