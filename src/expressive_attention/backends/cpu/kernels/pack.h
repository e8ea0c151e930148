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

// Rows that are asked for so many rows before they are needed come in time.
#define ROWS_AHEAD 8

// Tasks that read fewer numbers end before what they ask for comes.
#define LEAST_AHEAD 4096

// Have a row brought to the caches.
INLINE void bring(const void *row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)row + at, 0, 3);
}

// Rows of tensors that a thread needs next: some of them are brought to the second cache at a time, while it computes with
// others.
typedef struct {
  struct {
    const char *row;
    int64_t bytes, stride, rows;
  } parts[5];
  int count;
  int64_t rows;  // of all parts
} lookahead;

static void look_at(lookahead *ahead, const ea_tensor *t, int64_t dtype, int64_t b, int64_t h, int64_t i, int64_t rows,
                    int64_t columns) {
  if (rows <= 0 || columns == 0) return;
  int64_t size = dtype_size(dtype), part = ahead->count++;
  ahead->parts[part].row = row_of(t, dtype, b, h, i);
  ahead->parts[part].bytes = columns * t->stride[3] * size;
  ahead->parts[part].stride = t->stride[2] * size;
  ahead->parts[part].rows = rows;
  ahead->rows += rows;
}

static void bring_rows(lookahead *ahead, int64_t rows) {
  for (; rows > 0 && ahead->count > 0; rows--) {
    int part = ahead->count - 1;
    const char *row = ahead->parts[part].row;
    for (int64_t at = 0; at < ahead->parts[part].bytes; at += 64) __builtin_prefetch(row + at, 0, 1);
    ahead->parts[part].row = moved(row, ahead->parts[part].stride);
    if (--ahead->parts[part].rows == 0) ahead->count--;
  }
}

INLINE void bring_some(lookahead *ahead, int64_t rows) {
  if (ahead->count > 0) bring_rows(ahead, rows);
}

// How many rows at a time bring all in so many times.
INLINE int64_t rows_at_a_time(const lookahead *ahead, int64_t times) {
  return ahead->count > 0 ? (ahead->rows + times - 1) / times : 0;
}

// `rows` rows of `t` beginning at (b, h, i), times `scale`, `ld` apart; columns up to `ld` are 0.
static void pack_rows(REAL *to, int64_t ld, const ea_tensor *t, int64_t dtype, int64_t b, int64_t h, int64_t i,
                      int64_t rows, int64_t columns, REAL scale) {
  for (int64_t r = 0; r < rows; r++, to += ld) {
    const void *from = row_of(t, dtype, b, h, i + r);
    int64_t c = 0;
    if (dtype == REAL_DTYPE && t->stride[3] == 1) {  // short rows are to cost little
      for (; c + V <= columns; c += V) store(to + c, load((const REAL *)from + c) * scale);
      for (; c < columns; c++) to[c] = ((const REAL *)from)[c] * scale;
    } else {
      read_row(to, from, dtype, t->stride[3], columns);
      if (scale != 1) scale_row(to, columns, scale);
    }
    for (c = columns; c < ld; c++) to[c] = 0;
  }
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
