// Few rows of queries against many keys, as in decoding: the time is that of reading keys and values once, so
// nothing is packed. Scores are dot products along the rows of the keys, V keys at a time.

// Rows up to which this is faster than packing.
#define FEW_ROWS 4

// Keys of a block: long, as memory is fastest when read in order.
#define FEW_ROWS_KEYS 4096

// Vectors of a row of the output that stay in registers.
#define WIDE 8

#if defined(__AVX512F__) || defined(__F16C__)
#define READS_FLOAT16 1
#else
#define READS_FLOAT16 0
#endif

INLINE int can_read(const ea_problem *p, const ea_tensor *t, int64_t width) {
  if (t->stride[3] != 1 || width % V) return 0;
  return p->dtype == REAL_DTYPE || (!REAL_IS_DOUBLE && (p->dtype == EA_BFLOAT16 || READS_FLOAT16));
}

#if !REAL_IS_DOUBLE
typedef uint16_t half_vec __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
#endif

// V numbers of `dtype` from p on.
INLINE vec load_as(const char *p, const int64_t dtype) {
#if !REAL_IS_DOUBLE
  if (dtype == EA_BFLOAT16) return (vec)(__builtin_convertvector(*(const half_vec *)p, uvec) << 16);
#if defined(__AVX512F__)
  if (dtype == EA_FLOAT16) return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif READS_FLOAT16
  if (dtype == EA_FLOAT16) return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
#endif
  (void)dtype;
  return load((const REAL *)p);
}

// The sums of V vectors.
INLINE vec sums_of(vec x[V]) {
  transpose(x);
  vec sum = x[0];
  UNROLL for (int i = 1; i < V; i++) sum += x[i];
  return sum;
}

INLINE void few_weights(const ea_problem *p, const int64_t dtype, int64_t b, int64_t kv_head, int64_t key, int64_t n,
                        const REAL *query, int count, REAL *w, int64_t ldw) {
  const int64_t size = dtype == EA_FLOAT64 ? 8 : dtype == EA_FLOAT32 ? 4 : 2;
  int64_t stride = p->key.stride[2] * size;
  const char *keys = row_of(&p->key, dtype, b, kv_head, key);
  for (int64_t j = 0; j < n; j += V, keys += V * stride) {
    for (int i = 0; i < count; i++) {
      vec sum[V] = {0};
      if (n - j >= V) {
        // Row by row: memory is fastest when read in order.
        UNROLL for (int r = 0; r < V; r++) {
          for (int64_t e = 0; e < p->width; e += V) {
            sum[r] += load(query + i * p->width + e) * load_as(keys + r * stride + e * size, dtype);
          }
        }
        store(w + i * ldw + j, weight(sums_of(sum), (int)p->squared, 1, 1));
      } else {
        REAL z[V] = {0};
        for (int64_t r = 0; r < n - j; r++) {
          vec one = {0};
          for (int64_t e = 0; e < p->width; e += V) {
            one += load(query + i * p->width + e) * load_as(keys + r * stride + e * size, dtype);
          }
          z[r] = sum_of(one);
        }
        store(w + i * ldw + j, weight(load(z), (int)p->squared, 1, 1));
      }
    }
  }
}

// to += w V, for `nr` vectors of a row that stay in registers.
INLINE void few_values_tile(const int nr, const int64_t dtype, int64_t n, const char *values, int64_t stride,
                            const int64_t size, const REAL *w, REAL *to) {
  vec c[WIDE];
  UNROLL for (int j = 0; j < nr; j++) c[j] = load(to + j * V);
  for (int64_t k = 0; k < n; k++, values += stride) {
    UNROLL for (int j = 0; j < nr; j++) {
      c[j] += w[k] * load_as(values + j * V * size, dtype);
    }
  }
  UNROLL for (int j = 0; j < nr; j++) store(to + j * V, c[j]);
}

INLINE void few_values(const ea_problem *p, const int64_t dtype, int64_t b, int64_t kv_head, int64_t key, int64_t n,
                       const REAL *w, int64_t ldw, int count, REAL *to, int64_t ldc) {
  const int64_t size = dtype == EA_FLOAT64 ? 8 : dtype == EA_FLOAT32 ? 4 : 2;
  int64_t stride = p->value.stride[2] * size, vectors = p->value_width / V;
  const char *values = row_of(&p->value, dtype, b, kv_head, key);
  for (int i = 0; i < count; i++, w += ldw, to += ldc) {
    int64_t c = 0;
    for (; c + WIDE <= vectors; c += WIDE) {
      few_values_tile(WIDE, dtype, n, values + c * V * size, stride, size, w, to + c * V);
    }
    for (; c + 4 <= vectors; c += 4) few_values_tile(4, dtype, n, values + c * V * size, stride, size, w, to + c * V);
    for (; c < vectors; c++) few_values_tile(1, dtype, n, values + c * V * size, stride, size, w, to + c * V);
  }
}

#if REAL_IS_DOUBLE
#define WITH_DTYPE(FUNCTION, ...) FUNCTION(p, EA_FLOAT64, __VA_ARGS__);
#else
#define WITH_DTYPE(FUNCTION, ...)                                                \
  if (p->dtype == EA_FLOAT32) { FUNCTION(p, EA_FLOAT32, __VA_ARGS__); }           \
  else if (p->dtype == EA_BFLOAT16) { FUNCTION(p, EA_BFLOAT16, __VA_ARGS__); }    \
  else { FUNCTION(p, EA_FLOAT16, __VA_ARGS__); }
#endif

#if !REAL_IS_DOUBLE
// For rows that share keys of 16 bits: each number is brought to REAL once for all of them. Sums have the same order.

