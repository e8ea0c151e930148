// Which keys a row sees, and with what factor: causality, windows, lengths, blocks and masks. A hidden key has no influence on
// the row, whatever numbers it holds.

// A row of queries of one key head: rows run over the query heads that share it, and over the queries of each.
typedef struct {
  int64_t batch, head, query;
  int64_t start, limit;  // it sees the keys from `start` to the one before `limit`
  int64_t place;         // of the query among the keys
  REAL slope;            // of ALiBi, or 0
  REAL bias_max;             // its largest visible bias, as `bias_max_of` has it; 0 without a bias
} row_span;

INLINE int has_float_mask(const ea_problem *p) { return p->mask_dtype != EA_NONE && p->mask_dtype != EA_BOOL; }

// Whether weights are multiplied by the exponential of something.
INLINE int has_bias(const ea_problem *p) { return p->slopes || p->relative.data || has_float_mask(p); }

// Whether weights depend on distances.
INLINE int has_distances(const ea_problem *p) { return p->slopes || p->relative.data; }

// Room for the factors of a row over a block of keys, kept for rows that share them.
typedef struct {
  int all_listed;  // of the keys at hand, every row sees each, as far as the list of blocks goes
  REAL *factor;
  const void *from;
  REAL bias_max;
  int64_t count;
  // exp(bias - table_max) for distances d = first, ..., first + size - 1 of keys after a query of the head: those of a row
  // are part of it.
  REAL *table;
  int64_t size, first;
  int64_t batch, head;
  REAL table_max;
} mask_room;

INLINE mask_room empty_mask_room(REAL *factor, REAL *table, int64_t size) {
  return (mask_room){.all_listed = 1, .factor = factor, .table = table, .size = size, .head = -1};
}

static mask_room take_mask_room(const ea_problem *p, arena *a, int64_t rows, int64_t keys) {
  int64_t size = has_distances(p) ? round_up(rows + keys, V) : 0;
  REAL *factor = take(a, keys * (int64_t)sizeof(REAL));
  return empty_mask_room(factor, take(a, size * (int64_t)sizeof(REAL)), size);
}

// The visible biases of a row: the largest, and the least that is not -inf.
typedef struct {
  REAL largest, least;
} bias_range;

// The bias by distance of key j for a row.
INLINE REAL relative_bias(const ea_problem *p, const row_span *row, int64_t j) {
  if (!p->relative.data) return 0;
  return read_number(row_of(&p->relative, sums_dtype(p), row->batch, row->head, 0), sums_dtype(p), j - row->place + p->reach - 1);
}

// The bias of key j, which the row sees but for a bool mask and blocks.
INLINE REAL bias_of(const ea_problem *p, const row_span *row, int64_t j) {
  if (!is_listed(p, row->batch, row->head, row->query, j)) return (REAL)-INFINITY;
  const char *mask = p->mask_dtype == EA_NONE ? NULL : row_of(&p->mask, p->mask_dtype, row->batch, row->head, row->query);
  REAL bias = 0;
  if (has_float_mask(p)) {
    bias = read_number(mask, p->mask_dtype, j * p->mask.stride[3]);
  } else if (mask && !mask[j * p->mask.stride[3]]) {
    return (REAL)-INFINITY;
  }
  return bias + relative_bias(p, row, j) - row->slope * (REAL)(j > row->place ? j - row->place : row->place - j);
}

// Add the biases of n distances of a row, `first` and those that follow, to n numbers. There is none beyond `reach`.
static void add_distances(const ea_problem *p, const row_span *row, int64_t first, int64_t n, REAL *x) {
  for (int64_t j = 0; p->slopes && j < n; j++) {
    int64_t d = first + j;
    x[j] -= row->slope * (REAL)(d < 0 ? -d : d);
  }
  if (!p->relative.data) return;
  const char *row_start = row_of(&p->relative, sums_dtype(p), row->batch, row->head, 0);
  const char *from = row_start + (first + p->reach - 1) * dtype_size(sums_dtype(p));
  int64_t begin = most(0, 1 - p->reach - first), end = least(n, p->reach - first);
  if (sums_dtype(p) == EA_FLOAT32) {
    for (int64_t j = begin; j < end; j++) x[j] += (REAL)((const float *)from)[j];
  } else {
    for (int64_t j = begin; j < end; j++) x[j] += (REAL)((const double *)from)[j];
  }
}

