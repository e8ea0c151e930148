// Matrix products on tiles of MR rows by NR vectors that stay in registers: all arithmetic but the elementwise.
//
// Throughout, A is given by single numbers and B, C by rows of vectors. B is a panel: `n` rows, `ldb` apart.

// c + a b, number by number. With `pairs`, what looks like a float is a pair of bfloat16, and each number of the
// result has the products of both.
INLINE vec fused(vec c, vec a, vec b, const int pairs) {
#if HAS_PAIRS
  if (pairs) return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  (void)pairs;
  return c + a * b;
}

// C[i] += sum_k a[i * ai + k * ak] * B[k], for the `mr` rows and `nr` vectors of a tile.
INLINE void multiply(vec c[MR][NR], const int mr, const int nr, int64_t n, const REAL *a, int64_t ai, int64_t ak,
                     const REAL *b, int64_t ldb, const int pairs) {
  for (int64_t k = 0; k < n; k++, a += ak, b += ldb) {
    vec row[NR];
    UNROLL for (int j = 0; j < nr; j++) row[j] = load(b + j * V);
    UNROLL for (int i = 0; i < mr; i++) {
      vec x = splat(a[i * ai]);
      UNROLL for (int j = 0; j < nr; j++) c[i][j] = fused(c[i][j], x, row[j], pairs);
    }
  }
}

// How scores become weights, and where they go.
typedef struct {
  int squared;
  REAL scale2, inverse;  // as in `weight`
  REAL *weights;         // rows `ld` apart; with `pairs`, of bfloat16
  int64_t ld;
  int64_t column;  // of the first
  REAL *sums;      // a vector per row to which its weights are added, or NULL
} weights_target;

// W = f(A B). With `pairs`, A and B hold pairs of bfloat16; with `narrow`, W too.
INLINE void weights_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                         const weights_target *to, const int squared, const int pairs, const int narrow) {
  vec z[MR][NR] = {0};
  multiply(z, mr, nr, n, a, lda, 1, b, ldb, pairs);
  UNROLL for (int i = 0; i < mr; i++) {
    vec total = {0};
    UNROLL for (int j = 0; j < nr; j++) {
      vec x = weight(z[i][j], squared, pairs ? to->scale2 : 1, pairs ? to->inverse : 1);
      total += x;
#if HAS_PAIRS
      if (narrow) {
        __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)x);
        _mm256_storeu_si256((__m256i *)((uint16_t *)(to->weights + i * to->ld) + to->column + j * V), half);
        continue;
      }
#endif
      store(to->weights + i * to->ld + to->column + j * V, x);
    }
    if (to->sums) store(to->sums + i * V, load(to->sums + i * V) + total);
  }
  (void)narrow;
}

// W = f(A B), H = f'(A B) / 2 as `weight_and_half_derivative` has them.
INLINE void derivatives_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                        REAL *w, REAL *h, int64_t ldw, REAL scale2, REAL inverse, const int squared, const int pairs) {
  vec z[MR][NR] = {0};
  multiply(z, mr, nr, n, a, lda, 1, b, ldb, pairs);
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) {
      vec half_derivative;
      vec x = weight_and_half_derivative(z[i][j], squared, pairs ? scale2 : 1, pairs ? inverse : 1, &half_derivative);
      store(w + i * ldw + j * V, x);
      store(h + i * ldw + j * V, half_derivative);
    }
  }
}

// C = A B.
INLINE void product_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                         REAL *to, int64_t ldc, const int pairs) {
  vec c[MR][NR] = {0};
  multiply(c, mr, nr, n, a, lda, 1, b, ldb, pairs);
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) store(to + i * ldc + j * V, c[i][j]);
  }
}

// C += A B, or C += A^T B where `transposed`. The product is summed on its own: in long problems C would be large
// beside each of its terms, and round them off.
INLINE void add_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const int transposed,
                     const REAL *b, int64_t ldb, REAL *to, int64_t ldc, const int pairs) {
  vec c[MR][NR] = {0};
  multiply(c, mr, nr, n, a, transposed ? 1 : lda, transposed ? lda : 1, b, ldb, pairs);
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) store(to + i * ldc + j * V, load(to + i * ldc + j * V) + c[i][j]);
  }
}

