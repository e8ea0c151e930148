// Vectors with numbers that are not finite, in the backward pass. In a matrix product, 0 times such a number is NaN, and
// would reach what does not see it. So these vectors take part as zeros, and the pairs that do see one are made NaN.

// NaN for the rows and keys of a block that have such a number in their vectors, 0 for the others.
typedef struct {
  REAL *rows;           // in query or upstream
  REAL *keys, *values;
  int any_key;          // whether there is one among keys and values
  uint8_t *seen;        // room for what `read_seen` finds
} not_finite;

// NaN if one of n numbers (padded to whole vectors) is not finite, else 0.
INLINE REAL check_row(const REAL *row, int64_t n) {
  vec sum = {0};
  for (int64_t i = 0; i < n; i += V) sum += load(row + i) * 0;
  return sum_of(sum);
}

// Check the n columns of transposed panels of `width` rows, and clear those that are not finite. Return whether there
// are any.
static int clear_columns(REAL *panels, int64_t n, int64_t width, REAL *bad) {
  vec any = {0};
  for (int64_t start = 0; start < n; start += PANEL) {
    int64_t ld = panel_width(start, n);
    for (int64_t j = 0; j < ld; j += V) {
      vec sum = {0};
      for (int64_t e = 0; e < width; e++) sum += load(panels + start * width + e * ld + j) * 0;
      store(bad + start + j, sum);
      any += sum;
    }
  }
  if (sum_of(any) == 0) return 0;
  for (int64_t j = 0; j < n; j++) {
    int64_t start = j / PANEL * PANEL, ld = panel_width(start, n);
    for (int64_t e = 0; e < width && bad[j] != 0; e++) panels[start * width + e * ld + j - start] = 0;
  }
  return 1;
}