// Where the biases of a row over n keys from `key` on are, if they can be used in their place.
INLINE const REAL *biases_in_place(const ea_problem *p, const row_span *row, int64_t key) {
  if (p->mask_dtype != REAL_DTYPE || p->mask.stride[3] != 1 || has_distances(p) || has_blocks(p)) return NULL;
  return (const REAL *)row_of(&p->mask, p->mask_dtype, row->batch, row->head, row->query) + key;
}

// The biases of n keys from `key` on.
static void read_biases(const ea_problem *p, const row_span *row, int64_t key, int64_t n, REAL *x) {
  if (has_float_mask(p)) {
    const char *from = row_of(&p->mask, p->mask_dtype, row->batch, row->head, row->query);
    int64_t stride = p->mask.stride[3];
    read_row(x, from + key * stride * dtype_size(p->mask_dtype), p->mask_dtype, stride, n);
  } else if (p->mask_dtype == EA_BOOL) {
    const uint8_t *keep = row_of(&p->mask, EA_BOOL, row->batch, row->head, row->query);
    for (int64_t j = 0; j < n; j++) x[j] = keep[(key + j) * p->mask.stride[3]] ? 0 : (REAL)-INFINITY;
  } else {
    for (int64_t j = 0; j < n; j++) x[j] = 0;
  }
  if (has_distances(p)) add_distances(p, row, key - row->place, n, x);
}

static bias_range read_range(const ea_problem *p, const row_span *row, REAL *room, int64_t room_size) {
  int64_t start = row->start, end = row->limit;
  if (p->mask_dtype == EA_NONE && !p->relative.data && !has_blocks(p) && start < end) {  // slopes alone
    int64_t nearest = least(most(row->place, start), end - 1);
    REAL first = bias_of(p, row, start), last = bias_of(p, row, end - 1);
    return (bias_range){bias_of(p, row, nearest), first < last ? first : last};
  }
  if (!has_distances(p) && !has_blocks(p) && p->mask.stride[3] == 0) end = least(end, start + 1);
  vec largest = splat((REAL)-INFINITY), smallest = splat((REAL)INFINITY);
  for (int64_t j = start; j < end; j += room_size) {
    int64_t n = least(room_size, end - j), whole = 0;
    const REAL *from = biases_in_place(p, row, j);
    if (from) {
      whole = n / V * V;
      for (int64_t i = whole; i < n; i++) room[i] = from[i];
    } else {
      read_biases(p, row, j, n, room);
      if (has_blocks(p)) hide_unlisted(p, row->batch, row->head, row->query, j, n, room, (REAL)-INFINITY);
    }
    for (int64_t i = n; i < round_up(n, V); i++) room[i] = (REAL)-INFINITY;
    for (int64_t i = 0; i < n; i += V) {
      vec x = load((i < whole ? from : room) + i);
      largest = choose((x > largest) | (x != x), x, largest);
      smallest = choose((x < smallest) & (x > (REAL)-INFINITY), x, smallest);
    }
  }
  bias_range range = {largest[0], smallest[0]};
  for (int i = 1; i < V; i++) {
    if (largest[i] > range.largest || largest[i] != largest[i]) range.largest = largest[i];
    if (smallest[i] < range.least) range.least = smallest[i];
  }
  return range;
}

// Whether the score of a row and key j is not 0. In double, where no product of floats is rounded. `room` is for two rows.
static int has_score(const ea_problem *p, const row_span *row, int64_t j, REAL *room) {
  double sum = 0;
  REAL *key = room + p->width;
  read_row(room, row_of(&p->query, p->dtype, row->batch, row->head, row->query), p->dtype, p->query.stride[3], p->width);
  read_row(key, row_of(&p->key, p->dtype, row->batch, row->head / (p->heads / p->kv_heads), j), p->dtype,
           p->key.stride[3], p->width);
  for (int64_t e = 0; e < p->width; e++) sum += (double)room[e] * (double)key[e];
  return sum != 0;
}

// Weights below exp(-60) of another would be lost beside it.
#define WIDE_RANGE 60

