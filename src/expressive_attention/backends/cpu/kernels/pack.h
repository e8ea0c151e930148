// Blocks of a tensor as the tiles want them: REAL, contiguous, padded with zeros.

// The columns of a panel that begins at column `start` of `columns`: PANEL, or fewer for the last.
INLINE int64_t panel_width(int64_t start, int64_t columns) {
  return columns - start >= PANEL ? PANEL : tile_vectors(columns - start) * V;
}

// The columns of all panels of `columns`.
INLINE int64_t padded(int64_t columns) {
  int64_t whole = columns / PANEL * PANEL;
  return whole + (whole < columns ? panel_width(whole, columns) : 0);
}

INLINE void scale_row(REAL *row, int64_t n, REAL scale) {
  for (int64_t i = 0; i < n; i++) row[i] *= scale;
}

// Have rows of `t` brought to the second cache.
static void prefetch_rows(const ea_tensor *t, int64_t dtype, int64_t b, int64_t h, int64_t i, int64_t rows,
                          int64_t columns) {
  int64_t bytes = columns * t->stride[3] * dtype_size(dtype);
  for (int64_t r = 0; r < rows; r++) {
    const char *row = row_of(t, dtype, b, h, i + r);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 1);
  }
}

// `rows` rows of `t` beginning at (b, h, i), times `scale`, `ld` apart; columns up to `ld` are 0.
static void pack_rows(REAL *to, int64_t ld, const ea_tensor *t, int64_t dtype, int64_t b, int64_t h, int64_t i,
                      int64_t rows, int64_t columns, REAL scale) {
  for (int64_t r = 0; r < rows; r++, to += ld) {
    read_row(to, row_of(t, dtype, b, h, i + r), dtype, t->stride[3], columns);
    if (scale != 1) scale_row(to, columns, scale);
    for (int64_t c = columns; c < ld; c++) to[c] = 0;
  }
}

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // GCC before 12
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (ivec){__VA_ARGS__})
#endif

#define SWAP_LOW(p, d) ((p) & (d) ? V + (p) - (d) : (p))
#define SWAP_HIGH(p, d) ((p) & (d) ? V + (p) : (p) + (d))
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
    row[i] = SHUFFLE(x, y, LANES(LANE_COUNT, SWAP_LOW, d));        \
    row[i + (d)] = SHUFFLE(x, y, LANES(LANE_COUNT, SWAP_HIGH, d)); \
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

// `rows` rows of `t` beginning at (b, h, i), transposed: panels of PANEL rows, each `columns` x panel width.
// `room` is for V rows of round_up(columns, V) numbers.
static void pack_transposed(REAL *to, const ea_tensor *t, int64_t dtype, int64_t b, int64_t h, int64_t i, int64_t rows,
                            int64_t columns, REAL *room) {
  int64_t ld = round_up(columns, V);
  int readable = dtype == REAL_DTYPE && t->stride[3] == 1 && columns == ld;
  for (int64_t start = 0; start < rows; start += PANEL) {
    int64_t width = panel_width(start, rows);
    for (int64_t j = 0; j < width; j += V) {
      const REAL *row[V];
      int64_t count = most(0, least(V, rows - start - j));
      for (int64_t r = 0; r < V; r++) {
        const void *from = r < count ? row_of(t, dtype, b, h, i + start + j + r) : NULL;
        row[r] = room + r * ld;
        if (from && readable) {
          row[r] = from;
        } else {
          if (from) read_row(room + r * ld, from, dtype, t->stride[3], columns);
          for (int64_t c = from ? columns : 0; c < ld; c++) room[r * ld + c] = 0;
        }
      }
      for (int64_t c = 0; c < columns; c += V) {
        vec block[V];
        UNROLL for (int r = 0; r < V; r++) block[r] = load(row[r] + c);
        // Stores retire in order: without this, each would wait for its line to come from the second cache.
        UNROLL for (int r = 0; r < V; r++) __builtin_prefetch(to + (c + V + r) * width + j, 1, 3);
        transpose(block);
        if (c + V <= columns) {
          UNROLL for (int r = 0; r < V; r++) store(to + (c + r) * width + j, block[r]);
        } else {
          REAL rest[V * V];
          UNROLL for (int r = 0; r < V; r++) store(rest + r * V, block[r]);
          for (int64_t r = 0; r < columns - c; r++) memcpy(to + (c + r) * width + j, rest + r * V, sizeof(vec));
        }
      }
    }
    to += columns * width;
  }
}
