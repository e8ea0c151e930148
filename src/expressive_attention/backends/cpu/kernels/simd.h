// Vectors of REAL (float or double), as wide as the build allows, and elementwise functions on them.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

// A tile of accumulators has MR rows of NR vectors, and leaves registers for a row of vectors and a number.
#define MR 6
#if defined(__AVX512F__) || defined(__aarch64__)
#define NR 4
#else
#define NR 2
#endif

// Products of pairs of bfloat16, summed in float.
#if defined(__AVX512BF16__) && !REAL_IS_DOUBLE
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

#if REAL_IS_DOUBLE
#define LARGEST DBL_MAX
#else
#define LARGEST FLT_MAX
#endif

#define V (VECTOR_BYTES / (int)sizeof(REAL))
#define PANEL (NR * V)

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL unaligned_vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#if REAL_IS_DOUBLE
typedef int64_t ivec __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES)));
#endif
typedef uint32_t uvec __attribute__((vector_size(VECTOR_BYTES)));

INLINE vec load(const REAL *p) { return *(const unaligned_vec *)p; }
INLINE void store(REAL *p, vec x) { *(unaligned_vec *)p = x; }
INLINE vec splat(REAL x) { return x - (vec){0}; }
INLINE vec choose(ivec where, vec x, vec other) { return (vec)((where & (ivec)x) | (~where & (ivec)other)); }


// Vectors needed for n numbers.
INLINE int tile_vectors(int64_t n) { return (int)((n + V - 1) / V); }

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Beyond this s = z^2, f(z) is 1 and f'(z) is 0 in every dtype.
#if REAL_IS_DOUBLE
#define SATURATED 0x1p1000
#else
#define SATURATED 0x1p120f
#endif

// The smaller of s and SATURATED; NaN stays NaN.
INLINE vec saturate(vec s) {
#if defined(__AVX512F__) && !REAL_IS_DOUBLE
  return (vec)_mm512_min_ps((__m512)splat(SATURATED), (__m512)s);
#else
  return choose(s > SATURATED, splat(SATURATED), s);
#endif
}

// f(x sqrt(scale2)) = x^2 / (1 / scale2 + x^2), or x^2 scale2 where `squared`. x^2 is not kept from overflow: then
// the result is NaN, and the row is computed again in double.
INLINE vec weight(vec x, int squared, REAL scale2, REAL inverse) {
  vec s = x * x;
#if REAL_IS_DOUBLE
  s = saturate(s);
#endif
  if (squared) return scale2 == 1 ? s : s * scale2;
  vec d = s + inverse;
#if defined(__AVX512F__) && !REAL_IS_DOUBLE
  vec r = (vec)_mm512_rcp14_ps((__m512)d), w = s * r;
  return w + w * ((REAL)1 - d * r);
#else
  return s / d;
#endif
}

// f(x sqrt(scale2)) as `weight`, and its derivative by x / 2, divided by scale2 where `squared` and else multiplied by it.
INLINE vec weight_and_half_derivative(vec x, int squared, REAL scale2, REAL inverse, vec *half_derivative) {
  vec s = saturate(x * x);
  if (squared) {
    *half_derivative = x;
    return scale2 == 1 ? s : s * scale2;
  }
  vec d = s + inverse;
#if defined(__AVX512F__) && !REAL_IS_DOUBLE
  // The operations of `weight`: a weight over the sum of its row has to be the same number.
  vec r = (vec)_mm512_rcp14_ps((__m512)d), e = (REAL)1 - d * r, w = s * r;
  r += r * e;
  *half_derivative = x * r * r;
  return w + w * e;
#else
  *half_derivative = x / d / d;
  return s / d;
#endif
}

#if REAL_IS_DOUBLE
// exp of the smaller of x and 0; NaN stays NaN.
INLINE vec exponential(vec x) {
  for (int i = 0; i < V; i++) x[i] = x[i] > 0 ? 1 : exp(x[i]);
  return x;
}
#else
// exp of the smaller of x and 0; NaN stays NaN. 2^k e^r with |r| <= log(2) / 2, e^r by its Taylor polynomial of degree 7:
// error below an ulp.
INLINE vec exponential(vec x) {
  const float log2e = 1.44269504088896341f, high = 0.693145751953125f, low = 1.42860682030941723e-6f;
  const float magic = 0x1.8p23f;  // added to a number, leaves its nearest integer in the last bits
  // Below -104 the result is 0, as it is at -104.
#if defined(__AVX512F__)
  vec y = (vec)_mm512_min_ps((__m512)splat(0), _mm512_max_ps((__m512)splat(-104), (__m512)x));
#else
  vec y = choose(x < -104.0f, splat(-104), choose(x > 0.0f, splat(0), x));
#endif
  vec shifted = y * log2e + magic, k = shifted - magic, r = y - k * high - k * low;
  vec e = splat(1.0f / 5040);
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)e, (__m512)k);
#else
  // Two factors, as 2^k may be smaller than the least normal number.
  ivec whole = (ivec)shifted - (ivec)splat(magic), half = whole >> 1;
  whole -= half;
  return e * (vec)((half + 127) << 23) * (vec)((whole + 127) << 23);
#endif
}
#endif

// exp of the smaller of x and 0 (NaN stays NaN) for n numbers, in place; there is room for whole vectors.
static void exponentials(REAL *x, int64_t n) {
  for (int64_t i = 0; i < n; i += V) store(x + i, exponential(load(x + i)));
}

// exp of the smaller of a - b and 0. The difference is rounded, and what that takes from it is as large as its last digit:
// it counts where b is far above all a of keys that have a weight.
INLINE vec exponential_of_difference(vec a, REAL b) {
  vec d = a - b, t = d - a, rest = (a - (d - t)) - (b + t), e = exponential(d);
  return e + e * choose((d > -1000) & (d <= 0), rest, splat(0));
}

// exp of the smaller of x and 0.
INLINE REAL exponential_of(REAL x) {
  REAL room[V] = {x};
  exponentials(room, 1);
  return room[0];
}