// Run a tile function with its sizes as constants.
#define WITH_ROWS(nr, TILE, ...)           \
  switch (mr) {                            \
    case 1: TILE(1, nr, __VA_ARGS__); break; \
    case 2: TILE(2, nr, __VA_ARGS__); break; \
    case 3: TILE(3, nr, __VA_ARGS__); break; \
    case 4: TILE(4, nr, __VA_ARGS__); break; \
    case 5: TILE(5, nr, __VA_ARGS__); break; \
    case 6: TILE(6, nr, __VA_ARGS__); break; \
  }
#if NR == 4
#define WITH_SIZES(TILE, ...)                          \
  if (nr == 4) { WITH_ROWS(4, TILE, __VA_ARGS__) }     \
  else if (nr == 3) { WITH_ROWS(3, TILE, __VA_ARGS__) } \
  else if (nr == 2) { WITH_ROWS(2, TILE, __VA_ARGS__) } \
  else { WITH_ROWS(1, TILE, __VA_ARGS__) }
#else
#define WITH_SIZES(TILE, ...)                      \
  if (nr == 2) { WITH_ROWS(2, TILE, __VA_ARGS__) } \
  else { WITH_ROWS(1, TILE, __VA_ARGS__) }
#endif

static void weights(int mr, int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                    const weights_target *to, int pairs, int narrow) {
#if HAS_PAIRS
  if (pairs && to->squared) {
    if (narrow) {
      WITH_SIZES(weights_tile, n, a, lda, b, ldb, to, 1, 1, 1)
    } else {
      WITH_SIZES(weights_tile, n, a, lda, b, ldb, to, 1, 1, 0)
    }
    return;
  }
  if (pairs) {
    if (narrow) {
      WITH_SIZES(weights_tile, n, a, lda, b, ldb, to, 0, 1, 1)
    } else {
      WITH_SIZES(weights_tile, n, a, lda, b, ldb, to, 0, 1, 0)
    }
    return;
  }
#endif
  (void)pairs, (void)narrow;
  if (to->squared) {
    WITH_SIZES(weights_tile, n, a, lda, b, ldb, to, 1, 0, 0)
  } else {
    WITH_SIZES(weights_tile, n, a, lda, b, ldb, to, 0, 0, 0)
  }
}

static void derivatives(int mr, int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *w, REAL *h,
                   int64_t ldw, REAL scale2, REAL inverse, int squared, int pairs) {
#if HAS_PAIRS
  if (pairs && squared) {
    WITH_SIZES(derivatives_tile, n, a, lda, b, ldb, w, h, ldw, scale2, inverse, 1, 1)
    return;
  }
  if (pairs) {
    WITH_SIZES(derivatives_tile, n, a, lda, b, ldb, w, h, ldw, scale2, inverse, 0, 1)
    return;
  }
#endif
  (void)pairs;
  if (squared) {
    WITH_SIZES(derivatives_tile, n, a, lda, b, ldb, w, h, ldw, scale2, inverse, 1, 0)
  } else {
    WITH_SIZES(derivatives_tile, n, a, lda, b, ldb, w, h, ldw, scale2, inverse, 0, 0)
  }
}

static void product(int mr, int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *to,
                    int64_t ldc, int pairs) {
#if HAS_PAIRS
  if (pairs) {
    WITH_SIZES(product_tile, n, a, lda, b, ldb, to, ldc, 1)
    return;
  }
#endif
  (void)pairs;
  WITH_SIZES(product_tile, n, a, lda, b, ldb, to, ldc, 0)
}

static void add(int mr, int nr, int64_t n, const REAL *a, int64_t lda, int transposed, const REAL *b, int64_t ldb,
                REAL *to, int64_t ldc) {
  if (transposed) {
    WITH_SIZES(add_tile, n, a, lda, 1, b, ldb, to, ldc, 0)
  } else {
    WITH_SIZES(add_tile, n, a, lda, 0, b, ldb, to, ldc, 0)
  }
}

// The same with pairs: n counts them.
static void add_pairs(int mr, int nr, int64_t n, const REAL *a, int64_t lda, int transposed, const REAL *b, int64_t ldb,
                      REAL *to, int64_t ldc) {
#if HAS_PAIRS
  if (transposed) {
    WITH_SIZES(add_tile, n, a, lda, 1, b, ldb, to, ldc, 1)
  } else {
    WITH_SIZES(add_tile, n, a, lda, 0, b, ldb, to, ldc, 1)
  }
#else
  (void)mr, (void)nr, (void)n, (void)a, (void)lda, (void)transposed, (void)b, (void)ldb, (void)to, (void)ldc;
#endif
}