// The largest bias of a key whose score is not 0: one with score 0 has no weight, and would leave those far below it none.
static REAL bias_max_of(const ea_problem *p, const row_span *row, const bias_range *range, REAL *room) {
  if (range->largest == (REAL)-INFINITY) return 0;
  if (!((double)range->largest - (double)range->least > WIDE_RANGE)) return range->largest;
  // Where weights fall with distance, the nearest key has it.
  int64_t nearest = least(most(row->place, row->start), row->limit - 1);
  if (p->mask_dtype == EA_NONE && bias_of(p, row, nearest) == range->largest && has_score(p, row, nearest, room)) {
    return range->largest;
  }
  REAL bias_max = (REAL)-INFINITY;
  for (int64_t j = row->start; j < row->limit; j++) {
    REAL bias = bias_of(p, row, j);
    if (bias == range->largest && has_score(p, row, j, room)) return range->largest;
    if (bias > bias_max && has_score(p, row, j, room)) bias_max = bias;
  }
  return bias_max == (REAL)-INFINITY ? range->largest : bias_max;
}

// How many keys of a batch exist. Keys behind them are not read.
INLINE int64_t key_count(const ea_problem *p, int64_t batch) {
  return p->key_lengths ? most(0, least(p->keys, p->key_lengths[batch])) : p->keys;
}

// The places of rows first, ..., first + count - 1 of the key head `kv_head`, but for their peaks.
static void locate_rows(const ea_problem *p, int64_t batch, int64_t kv_head, int64_t first, int64_t count,
                        row_span *rows) {
  int64_t head = kv_head * (p->heads / p->kv_heads) + first / p->rows, query = first % p->rows;
  int64_t keys = key_count(p, batch);
  int64_t corner = p->lower_right ? keys - p->rows : 0, begin = 0, end = keys;
  for (int64_t r = 0; r < count; r++) {
    int64_t limit = p->causal ? most(0, least(keys, query + corner + p->right + 1)) : keys;
    int64_t start = p->window ? most(0, least(limit, query + corner - p->left)) : 0;
    if (has_blocks(p)) {
      if (r == 0 || query % p->listed_rows == 0) listed_range(p, batch, head, query, &begin, &end);
      limit = least(limit, end);
      start = least(limit, most(start, begin));
    }
    REAL slope = p->slopes ? p->slopes[batch * p->slopes_stride + head] : 0;
    rows[r] = (row_span){batch, head, query, start, limit, query + corner, slope, 0};
    if (++query == p->rows) head++, query = 0;
  }
}

// The places of rows with their peaks. `room` may be changed; it also holds two rows of E numbers.
static void place_rows(const ea_problem *p, int64_t batch, int64_t kv_head, int64_t first, int64_t count,
                       row_span *rows, REAL *room, int64_t room_size) {
  locate_rows(p, batch, kv_head, first, count, rows);
  if (!has_bias(p)) return;
  bias_range range;
  for (int64_t r = 0; r < count; r++) {
    const row_span *before = rows + r - 1;
    if (r == 0 || before->start != rows[r].start || before->limit != rows[r].limit || before->head != rows[r].head ||
        has_distances(p) || has_blocks(p) || p->mask.stride[2] != 0) {
      range = read_range(p, rows + r, room, room_size);
    }
    rows[r].bias_max = bias_max_of(p, rows + r, &range, room);
  }
}

// The rows of `t` at these places, as `pack_rows` would.
static void pack_places(REAL *to, int64_t ld, const ea_tensor *t, int64_t dtype, const ea_problem *p,
                        const row_span *rows, int64_t count, int64_t columns, REAL scale) {
  for (int64_t r = 0, n; r < count; r += n) {
    n = least(count - r, p->rows - rows[r].query);  // in one head
    pack_rows(to + r * ld, ld, t, dtype, rows[r].batch, rows[r].head, rows[r].query, n, columns, scale);
  }
}

// Any of some rows sees keys from `begin` to the one before `end` alone; all of them see those from `all_begin` to the
// one before `all_end`.
typedef struct {
  int64_t begin, end, all_begin, all_end;
} visible_range;

INLINE visible_range range_of(const row_span *rows, int64_t count) {
  visible_range range = {rows[0].start, rows[0].limit, rows[0].start, rows[0].limit};
  for (int64_t r = 1; r < count; r++) {
    range.begin = least(range.begin, rows[r].start);
    range.end = most(range.end, rows[r].limit);
    range.all_begin = most(range.all_begin, rows[r].start);
    range.all_end = least(range.all_end, rows[r].limit);
  }
  return range;
}

