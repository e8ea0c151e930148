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

#if HAS_PAIRS

// Rows 2i and 2i + 1 of the values, number by number in pairs; what is missing is 0.
static void pack_row_pairs(REAL *to, int64_t ld, const ea_tensor *t, int64_t b, int64_t h, int64_t i, int64_t rows,
                           int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2, to += ld) {
    const uint16_t *even = row_of(t, EA_BFLOAT16, b, h, i + r);
    const uint16_t *odd = r + 1 < rows ? row_of(t, EA_BFLOAT16, b, h, i + r + 1) : NULL;
    uint32_t *pair = (uint32_t *)to;
    if (odd) {
      for (int64_t c = 0; c < columns; c++) pair[c] = even[c] | (uint32_t)odd[c] << 16;
    } else {
      for (int64_t c = 0; c < columns; c++) pair[c] = even[c];
    }
    for (int64_t c = columns; c < ld; c++) pair[c] = 0;
  }
}

// n weights to bfloat16.
static void narrow_row(REAL *to, const REAL *from, int64_t n) {
  for (int64_t j = 0; j < n; j += V) {
    _mm256_storeu_si256((__m256i *)((uint16_t *)to + j), (__m256i)_mm512_cvtneps_pbh((__m512)load(from + j)));
  }
}

#endif
