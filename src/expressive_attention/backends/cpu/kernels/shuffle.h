// Moving numbers between the lanes of vectors: transposing a square of them, and adding them up.

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // GCC before 12
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (ivec){__VA_ARGS__})
#endif

// Which lanes of x, y (numbered one after the other) go to lane p.
#define SWAP_LOW(p, d) ((p) & (d) ? V + (p) - (d) : (p))
#define SWAP_HIGH(p, d) ((p) & (d) ? V + (p) : (p) + (d))
#define ROTATE(p, d) (((p) + (d)) % V)
#define LANES_2(F, d) F(0, d), F(1, d)
#define LANES_4(F, d) LANES_2(F, d), F(2, d), F(3, d)
#define LANES_8(F, d) LANES_4(F, d), F(4, d), F(5, d), F(6, d), F(7, d)
#define LANES_16(F, d) LANES_8(F, d), F(8, d), F(9, d), F(10, d), F(11, d), F(12, d), F(13, d), F(14, d), F(15, d)
#define LANES_(v, F, d) LANES_##v(F, d)
#define LANES(v, F, d) LANES_(v, F, d)

// Exchange the blocks of d x d off the diagonal of every block of 2d x 2d.
#define SWAP_BLOCKS(d)                                                             \
  UNROLL for (int i = 0; i < V; i++) {                                             \
    if (i & (d)) continue;                                                         \
    vec x = row[i], y = row[i + (d)];                                              \
    row[i] = SHUFFLE(x, y, LANES(LANE_COUNT, SWAP_LOW, d));                                \
    row[i + (d)] = SHUFFLE(x, y, LANES(LANE_COUNT, SWAP_HIGH, d));                         \
  }

#if VECTOR_BYTES == 64
#define FLOAT_LANES 16
#define DOUBLE_LANES 8
#elif VECTOR_BYTES == 32
#define FLOAT_LANES 8
#define DOUBLE_LANES 4
#else
#define FLOAT_LANES 4
#define DOUBLE_LANES 2
#endif
#if REAL_IS_DOUBLE
#define LANE_COUNT DOUBLE_LANES
#define LANE_NUMBER (VECTOR_BYTES / 8)
#else
#define LANE_COUNT FLOAT_LANES
#define LANE_NUMBER (VECTOR_BYTES / 4)
#endif

INLINE void transpose(vec row[V]) {
  SWAP_BLOCKS(1)
#if LANE_NUMBER >= 4
  SWAP_BLOCKS(2)
#endif
#if LANE_NUMBER >= 8
  SWAP_BLOCKS(4)
#endif
#if LANE_NUMBER >= 16
  SWAP_BLOCKS(8)
#endif
}

INLINE REAL sum_of(vec x) {
#if LANE_NUMBER >= 16
  x += SHUFFLE(x, x, LANES(LANE_COUNT, ROTATE, 8));
#endif
#if LANE_NUMBER >= 8
  x += SHUFFLE(x, x, LANES(LANE_COUNT, ROTATE, 4));
#endif
#if LANE_NUMBER >= 4
  x += SHUFFLE(x, x, LANES(LANE_COUNT, ROTATE, 2));
#endif
  return x[0] + x[1];
}

INLINE REAL dot(const REAL *a, const REAL *b, int64_t n) {
  vec sum = {0};
  int64_t i = 0;
  for (; i + V <= n; i += V) sum += load(a + i) * load(b + i);
  REAL rest = 0;
  for (; i < n; i++) rest += a[i] * b[i];
  return sum_of(sum) + rest;
}