// The entry of the list for n keys from `key` on: BLOCK_WHOLE if each row sees each, BLOCK_HIDDEN if no row sees one.
static int listed_keys(const ea_problem *p, const row_span *rows, int64_t count, int64_t key, int64_t n) {
  int whole = 1, hidden = 1;
  if (!has_blocks(p)) return BLOCK_WHOLE;
  for (int64_t r = 0; r < count; r++) {
    if (r > 0 && rows[r].query % p->listed_rows != 0) continue;  // as the row before it
    const int32_t *entries = blocks_of(p, rows[r].batch, rows[r].head, rows[r].query);
    for (int64_t block = key / p->listed_keys; block * p->listed_keys < key + n; block++) {
      whole &= entries[block] == BLOCK_WHOLE;
      hidden &= entries[block] == BLOCK_HIDDEN;
    }
  }
  return whole ? BLOCK_WHOLE : hidden ? BLOCK_HIDDEN : BLOCK_TILES;
}

// The next keys from *key on and before `end` that some row has in the list, as many as are alike, but at most `size`; *key
// is where they begin. Return their number; 0: there are no more.
static int64_t next_keys(const ea_problem *p, const row_span *rows, int64_t count, int64_t *key, int64_t end, int64_t size,
                         mask_room *mask) {
  if (!has_blocks(p)) return most(0, least(size, end - *key));
  int64_t block = p->listed_keys;
  while (*key < end && listed_keys(p, rows, count, *key, 1) == BLOCK_HIDDEN) *key = (*key / block + 1) * block;
  if (*key >= end) return 0;
  int listed = listed_keys(p, rows, count, *key, 1);
  int64_t stop = (*key / block + 1) * block;
  while (stop < end && stop - *key < size && listed_keys(p, rows, count, stop, 1) == listed) stop += block;
  mask->all_listed = listed == BLOCK_WHOLE;
  return least(size, least(stop, end) - *key);
}

// The factors of the weights of `n` keys from `key`, exp(bias - bias_max).
static const REAL *read_bias(const ea_problem *p, const row_span *row, int64_t key, int64_t n, mask_room *room) {
  if (!has_float_mask(p) && (p->relative.data || row->bias_max == 0)) {
    int64_t d = key - row->place;
    int same = room->head == row->head && room->batch == row->batch && room->table_max == row->bias_max;
    if (!same || d < room->first || d + n > room->first + room->size) {
      // The rows that follow have smaller distances.
      room->head = row->head;
      room->batch = row->batch;
      room->table_max = row->bias_max;
      room->first = d + n - room->size;
      for (int64_t i = 0; i < room->size; i++) room->table[i] = 0;
      add_distances(p, row, room->first, room->size, room->table);
      for (int64_t i = 0; i < room->size; i += V) {
        store(room->table + i, exponential_of_difference(load(room->table + i), row->bias_max));
      }
    }
    return room->table + (d - room->first);
  }
  const char *from = NULL;
  if (!has_distances(p)) {
    from = row_of(&p->mask, p->mask_dtype, row->batch, row->head, row->query);
    from += key * p->mask.stride[3] * dtype_size(p->mask_dtype);
    if (room->from == from && room->bias_max == row->bias_max && room->count >= n) return room->factor;
  }
  int64_t done = 0;
  const REAL *biases = biases_in_place(p, row, key);
  for (; biases && done + V <= n; done += V) {
    __builtin_prefetch(biases + 2 * p->mask.stride[2] + done, 0, 3);  // of a row that follows
    store(room->factor + done, exponential_of_difference(load(biases + done), row->bias_max));
  }
  if (done < n) read_biases(p, row, key + done, n - done, room->factor + done);
  for (; done < n; done += V) {
    store(room->factor + done, exponential_of_difference(load(room->factor + done), row->bias_max));
  }
  room->from = from;
  room->bias_max = row->bias_max;
  room->count = n;
  return room->factor;
}

