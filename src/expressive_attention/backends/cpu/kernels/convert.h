// Rows of any dtype and stride to rows of REAL, and back.

INLINE int64_t dtype_size(int64_t dtype) {
  switch (dtype) {
    case EA_FLOAT64: return 8;
    case EA_FLOAT32: return 4;
    case EA_BOOL: return 1;
    default: return 2;
  }
}

// The dtype of the normalizer, the bias_max and other numbers of a row.
INLINE int64_t sums_dtype(const ea_problem *p) { return p->dtype == EA_FLOAT64 ? EA_FLOAT64 : EA_FLOAT32; }

INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float from_bfloat16(uint16_t x) { return from_bits((uint32_t)x << 16); }

INLINE float from_float16(uint16_t x) {
  uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = (uint32_t)(x & 0x7fff) << 13;
  // A float16 exponent moved by 2^112 is a float32 one; subnormal numbers come out right as well.
  uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
  return from_bits(sign | ((x & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite));
}

// Rounded to nearest, ties to even.
INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits = to_bits(x);
  return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE uint16_t to_float16(float x) {
  uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {
    // A subnormal float16: adding 1/2 leaves its bits at the end of the float, rounded.
    return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
  }
  magnitude += 0xc8000fff + ((magnitude >> 13) & 1);
  return (uint16_t)(sign | (magnitude >> 13));
}

#define READ(TYPE, EXPRESSION)                                                                        \
  {                                                                                                   \
    const TYPE *p = (const TYPE *)from;                                                               \
    if (stride == 1)                                                                                  \
      for (int64_t i = 0; i < n; i++) { TYPE x = p[i]; to[i] = (REAL)(EXPRESSION); }                  \
    else                                                                                              \
      for (int64_t i = 0; i < n; i++) { TYPE x = p[i * stride]; to[i] = (REAL)(EXPRESSION); }         \
    break;                                                                                            \
  }

// n numbers, `stride` elements apart, as REAL.
static void read_row(REAL *restrict to, const void *from, int64_t dtype, int64_t stride, int64_t n) {
  switch (dtype) {
    case EA_FLOAT32: READ(float, x)
    case EA_FLOAT64: READ(double, x)
    case EA_BFLOAT16: READ(uint16_t, from_bfloat16(x))
    case EA_FLOAT16: READ(uint16_t, from_float16(x))
  }
}

#undef READ

// n numbers of REAL to contiguous ones of `dtype`.
static void write_row(void *to, int64_t dtype, const REAL *restrict from, int64_t n) {
  switch (dtype) {
    case EA_FLOAT32: for (int64_t i = 0; i < n; i++) ((float *)to)[i] = (float)from[i]; break;
    case EA_FLOAT64: for (int64_t i = 0; i < n; i++) ((double *)to)[i] = from[i]; break;
    case EA_BFLOAT16: for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bfloat16((float)from[i]); break;
    case EA_FLOAT16: for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = to_float16((float)from[i]); break;
  }
}

INLINE REAL read_number(const void *from, int64_t dtype, int64_t index) {
  REAL x = 0;
  read_row(&x, (const char *)from + index * dtype_size(dtype), dtype, 1, 1);
  return x;
}

INLINE void write_number(void *to, int64_t dtype, int64_t index, REAL x) {
  write_row((char *)to + index * dtype_size(dtype), dtype, &x, 1);
}

// The row (b, h, i) of a tensor.
INLINE const void *row_of(const ea_tensor *t, int64_t dtype, int64_t b, int64_t h, int64_t i) {
  return (const char *)t->data + (b * t->stride[0] + h * t->stride[1] + i * t->stride[2]) * dtype_size(dtype);
}
