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

// The rows of `t` at these places as pairs: in their place, where each follows the other, or else packed to `room`.
static const REAL *pair_places(REAL *room, const ea_tensor *t, const ea_problem *p, const row_span *rows, int64_t count,
                               int64_t columns) {
  ea_tensor pairs = as_pairs(t);
  if (t->stride[2] == columns && rows->query + count <= p->rows) {
    return row_of(&pairs, REAL_DTYPE, rows->batch, rows->head, rows->query);
  }
  pack_places(room, columns / 2, &pairs, REAL_DTYPE, p, rows, count, columns / 2, 1);
  return room;
}

// Rows 2i and 2i + 1 of those at these places, as `pack_row_pairs` has them.
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

// Two vectors as bfloat16, one after the other; and those as pairs of both.
INLINE __m512i narrow(vec even, vec odd) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even); }

INLINE vec interleaved(__m512i narrow) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vec)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), narrow);
}

// n numbers of two rows, each times its factor, to bfloat16: in pairs, and, if `even_row` is given, row by row too. (It may be
// `odd_row` as well, where there is no odd one.)
static void narrow_rows(REAL *pairs, REAL *even_row, REAL *odd_row, const REAL *even, REAL even_factor, const REAL *odd,
                        REAL odd_factor, int64_t n) {
  for (int64_t j = 0; j < n; j += V) {
    __m512i both = narrow(load(even + j) * even_factor, load(odd + j) * odd_factor);
    store(pairs + j, interleaved(both));
    if (!even_row) continue;
    _mm256_storeu_si256((__m256i *)((uint16_t *)odd_row + j), _mm512_extracti64x4_epi64(both, 1));
    _mm256_storeu_si256((__m256i *)((uint16_t *)even_row + j), _mm512_castsi512_si256(both));
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
