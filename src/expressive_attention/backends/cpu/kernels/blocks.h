// Blocks of keys that blocks of queries see, as a list of them has it. No other blocks are read.

// An entry of the list, for a block of queries and one of keys. From BLOCK_TILES on, it is the number of a tile, in which
// a byte for each pair says whether it is seen.
enum { BLOCK_HIDDEN, BLOCK_WHOLE, BLOCK_TILES };

INLINE int has_blocks(const ea_problem *p) { return p->blocks.data != NULL; }

// The entries of a query, one for each block of keys.
INLINE const int32_t *blocks_of(const ea_problem *p, int64_t batch, int64_t head, int64_t query) {
  const int64_t *stride = p->blocks.stride;
  return (const int32_t *)p->blocks.data + batch * stride[0] + head * stride[1] + query / p->listed_rows * stride[2];
}

// The bytes of a query in the tile of an entry.
INLINE const uint8_t *tile_row(const ea_problem *p, int32_t entry, int64_t query) {
  return p->tiles + ((entry - BLOCK_TILES) * p->listed_rows + query % p->listed_rows) * p->listed_keys;
}

// Whether a query sees key j, as far as the list goes.
INLINE int is_listed(const ea_problem *p, int64_t batch, int64_t head, int64_t query, int64_t j) {
  if (!has_blocks(p)) return 1;
  int32_t entry = blocks_of(p, batch, head, query)[j / p->listed_keys];
  return entry < BLOCK_TILES ? entry == BLOCK_WHOLE : tile_row(p, entry, query)[j % p->listed_keys];
}

// Set those of n numbers x of the keys from `key` on to `hidden` that a query does not see.
static void hide_unlisted(const ea_problem *p, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t n, REAL *x,
                          REAL hidden) {
  const int32_t *entries = blocks_of(p, batch, head, query);
  for (int64_t j = 0, end; j < n; j = end) {
    int64_t block = (key + j) / p->listed_keys, at = (key + j) % p->listed_keys;
    end = least(n, j + p->listed_keys - at);
    if (entries[block] == BLOCK_WHOLE) continue;
    const uint8_t *seen = entries[block] == BLOCK_HIDDEN ? NULL : tile_row(p, entries[block], query) + at;
    for (int64_t i = j; i < end; i++) x[i] = seen && seen[i - j] ? x[i] : hidden;
  }
}

// The keys from the first to the last block that a query has in the list.
static void listed_range(const ea_problem *p, int64_t batch, int64_t head, int64_t query, int64_t *begin, int64_t *end) {
  const int32_t *entries = blocks_of(p, batch, head, query);
  int64_t first = 0, last = (p->keys + p->listed_keys - 1) / p->listed_keys;
  while (first < last && entries[first] == BLOCK_HIDDEN) first++;
  while (last > first && entries[last - 1] == BLOCK_HIDDEN) last--;
  *begin = first * p->listed_keys;
  *end = last * p->listed_keys;
}

// The share of the blocks of the list that are not hidden.
static double listed_share(const ea_problem *p) {
  if (!has_blocks(p) || p->batch * p->heads * p->rows * p->keys == 0) return 1;
  int64_t listed = 0, all = 0, blocks = (p->keys + p->listed_keys - 1) / p->listed_keys;
  for (int64_t b = 0; b < (p->blocks.stride[0] ? p->batch : 1); b++) {
    for (int64_t h = 0; h < (p->blocks.stride[1] ? p->heads : 1); h++) {
      for (int64_t i = 0; i < p->rows; i += p->listed_rows, all += blocks) {
        const int32_t *entries = blocks_of(p, b, h, i);
        for (int64_t j = 0; j < blocks; j++) listed += entries[j] != BLOCK_HIDDEN;
      }
    }
  }
  return (double)listed / (double)all;
}

// Rows or keys that are computed together, at most `limit` of them, of blocks of `size`: the same block has all of them,
// but where blocks are very small.
static int64_t fitting(int64_t size, int64_t limit) {
  if (size <= limit) return size * most(1, least(64, limit) / size);
  for (int64_t part = limit / 32 * 32; part > 0; part -= 32) {
    if (size % part == 0) return part;
  }
  return limit;
}
