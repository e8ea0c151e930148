// Matrix products on tiles of MR rows by NR vectors that stay in registers: all arithmetic but the elementwise.
//
// Throughout, A is given by single numbers and B, C by rows of vectors. B is a panel: `n` rows, `ldb` apart.

// C[i] += sum_k a[i * ai + k * ak] * B[k], for the `mr` rows and `nr` vectors of a tile.
INLINE void multiply(vec c[MR][NR], const int mr, const int nr, int64_t n, const REAL *a, int64_t ai, int64_t ak,
                     const REAL *b, int64_t ldb) {
  for (int64_t k = 0; k < n; k++, a += ak, b += ldb) {
    vec row[NR];
    UNROLL for (int j = 0; j < nr; j++) row[j] = load(b + j * V);
    UNROLL for (int i = 0; i < mr; i++) {
      vec x = splat(a[i * ai]);
      UNROLL for (int j = 0; j < nr; j++) c[i][j] += x * row[j];
    }
  }
}

// W = f(A B). Where `sum` is given, also sum[i] += W[i], a vector per row.
INLINE void weights_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                         REAL *w, int64_t ldw, REAL *sum, const int squared) {
  vec z[MR][NR] = {0};
  multiply(z, mr, nr, n, a, lda, 1, b, ldb);
  UNROLL for (int i = 0; i < mr; i++) {
    vec total = {0};
    UNROLL for (int j = 0; j < nr; j++) {
      vec x = weight(z[i][j], squared);
      store(w + i * ldw + j * V, x);
      total += x;
    }
    if (sum) store(sum + i * V, load(sum + i * V) + total);
  }
}

// W = f(A B), H = f'(A B) / 2.
INLINE void slopes_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                        REAL *w, REAL *h, int64_t ldw, const int squared) {
  vec z[MR][NR] = {0};
  multiply(z, mr, nr, n, a, lda, 1, b, ldb);
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) {
      vec half_slope;
      store(w + i * ldw + j * V, weight_and_slope(z[i][j], squared, &half_slope));
      store(h + i * ldw + j * V, half_slope);
    }
  }
}

// C = A B.
INLINE void product_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb,
                         REAL *to, int64_t ldc) {
  vec c[MR][NR] = {0};
  multiply(c, mr, nr, n, a, lda, 1, b, ldb);
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) store(to + i * ldc + j * V, c[i][j]);
  }
}

// C += A B, or C += A^T B where `transposed`.
INLINE void add_tile(const int mr, const int nr, int64_t n, const REAL *a, int64_t lda, const int transposed,
                     const REAL *b, int64_t ldb, REAL *to, int64_t ldc) {
  vec c[MR][NR];
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) c[i][j] = load(to + i * ldc + j * V);
  }
  multiply(c, mr, nr, n, a, transposed ? 1 : lda, transposed ? lda : 1, b, ldb);
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) store(to + i * ldc + j * V, c[i][j]);
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
  else if (nr == 2) { WITH_ROWS(2, TILE, __VA_ARGS__) } \
  else { WITH_ROWS(1, TILE, __VA_ARGS__) }
#else
#define WITH_SIZES(TILE, ...)                      \
  if (nr == 2) { WITH_ROWS(2, TILE, __VA_ARGS__) } \
  else { WITH_ROWS(1, TILE, __VA_ARGS__) }
#endif

static void weights(int mr, int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *w,
                    int64_t ldw, REAL *sum, int squared) {
  if (squared) {
    WITH_SIZES(weights_tile, n, a, lda, b, ldb, w, ldw, sum, 1)
  } else {
    WITH_SIZES(weights_tile, n, a, lda, b, ldb, w, ldw, sum, 0)
  }
}

static void slopes(int mr, int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *w, REAL *h,
                   int64_t ldw, int squared) {
  if (squared) {
    WITH_SIZES(slopes_tile, n, a, lda, b, ldb, w, h, ldw, 1)
  } else {
    WITH_SIZES(slopes_tile, n, a, lda, b, ldb, w, h, ldw, 0)
  }
}

static void product(int mr, int nr, int64_t n, const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *to,
                    int64_t ldc) {
  WITH_SIZES(product_tile, n, a, lda, b, ldb, to, ldc)
}

static void add(int mr, int nr, int64_t n, const REAL *a, int64_t lda, int transposed, const REAL *b, int64_t ldb,
                REAL *to, int64_t ldc) {
  if (transposed) {
    WITH_SIZES(add_tile, n, a, lda, 1, b, ldb, to, ldc)
  } else {
    WITH_SIZES(add_tile, n, a, lda, 0, b, ldb, to, ldc)
  }
}