// Keys whose values are added at a time: they stay in the first cache for all of their columns.
#define FEW_VALUES 32

// Scores of `mr` rows and `nk` keys as vectors that are still to be summed, those of row i from sums[i * V] on.
INLINE void shared_scores_tile(const int mr, const int nk, const int64_t dtype, int64_t width, const REAL *query,
                               const char *keys, int64_t stride, vec *sums) {
  vec c[FEW_ROWS][NR] = {0};
  for (int64_t e = 0; e < width; e += V) {
    vec key[NR];
    UNROLL for (int r = 0; r < nk; r++) key[r] = load_as(keys + r * stride + e * 2, dtype);
    UNROLL for (int i = 0; i < mr; i++) {
      vec q = load(query + i * width + e);
      UNROLL for (int r = 0; r < nk; r++) c[i][r] += q * key[r];
    }
  }
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int r = 0; r < nk; r++) sums[i * V + r] = c[i][r];
  }
}

INLINE void shared_weights(const ea_problem *p, const int64_t dtype, const int count, int64_t b, int64_t kv_head,
                           int64_t key, int64_t n, const REAL *query, REAL *w, int64_t ldw) {
  int64_t stride = p->key.stride[2] * 2;
  const char *keys = row_of(&p->key, dtype, b, kv_head, key);
  for (int64_t j = 0; j < n; j += V, keys += V * stride) {
    vec sums[FEW_ROWS * V] = {0};
    int exist = (int)least(V, n - j), r = 0;
    for (; r + NR <= exist; r += NR) {
      shared_scores_tile(count, NR, dtype, p->width, query, keys + r * stride, stride, sums + r);
    }
    for (; r < exist; r++) shared_scores_tile(count, 1, dtype, p->width, query, keys + r * stride, stride, sums + r);
    UNROLL for (int i = 0; i < count; i++) {
      store(w + i * ldw + j, weight(sums_of(sums + i * V), (int)p->squared, 1, 1));
    }
  }
}

// to += w V, for `mr` rows and `nr` vectors of each that stay in registers.
INLINE void shared_values_tile(const int mr, const int nr, const int64_t dtype, int64_t n, const char *values,
                               int64_t stride, const REAL *w, int64_t ldw, REAL *to, int64_t ldc) {
  vec c[FEW_ROWS][NR];
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) c[i][j] = load(to + i * ldc + j * V);
  }
  for (int64_t k = 0; k < n; k++, values += stride) {
    vec value[NR];
    UNROLL for (int j = 0; j < nr; j++) value[j] = load_as(values + j * V * 2, dtype);
    UNROLL for (int i = 0; i < mr; i++) {
      UNROLL for (int j = 0; j < nr; j++) c[i][j] += w[i * ldw + k] * value[j];
    }
  }
  UNROLL for (int i = 0; i < mr; i++) {
    UNROLL for (int j = 0; j < nr; j++) store(to + i * ldc + j * V, c[i][j]);
  }
}

INLINE void shared_values(const ea_problem *p, const int64_t dtype, const int count, int64_t b, int64_t kv_head,
                          int64_t key, int64_t n, const REAL *w, int64_t ldw, REAL *to, int64_t ldc) {
  int64_t stride = p->value.stride[2] * 2, vectors = p->value_width / V;
  for (int64_t j = 0; j < n; j += FEW_VALUES) {
    const char *values = row_of(&p->value, dtype, b, kv_head, key + j);
    int64_t c = 0, some = least(FEW_VALUES, n - j);
    for (; c + NR <= vectors; c += NR) {
      shared_values_tile(count, NR, dtype, some, values + c * V * 2, stride, w + j, ldw, to + c * V, ldc);
    }
    for (; c < vectors; c++) {
      shared_values_tile(count, 1, dtype, some, values + c * V * 2, stride, w + j, ldw, to + c * V, ldc);
    }
  }
}

// Run a function of 16 bits with dtype and number of rows as constants.
#define WITH_COUNT(FUNCTION, DTYPE, ...)                \
  switch (count) {                                      \
    case 2: FUNCTION(p, DTYPE, 2, __VA_ARGS__); return; \
    case 3: FUNCTION(p, DTYPE, 3, __VA_ARGS__); return; \
    case 4: FUNCTION(p, DTYPE, 4, __VA_ARGS__); return; \
  }
#define WITH_SHARED(FUNCTION, ...)                                                \
  if (p->dtype == EA_BFLOAT16) { WITH_COUNT(FUNCTION, EA_BFLOAT16, __VA_ARGS__) }  \
  if (p->dtype == EA_FLOAT16) { WITH_COUNT(FUNCTION, EA_FLOAT16, __VA_ARGS__) }
#else
#define WITH_SHARED(FUNCTION, ...)
#endif

// Weights, without mask, of `count` rows of (scaled) queries over n keys from `key`.
static void few_rows_weights(const ea_problem *p, int64_t b, int64_t kv_head, int64_t key, int64_t n,
                             const REAL *query, int count, REAL *w, int64_t ldw) {
  WITH_SHARED(shared_weights, b, kv_head, key, n, query, w, ldw)
  WITH_DTYPE(few_weights, b, kv_head, key, n, query, count, w, ldw)
}

// output += weights * values.
static void few_rows_values(const ea_problem *p, int64_t b, int64_t kv_head, int64_t key, int64_t n, const REAL *w,
                            int64_t ldw, int count, REAL *to, int64_t ldc) {
  WITH_SHARED(shared_values, b, kv_head, key, n, w, ldw, to, ldc)
  WITH_DTYPE(few_values, b, kv_head, key, n, w, ldw, count, to, ldc)
}