// Apply mask, causality, window and blocks to `n` numbers x of the keys from `key` on: hidden ones become 0, the others are
// multiplied by exp(bias - bias_max). A number that is not finite stays so where that factor is 0: -inf may be the bias, or
// a finite one, which hides nothing. With `clear` it becomes 0 there.
static void apply_mask(const ea_problem *p, const row_span *row, int64_t key, int64_t n, REAL *x, mask_room *room,
                       const int clear) {
  int64_t visible = most(0, least(n, row->limit - key));
  for (int64_t j = visible; j < n; j++) x[j] = 0;
  if (has_bias(p)) {
    const REAL *factor = read_bias(p, row, key, visible, room);
    if (clear) {
      for (int64_t j = 0; j < visible; j++) x[j] = factor[j] == 0 ? 0 : x[j] * factor[j];
    } else {
      for (int64_t j = 0; j < visible; j++) x[j] *= factor[j];
    }
  }
  if (p->mask_dtype == EA_BOOL) {
    int64_t stride = p->mask.stride[3];
    const uint8_t *keep = row_of(&p->mask, EA_BOOL, row->batch, row->head, row->query);
    keep += key * stride;
    if (stride == 1) {
      for (int64_t j = 0; j < visible; j++) x[j] = keep[j] ? x[j] : 0;
    } else {
      for (int64_t j = 0; j < visible; j++) x[j] = keep[j * stride] ? x[j] : 0;
    }
  }
  // At last: what a mask makes of keys that are hidden otherwise may not be finite.
  if (has_blocks(p)) hide_unlisted(p, row->batch, row->head, row->query, key, visible, x, 0);
  int64_t hidden = most(0, least(n, row->start - key));
  for (int64_t j = 0; j < hidden; j++) x[j] = 0;
}

// Whether the row sees each of `n` keys from `key` on.
static void read_seen(const ea_problem *p, const row_span *row, int64_t key, int64_t n, uint8_t *seen) {
  const char *mask = NULL;
  if (p->mask_dtype != EA_NONE) mask = row_of(&p->mask, p->mask_dtype, row->batch, row->head, row->query);
  for (int64_t j = 0; j < n; j++) {
    int64_t at = (key + j) * p->mask.stride[3];
    seen[j] = key + j >= row->start && key + j < row->limit && is_listed(p, row->batch, row->head, row->query, key + j) &&
              relative_bias(p, row, key + j) != (REAL)-INFINITY &&
              (!mask || (has_float_mask(p) ? read_number(mask, p->mask_dtype, at) != (REAL)-INFINITY : mask[at] != 0));
  }
}

#if !REAL_IS_DOUBLE
// Whether the row has a key that is not masked and a query that is not 0: then N = 0 may be an underflow.
static int may_have_weight(const ea_problem *p, const row_span *row) {
  const char *query = row_of(&p->query, p->dtype, row->batch, row->head, row->query);
  int zero = 1;
  for (int64_t e = 0; e < p->width && zero; e++) zero = read_number(query, p->dtype, e * p->query.stride[3]) == 0;
  if (zero) return 0;
  if (p->mask_dtype == EA_NONE && !has_blocks(p)) return row->limit > row->start;
  const char *mask = p->mask_dtype == EA_NONE ? NULL : row_of(&p->mask, p->mask_dtype, row->batch, row->head, row->query);
  for (int64_t j = row->start; j < row->limit; j++) {
    if (!is_listed(p, row->batch, row->head, row->query, j)) continue;
    if (!mask) return 1;
    int64_t at = j * p->mask.stride[3];
    if (has_float_mask(p) ? read_number(mask, p->mask_dtype, at) != (REAL)-INFINITY : ((const uint8_t *)mask)[at]) return 1;
  }
  return 0;
}

#endif

// A sum of weights in float32 that is larger lost nothing that counts to underflow.
#define LEAST_SUM 0x1p-80f

INLINE int is_in_range(REAL normalizer) { return normalizer > LEAST_SUM && normalizer <= LARGEST; }

// Whether a sum of weights computed in float32 has lost what counts, to underflow or overflow.
INLINE int is_unsafe(const ea_problem *p, const row_span *row, REAL normalizer) {
#if REAL_IS_DOUBLE
  (void)p, (void)row, (void)normalizer;
  return 0;
#else
  return !is_in_range(normalizer) && (normalizer != 0 || may_have_weight(p, row));
#endif
}
