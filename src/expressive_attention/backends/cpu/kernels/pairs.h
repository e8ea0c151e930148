// bfloat16 in pairs, for processors that multiply and add them in one step. The queries are then not scaled, as
// that would round them; `weight` sees to the scale.

// `t` as pairs: a tensor of floats, half as wide.
static ea_tensor as_pairs(const ea_tensor *t) {
  return (ea_tensor){t->data, {t->stride[0] / 2, t->stride[1] / 2, t->stride[2] / 2, 1}};
}

static int are_pairs(const ea_tensor *t) {
  return t->stride[3] == 1 && t->stride[0] % 2 == 0 && t->stride[1] % 2 == 0 && t->stride[2] % 2 == 0 &&
         (uintptr_t)t->data % sizeof(float) == 0;
}

static int can_use_pairs(const ea_problem *p) {
  double scale = fabs(p->scale);
  return HAS_PAIRS && p->dtype == EA_BFLOAT16 && p->width % 2 == 0 && are_pairs(&p->query) && are_pairs(&p->key) &&
         p->value.stride[3] == 1 && scale > 0x1p-40 && scale < 0x1p40;
}

// The same for the backward pass, which has one derivative more of the scale to keep in range, and takes part in no
// product with numbers that are not finite.
static int can_use_pairs_backward(const ea_problem *p);

#if HAS_PAIRS

// Two rows, number by number in pairs; without `odd`, its numbers are 0.
static void pair_rows(REAL *to, int64_t ld, const uint16_t *even, const uint16_t *odd, int64_t columns) {
  uint32_t *pair = (uint32_t *)to;
  if (odd) {
    for (int64_t c = 0; c < columns; c++) pair[c] = even[c] | (uint32_t)odd[c] << 16;
  } else {
    for (int64_t c = 0; c < columns; c++) pair[c] = even[c];
  }
  for (int64_t c = columns; c < ld; c++) pair[c] = 0;
}

// Rows 2i and 2i + 1 of a tensor, number by number in pairs; what is missing is 0.
static void pack_row_pairs(REAL *to, int64_t ld, const ea_tensor *t, int64_t b, int64_t h, int64_t i, int64_t rows,
                           int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2, to += ld) {
    pair_rows(to, ld, row_of(t, EA_BFLOAT16, b, h, i + r), r + 1 < rows ? row_of(t, EA_BFLOAT16, b, h, i + r + 1) : NULL,
              columns);
  }
}

// The same of the rows at these places.
static void pack_place_pairs(REAL *to, int64_t ld, const ea_tensor *t, const row_span *rows, int64_t count,
                             int64_t columns) {
  for (int64_t r = 0; r < count; r += 2, to += ld) {
    const row_span *even = rows + r, *odd = even + 1;
    pair_rows(to, ld, row_of(t, EA_BFLOAT16, even->batch, even->head, even->query),
              r + 1 < count ? row_of(t, EA_BFLOAT16, odd->batch, odd->head, odd->query) : NULL, columns);
  }
}

// n weights to bfloat16.
static void narrow_row(REAL *to, const REAL *from, int64_t n) {
  for (int64_t j = 0; j < n; j += V) {
    _mm256_storeu_si256((__m256i *)((uint16_t *)to + j), (__m256i)_mm512_cvtneps_pbh((__m512)load(from + j)));
  }
}

INLINE uvec narrowed(vec x) { return (uvec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// n numbers of two rows, each times its factor, in pairs of bfloat16.
static void narrow_rows(REAL *to, const REAL *even, REAL even_factor, const REAL *odd, REAL odd_factor, int64_t n) {
  for (int64_t j = 0; j < n; j += V) {
    store(to + j, (vec)(narrowed(load(even + j) * even_factor) | narrowed(load(odd + j) * odd_factor) << 16));
  }
}

// Whether rows of bfloat16 hold neither NaN nor infinity.
static int rows_are_finite(const ea_tensor *t, int64_t b, int64_t heads, int64_t rows, int64_t columns) {
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t i = 0; i < rows; i++) {
      const uint16_t *row = row_of(t, EA_BFLOAT16, b, h, i);
      uint16_t largest = 0;
      for (int64_t c = 0; c < columns; c++) {
        uint16_t magnitude = row[c] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
      }
      if (largest >= 0x7f80) return 0;
    }
  }
  return 1;
}

static int can_use_pairs_backward(const ea_problem *p) {
  double scale = fabs(p->scale);
  if (!can_use_pairs(p) || p->value_width % 2 || !are_pairs(&p->value) || !are_pairs(&p->grad_output)) return 0;
  if (scale < 0x1p-20 || scale > 0x1p20) return 0;
  for (int64_t b = 0; b < p->batch; b++) {
    int64_t keys = key_count(p, b);
    if (!rows_are_finite(&p->query, b, p->heads, p->rows, p->width) ||
        !rows_are_finite(&p->grad_output, b, p->heads, p->rows, p->value_width) ||
        !rows_are_finite(&p->key, b, p->kv_heads, keys, p->width) ||
        !rows_are_finite(&p->value, b, p->kv_heads, keys, p->value_width)) {
      return 0;
    }
  }
  return 1;
}

#else

static int can_use_pairs_backward(const ea_problem *p) {
  (void)p;
  return 0;
}

#endif
