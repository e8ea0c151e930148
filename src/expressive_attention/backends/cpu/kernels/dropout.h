// Dropout: which weights are kept, without storing it. Pair (b, h, i, j) is dropped if the upper 24 bits of word
// j / 16 % 4 of Philox4x32-10 (Salmon et al., SC 2011) are less than p 2^24. Its key is the seed, its counter is
// (j / 64 * 16 + j % 16, first + i, b Hq + h, offset). So 16 lanes decide 64 keys in a row. dropout.py has the same in torch.

#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u

#define KEPT_KEYS 64  // of a word of bits

typedef uint64_t long_vec __attribute__((vector_size(VECTOR_BYTES)));

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE_WORDS(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE_WORDS(x, y, ...) __builtin_shuffle(x, y, (uvec){__VA_ARGS__})
#endif
#define LOW_WORD(p, n) ((p) & 1 ? (n) + (p) - 1 : (p))
#define HIGH_WORD(p, n) ((p) & 1 ? (n) + (p) : (p) + 1)

// The products of the even words of x and m.
INLINE long_vec multiply_even(uvec x, uvec m) {
#if defined(__AVX512F__)
  return (long_vec)_mm512_mul_epu32((__m512i)x, (__m512i)m);
#elif defined(__AVX2__)
  return (long_vec)_mm256_mul_epu32((__m256i)x, (__m256i)m);
#elif defined(__SSE2__)
  return (long_vec)_mm_mul_epu32((__m128i)x, (__m128i)m);
#else
  return ((long_vec)x & 0xffffffff) * ((long_vec)m & 0xffffffff);
#endif
}

INLINE void multiply_words(uvec x, uint32_t m, uvec *high, uvec *low) {
  uvec factor = (uvec){0} + m;
  uvec even = (uvec)multiply_even(x, factor), odd = (uvec)multiply_even((uvec)((long_vec)x >> 32), factor);
  *low = SHUFFLE_WORDS(even, odd, LANES(FLOAT_LANES, LOW_WORD, FLOAT_LANES));
  *high = SHUFFLE_WORDS(even, odd, LANES(FLOAT_LANES, HIGH_WORD, FLOAT_LANES));
}

INLINE uint32_t multiply_high(uint32_t x, uint32_t m) { return (uint32_t)((uint64_t)x * m >> 32); }

// The result of rounds 0 to 2 on a counter is in part the same for all rows, and in part for all lanes.
typedef struct {
  uvec x3, y1, z2, z3;
} philox_lanes;

typedef struct {
  uint32_t seed[2], offset, first_row;
  int64_t first_head;  // b Hq
} philox_key;

INLINE philox_lanes prepare_lanes(const philox_key *k, uint32_t head, uvec c0) {
  philox_lanes lanes;
  uvec high, low;
  multiply_words(c0, PHILOX_M0, &high, &lanes.x3);
  uvec x2 = high ^ (k->offset ^ k->seed[1]);
  multiply_words(x2, PHILOX_M1, &high, &low);
  uvec y0 = high ^ (head * PHILOX_M1 ^ (k->seed[0] + PHILOX_W0));
  lanes.y1 = low ^ (k->seed[0] + 2 * PHILOX_W0);
  multiply_words(y0, PHILOX_M0, &high, &lanes.z3);
  lanes.z2 = high ^ (k->seed[1] + 2 * PHILOX_W1);
  return lanes;
}

// The four words of each lane for a row.
INLINE void philox(const philox_key *k, uint32_t head, uint32_t row, const philox_lanes *lanes, uvec c[4]) {
  uint32_t x0 = multiply_high(head, PHILOX_M1) ^ row ^ k->seed[0];
  uvec y2 = lanes->x3 ^ (multiply_high(x0, PHILOX_M0) ^ (k->seed[1] + PHILOX_W1)), high[2], low[2];
  multiply_words(y2, PHILOX_M1, high, c + 1);
  c[0] = high[0] ^ lanes->y1;
  c[2] = lanes->z2 ^ (x0 * PHILOX_M0);
  c[3] = lanes->z3;
  UNROLL for (uint32_t round = 3; round < 10; round++) {
    multiply_words(c[0], PHILOX_M0, high, low);
    multiply_words(c[2], PHILOX_M1, high + 1, low + 1);
    c[0] = high[1] ^ c[1] ^ (k->seed[0] + round * PHILOX_W0);
    c[1] = low[1];
    c[2] = high[0] ^ c[3] ^ (k->seed[1] + round * PHILOX_W1);
    c[3] = low[0];
  }
}

// A bit for each lane whose word is not below the threshold.
INLINE uint64_t kept_lanes(uvec word, uint32_t threshold) {
  typedef int32_t signed_vec __attribute__((vector_size(VECTOR_BYTES)));
  signed_vec bits = (signed_vec)(word >> 8), least = (signed_vec){0} + (int32_t)threshold;
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask((__m512i)bits, (__m512i)least);
#elif defined(__AVX2__)
  return (uint64_t)_mm256_movemask_ps((__m256)(bits >= least));
#elif defined(__SSE2__)
  return (uint64_t)_mm_movemask_ps((__m128)(bits >= least));
#else
  uint64_t mask = 0;
  for (int i = 0; i < FLOAT_LANES; i++) mask |= (uint64_t)(bits[i] >= least[i]) << i;
  return mask;
#endif
}

INLINE philox_key key_of(const ea_problem *p, int64_t batch) {
  int64_t batches = p->dropout_batches;
  const int64_t *key = p->dropout_seeds + batch / batches * 3;
  return (philox_key){.seed = {(uint32_t)key[0], (uint32_t)((uint64_t)key[0] >> 32)},
                      .offset = (uint32_t)key[1],
                      .first_row = (uint32_t)(key[2] + (is_packed(p) ? *p->query_starts : 0)),
                      .first_head = batch % batches * p->heads};
}

// The words of bits that n keys from `key` on have.
INLINE int64_t kept_words(int64_t key, int64_t n) { return (key % KEPT_KEYS + n + KEPT_KEYS - 1) / KEPT_KEYS; }

// A bit for each of n keys from `key` on, in words that begin at multiples of KEPT_KEYS, `ld` apart for rows. Words of
// which a row sees no key are 0.
static void read_kept(const ea_problem *p, const row_span *rows, int64_t count, int64_t key, int64_t n, uint64_t *kept,
                      int64_t ld) {
  uvec lane;
  for (int i = 0; i < FLOAT_LANES; i++) lane[i] = (uint32_t)i;
  const philox_key k = key_of(p, rows[0].batch);
  const uint32_t threshold = (uint32_t)p->dropout_threshold;
  for (int64_t word = 0; word < kept_words(key, n); word++) {
    int64_t block = key / KEPT_KEYS + word, begin = block * KEPT_KEYS;
    for (int part = 0; part < 16; part += FLOAT_LANES) {
      int64_t head = -1;
      philox_lanes lanes = {0};
      for (int64_t r = 0; r < count; r++) {
        uint64_t *to = kept + r * ld + word;
        if (part == 0) *to = 0;
        if (rows[r].limit <= begin || rows[r].start >= begin + KEPT_KEYS) continue;
        if (rows[r].head != head) {
          head = rows[r].head;
          lanes = prepare_lanes(&k, (uint32_t)(k.first_head + head), lane + (uint32_t)(block * 16 + part));
        }
        uvec c[4];
        philox(&k, (uint32_t)(k.first_head + head), (uint32_t)rows[r].query + k.first_row, &lanes, c);
        UNROLL for (int i = 0; i < 4; i++) *to |= kept_lanes(c[i], threshold) << (16 * i + part);
      }
    }
  }
}

// x, and 0 in the lanes whose bit is 0.
INLINE vec keep_lanes(vec x, uint64_t bits) {
#if defined(__AVX512F__) && REAL_IS_DOUBLE
  return (vec)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)x);
#elif defined(__AVX512F__)
  return (vec)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)x);
#else
  ivec bit;
  for (int i = 0; i < V; i++) bit[i] = 1 << i;
  return (vec)((ivec)x & (((bit - bit + (int32_t)(bits & ((1u << V) - 1))) & bit) != 0));
#endif
}

// Clear those of n numbers x of the keys from `key` on, which is a multiple of V, that are not kept.
static void drop(REAL *x, int64_t n, const uint64_t *kept, int64_t key) {
  for (int64_t j = 0, at = key % KEPT_KEYS; j < n; j += V, at += V) {
    store(x + j, keep_lanes(load(x + j), kept[at / KEPT_KEYS] >> (at % KEPT_KEYS)));
  }
}

INLINE int is_kept(const uint64_t *kept, int64_t key, int64_t j) {
  int64_t at = key % KEPT_KEYS + j;
  return kept[at / KEPT_KEYS] >> (at % KEPT_KEYS) & 1;
}
