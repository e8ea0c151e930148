// Backward pass. With u_i = dO_i / N_i, h = f'(z) exp(bias) / 2 and g_ij = u_i . v_j - D_i + dN_i, where
// D_i = u_i . o_i = sum_j w_ij u_i . v_j / N_i:
//
//     dv_j = sum_i w_ij u_i,   dq_i = sum_j h_ij g_ij (2 scale k_j),   dk_j = 2 sum_i h_ij g_ij (scale q_i),
//     dbias_ij = w_ij g_ij.
//
// With dropout, u_i . v_j above and w_ij in dv_j are divided by 1 - p where the weight is kept, and 0 where it is dropped.
// Hidden pairs have w = h = 0. The part of dq along q is what remains of terms that cancel where f is small, since
// sum_j w_ij (g_ij - dN_i) = 0. Without them it is
//
//     q_i . dq_i = 2 dN_i N_i - 2 sum_j w_ij f_ij g_ij.
//
// Key head by key head: N and D of its rows, then blocks of keys against blocks of rows. The keys of a head may be dealt out
// to several threads: N and D of all rows come first then, each thread has its own dq, and these are added in a fixed order.

#if REAL_IS_DOUBLE
#define BACKWARD_ROWS 48
#define BACKWARD_KEYS 128
#else
#define BACKWARD_ROWS 96
#define BACKWARD_KEYS 256
#endif

typedef struct {
  int64_t block_rows, block_keys, row_blocks, key_blocks;
  int64_t key_step;                  // from one block of keys to the next, at most block_keys
  int64_t columns, value_columns;    // padded
  int64_t query_ld, upstream_ld;     // from one row to the next
  int64_t mask_batches, mask_heads;  // key heads that share no element of the gradient of the mask
  int64_t parts;                     // shares of the key blocks of a head
  int recompute;                     // N and D from the inputs, not from what the forward pass stored
  int looks_ahead;                   // what is needed next is asked for
  int numbers_first;                 // N and D of all rows come before gradients of any
  int in_place;                      // the gradient of the query is added up where it belongs
  int keeps_shares;                  // f is kept beside w = f exp(bias)
  int pairs;                         // bfloat16 is multiplied in pairs, of numbers as they are, neither scaled nor over N
  double factor;                     // of sum h g q, the gradient of the key
} backward_plan;

typedef struct {
  row_span *rows;
  const REAL *query, *upstream;  // those of the block
  REAL *queries, *upstreams, *keys_transposed, *values_transposed, *keys, *weights, *shares, *derivatives, *products;
  REAL *grad_query, *grad_key, *grad_value, *room;
  // With pairs: rows two by two, and h g row by row.
  REAL *query_pairs, *upstream_pairs, *weight_pairs, *derivative_pairs, *narrow_derivatives;
  uint64_t *kept;  // with dropout
  mask_room mask;
  lookahead ahead, following;  // what this block of rows, and the last one of the task, bring closer
  not_finite bad;
} backward_room;

// Sums of a row: sum_j w f g and sum_j w f.
typedef struct {
  REAL along, share;
} row_sums;

// Numbers of all rows, as `row_place` has them.
typedef struct {
  REAL *normalizer, *mean, *bias_max;
} row_numbers;

typedef struct {
  const ea_problem *p;
  backward_plan plan;
  row_numbers numbers;
  int64_t first_task, query_size;
  REAL *partial;  // gradients of the query, one for each part, where there are several parts
  row_sums *sums;  // of all rows, for each part
  double *mask_sums;  // the gradient of the mask, where several terms add up to one element
  double *relative_sums;  // that of biases by distance, of each head
  _Atomic int unsafe, left_pairs;  // in need of double arithmetic, of no pairs
} backward_run;

// All problems of a call.
typedef struct {
  backward_run *runs;
  int64_t count, threads;
  double work;
  int64_t room_bytes;
  char *rooms;
  int numbers;  // are computed, not yet the gradients
  ea_queue queue;
} backward_job;

static int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

static backward_plan plan_backward(const ea_problem *p, int may_use_pairs) {
  int64_t wide = most(p->width, p->value_width), rows = p->heads / p->kv_heads * p->rows;
  backward_plan plan = {.columns = padded(p->width), .value_columns = padded(p->value_width)};
  plan.block_keys = wide > 256 ? BACKWARD_KEYS / 4 : wide > 128 ? BACKWARD_KEYS / 2 : BACKWARD_KEYS;
  plan.block_keys = least(plan.block_keys, padded(p->keys));
  plan.key_step = has_blocks(p) ? fitting(least(p->listed_keys, p->keys), plan.block_keys) : plan.block_keys;
  plan.key_blocks = (p->keys + plan.key_step - 1) / plan.key_step;
  plan.row_blocks = (rows + BACKWARD_ROWS - 1) / BACKWARD_ROWS;
  plan.block_rows = least(rows, round_up((rows + plan.row_blocks - 1) / plan.row_blocks, MR));
  if (has_blocks(p)) {
    plan.block_rows = least(rows, fitting(p->listed_rows, BACKWARD_ROWS));
    plan.row_blocks = (rows + plan.block_rows - 1) / plan.block_rows;
  }
  int shared = p->grad_mask != NULL;
  plan.mask_batches = shared && p->mask_size[0] == 1 ? 1 : p->batch;
  plan.mask_heads = shared && p->mask_size[1] == 1 ? 1 : p->kv_heads;
  int64_t units = plan.mask_batches * plan.mask_heads;
  plan.parts = least(p->threads / greatest_common_divisor(units, p->threads), plan.key_blocks);
  // All keys add to the same elements.
  if ((shared && p->mask_size[3] == 1) || p->grad_relative) plan.parts = 1;
  forward_plan forward = plan_forward(p);
  // An output of 16 bits is not exact enough for the gradient of a wider mask.
  int exact = (p->grad_mask && dtype_size(p->mask_dtype) > dtype_size(p->dtype)) ||
              (p->grad_relative && dtype_size(sums_dtype(p)) > dtype_size(p->dtype));
  plan.pairs = may_use_pairs && forward.pairs && !exact && can_use_pairs_backward(p);
  plan.query_ld = plan.pairs ? p->width / 2 : plan.columns;
  plan.upstream_ld = plan.pairs ? p->value_width / 2 : plan.value_columns;
  double scale2 = p->scale * p->scale;
  plan.factor = !plan.pairs ? 2 : p->squared ? 2 * scale2 : 2 / scale2;
  // Where the forward pass adds the numbers of a score in another order, its N is not the sum of the same weights. In
  // double, those of float may have lost what counts.
  plan.recompute = exact || forward.few_rows || forward.pairs != plan.pairs || (REAL_IS_DOUBLE && p->dtype != REAL_DTYPE);
  plan.looks_ahead = forward.looks_ahead;
  plan.numbers_first = plan.recompute || plan.parts > 1 || !plan.looks_ahead;
  plan.keeps_shares = has_bias(p) && !p->squared;
  plan.in_place = p->dtype == REAL_DTYPE && p->width == plan.columns && plan.parts == 1 && !is_packed(p);
  return plan;
}

// The numbers of a row of `width` as they are packed.
INLINE int64_t packed(const backward_plan *plan, int64_t width) { return plan->pairs ? width / 2 : width; }

static int64_t lay_out_backward(const ea_problem *p, const backward_plan *plan, char *memory, backward_room *room) {
  arena a = {memory, 0};
  int64_t rows = plan->block_rows, keys = plan->block_keys, head_rows = p->heads / p->kv_heads * p->rows;
  int64_t weights = (plan->pairs ? MR : rows) * leading(keys) * (int64_t)sizeof(REAL);
  *room = (backward_room){
      .rows = take(&a, rows * sizeof(row_span)),
      .queries = take(&a, rows * plan->columns * sizeof(REAL)),
      .upstreams = take(&a, rows * plan->value_columns * sizeof(REAL)),
      .keys_transposed = take(&a, keys * p->width * sizeof(REAL)),
      .values_transposed = take(&a, keys * p->value_width * sizeof(REAL)),
      .keys = take(&a, keys * plan->columns * sizeof(REAL)),
      .weights = take(&a, weights),
      .shares = take(&a, plan->keeps_shares ? weights : 0),
      .derivatives = take(&a, weights),
      .products = take(&a, MR * leading(keys) * sizeof(REAL)),
      .grad_key = take(&a, keys * plan->columns * sizeof(REAL)),
      .grad_value = take(&a, keys * plan->value_columns * sizeof(REAL)),
      .room = take(&a, most(keys, V * round_up(most(p->width, p->value_width), V)) * sizeof(REAL)),
      .kept = take(&a, p->dropout_seeds ? rows * kept_words(0, keys) * (int64_t)sizeof(uint64_t) : 0),
      .mask = take_mask_room(p, &a, rows, keys),
      .bad = {.rows = take(&a, rows * sizeof(REAL)),
              .keys = take(&a, keys * sizeof(REAL)),
              .values = take(&a, keys * sizeof(REAL)),
              .seen = take(&a, keys)},
  };
  if (plan->pairs) {
    int64_t pairs = (rows + 1) / 2;
    room->query_pairs = take(&a, pairs * plan->columns * sizeof(REAL));
    room->upstream_pairs = take(&a, pairs * plan->value_columns * sizeof(REAL));
    room->weight_pairs = take(&a, pairs * leading(keys) * sizeof(REAL));
    room->derivative_pairs = take(&a, pairs * leading(keys) * sizeof(REAL));
    room->narrow_derivatives = take(&a, rows * leading(keys) * sizeof(REAL) / 2);
  }
  if (!plan->in_place && plan->parts == 1) room->grad_query = take(&a, head_rows * plan->columns * sizeof(REAL));
  return a.used;
}

// ---- N and D of all rows ----

static void numbers_from_stored(backward_run *run, backward_room *room, int64_t count) {
  const ea_problem *p = run->p;
  for (int64_t r = 0; r < count; r++) {
    const row_span *row = room->rows + r;
    int64_t index = index_of(p, row);
    if (run->plan.looks_ahead && r + ROWS_AHEAD < count) {
      const row_span *later = row + ROWS_AHEAD;
      int64_t size = p->value_width * dtype_size(p->dtype);
      bring((const char *)p->output + index_of(p, later) * size, size);
      bring(row_of(&p->grad_output, p->dtype, later->batch, later->head, later->query), size);
    }
    const REAL *output = (const REAL *)p->output + index * p->value_width;
    const REAL *upstream = row_of(&p->grad_output, p->dtype, row->batch, row->head, row->query);
    REAL normalizer = ((const REAL *)p->normalizer)[index];
    if (p->dtype != REAL_DTYPE) {
      read_row(room->room + p->value_width, (const char *)p->output + index * p->value_width * dtype_size(p->dtype),
               p->dtype, 1, p->value_width);
      output = room->room + p->value_width;
    }
    if (p->dtype != REAL_DTYPE || p->grad_output.stride[3] != 1) {
      read_row(room->room, upstream, p->dtype, p->grad_output.stride[3], p->value_width);
      upstream = room->room;
    }
    run->numbers.normalizer[index] = normalizer;
    run->numbers.mean[index] = normalizer == 0 ? 0 : dot(upstream, output, p->value_width) / normalizer;
    // The forward pass left NaN only where it belongs.
    if (normalizer == normalizer && is_unsafe(p, row, normalizer)) run->unsafe = 1;
  }
}

// Where row r of a block has its weights, derivatives and shares. With pairs, only those of one group of rows are there, in the
// first cache.
INLINE int64_t place_of(const backward_plan *plan, int64_t r) {
  return (plan->pairs ? r % MR : r) * leading(plan->block_keys);
}

// Weights, derivatives and, where they are kept, shares f of rows first, ..., end - 1 of the block over n keys from `key`,
// masked. Past the keys that a row sees there are zeros.
static void backward_weights(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t first,
                             int64_t end, int64_t key, int64_t n) {
  int64_t ldw = leading(plan->block_keys), whole = padded(n), width = packed(plan, p->width);
  for (int64_t start = 0; start < n; start += PANEL) {
    int64_t ld = panel_width(start, n);
    for (int64_t r = first; r < end; r += MR) {
      int mr = (int)least(MR, end - r);
      int64_t columns = least(n, range_of(room->rows + r, mr).end - key) - start, at = place_of(plan, r) + start;
      if (columns <= 0) continue;
      derivatives(mr, columns >= PANEL ? NR : tile_vectors(columns), width, room->query + r * plan->query_ld, plan->query_ld,
             room->keys_transposed + start * width, ld, room->weights + at, room->derivatives + at, ldw,
             (REAL)(p->scale * p->scale), (REAL)(1 / (p->scale * p->scale)), (int)p->squared, plan->pairs);
    }
  }
  for (int64_t r = first; r < end; r += MR) {
    int mr = (int)least(MR, end - r);
    visible_range seen = range_of(room->rows + r, mr);
    if (is_plain(p, &room->mask, seen, key, n)) continue;
    for (int i = 0; i < mr; i++) {
      const row_span *row = room->rows + r + i;
      int64_t at = place_of(plan, r + i), visible = most(0, least(n, row->limit - key));
      if (plan->keeps_shares) {
        memcpy(room->shares + at, room->weights + at, (size_t)visible * sizeof(REAL));
        memset(room->shares + at + visible, 0, (size_t)(whole - visible) * sizeof(REAL));
      }
      apply_mask(p, row, key, whole, room->weights + at, &room->mask, 1);
      apply_mask(p, row, key, whole, room->derivatives + at, &room->mask, 1);
    }
  }
}

// Which weights are kept, where some are dropped.
static void read_block_kept(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t count,
                            int64_t key, int64_t n) {
  if (p->dropout_seeds) read_kept(p, room->rows, count, key, n, room->kept, kept_words(0, plan->block_keys));
}

INLINE const uint64_t *kept_of(const backward_plan *plan, const backward_room *room, int64_t r) {
  return room->kept + r * kept_words(0, plan->block_keys);
}

static void pack_key_block(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t b,
                           int64_t kv_head, int64_t key, int64_t n) {
  if (plan->pairs) {
    ea_tensor keys = as_pairs(&p->key), values = as_pairs(&p->value);
    pack_transposed(room->keys_transposed, &keys, REAL_DTYPE, b, kv_head, key, n, p->width / 2, room->room);
    pack_transposed(room->values_transposed, &values, REAL_DTYPE, b, kv_head, key, n, p->value_width / 2, room->room);
    room->bad.any_key = 0;
    return;
  }
  pack_transposed(room->keys_transposed, &p->key, p->dtype, b, kv_head, key, n, p->width, room->room);
  pack_transposed(room->values_transposed, &p->value, p->dtype, b, kv_head, key, n, p->value_width, room->room);
  room->bad.any_key = clear_columns(room->keys_transposed, n, p->width, room->bad.keys);
  room->bad.any_key |= clear_columns(room->values_transposed, n, p->value_width, room->bad.values);
}

// The keys as rows, for the gradient of the query.
static void pack_key_rows(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t b,
                          int64_t kv_head, int64_t key, int64_t n) {
#if HAS_PAIRS
  if (plan->pairs) {
    pack_row_pairs(room->keys, plan->columns, &p->key, b, kv_head, key, n, p->width);
    return;
  }
#endif
  pack_rows(room->keys, plan->columns, &p->key, p->dtype, b, kv_head, key, n, p->width, (REAL)(2 * p->scale));
}

// The keys in both ways; those that are not finite are 0.
static void pack_keys(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t b, int64_t kv_head,
                      int64_t key, int64_t n) {
  pack_key_block(p, plan, room, b, kv_head, key, n);
  pack_key_rows(p, plan, room, b, kv_head, key, n);
  for (int64_t j = 0; room->bad.any_key && j < n; j++) {
    if (room->bad.keys[j] != 0) memset(room->keys + j * plan->columns, 0, (size_t)plan->columns * sizeof(REAL));
  }
}

static void pack_row_block(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t count,
                           const REAL *normalizer) {
#if HAS_PAIRS
  if (plan->pairs) {
    room->query = pair_places(room->queries, &p->query, p, room->rows, count, p->width);
    room->upstream = pair_places(room->upstreams, &p->grad_output, p, room->rows, count, p->value_width);
    pack_place_pairs(room->query_pairs, plan->columns, &p->query, room->rows, count, p->width);
    pack_place_pairs(room->upstream_pairs, plan->value_columns, &p->grad_output, room->rows, count, p->value_width);
    for (int64_t r = 0; r < count; r++) room->bad.rows[r] = 0;
    return;
  }
#endif
  pack_places(room->queries, plan->columns, &p->query, p->dtype, p, room->rows, count, p->width, (REAL)p->scale);
  pack_places(room->upstreams, plan->value_columns, &p->grad_output, p->dtype, p, room->rows, count, p->value_width, 1);
  room->query = room->queries;
  room->upstream = room->upstreams;
  for (int64_t r = 0; r < count; r++) {
    REAL *query = room->queries + r * plan->columns, *upstream = room->upstreams + r * plan->value_columns;
    REAL total = normalizer ? normalizer[index_of(p, room->rows + r)] : 1;
    if (normalizer || p->dropout_seeds) {
      scale_row(upstream, plan->value_columns, total == 0 ? 0 : 1 / total / (REAL)p->keep);
    }
    room->bad.rows[r] = check_row(query, plan->columns) + check_row(upstream, plan->value_columns);
    if (room->bad.rows[r] != 0) {
      memset(query, 0, (size_t)plan->columns * sizeof(REAL));
      memset(upstream, 0, (size_t)plan->value_columns * sizeof(REAL));
    }
  }
}

// Whether row r, or one of the keys of the block, is not finite.
INLINE int is_bad(const backward_room *room, int64_t r) { return room->bad.any_key || room->bad.rows[r] != 0; }

// dO_i . v_j of a group of rows and the n keys of the block; 0 where the weight is dropped.
static void group_products(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t r, int mr,
                           int64_t key, int64_t n, int64_t columns) {
  int64_t width = packed(plan, p->value_width);
  for (int64_t start = 0; start < columns; start += PANEL) {
    int nr = columns - start >= PANEL ? NR : tile_vectors(columns - start);
    product(mr, nr, width, room->upstream + r * plan->upstream_ld, plan->upstream_ld,
            room->values_transposed + start * width, panel_width(start, n), room->products + start,
            leading(plan->block_keys), plan->pairs);
  }
  for (int i = 0; p->dropout_seeds && i < mr; i++) {
    drop(room->products + i * leading(plan->block_keys), columns, kept_of(plan, room, r + i), key);
  }
}

// Add sum_j w_ij and sum_j w_ij dO_i . v_j over n keys of row r to *normalizer, *mean. Return whether the row sees a vector
// that is not finite.
static int add_numbers(const ea_problem *p, backward_room *room, int64_t r, int64_t key, int64_t n, const REAL *w,
                       const REAL *product, REAL *normalizer, REAL *mean) {
  REAL total = 0, sum = 0, bad = 0;
  for (int64_t j = 0; j < n; j++) {
    total += w[j];
    sum += w[j] * product[j];
  }
  if (is_bad(room, r) || sum != sum) {
    read_seen(p, room->rows + r, key, n, room->bad.seen);
    total = sum = 0;
    for (int64_t j = 0; j < n; j++) {
      if (!room->bad.seen[j]) continue;
      bad += room->bad.rows[r] + room->bad.keys[j];
      total += w[j];
      sum += w[j] * product[j] + room->bad.values[j];
    }
  }
  *normalizer += total + bad;
  *mean += sum + bad;
  return bad != 0;
}

static void numbers_from_inputs(backward_run *run, backward_room *room, int64_t b, int64_t kv_head, int64_t count) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t ldw = leading(plan->block_keys), end = range_of(room->rows, count).end;
  int64_t begin = range_of(room->rows, count).begin / plan->block_keys * plan->block_keys;
  int bad[BACKWARD_ROWS] = {0};
  for (int64_t r = 0; r < count; r++) {
    int64_t index = index_of(p, room->rows + r);
    run->numbers.normalizer[index] = run->numbers.mean[index] = 0;
  }
  pack_row_block(p, plan, room, count, NULL);
  for (int64_t key = begin, n; (n = next_keys(p, room->rows, count, &key, end, plan->block_keys, &room->mask)); key += n) {
    pack_key_block(p, plan, room, b, kv_head, key, n);
    backward_weights(p, plan, room, 0, count, key, n);
    read_block_kept(p, plan, room, count, key, n);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      int64_t columns = least(n, range_of(room->rows + r, mr).end - key);
      group_products(p, plan, room, r, mr, key, n, columns);
      for (int i = 0; i < mr; i++) {
        int64_t index = index_of(p, room->rows + r + i);
        bad[r + i] |= add_numbers(p, room, r + i, key, columns, room->weights + (r + i) * ldw, room->products + i * ldw,
                                  run->numbers.normalizer + index, run->numbers.mean + index);
      }
    }
  }
  for (int64_t r = 0; r < count; r++) {
    int64_t index = index_of(p, room->rows + r);
    REAL total = run->numbers.normalizer[index], *mean = &run->numbers.mean[index];
    *mean = total == 0 ? 0 : *mean / total / total;
    if (!bad[r] && is_unsafe(p, room->rows + r, total)) run->unsafe = 1;
  }
}

static void numbers_task(backward_run *run, backward_room *room, int64_t task) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t head_rows = p->heads / p->kv_heads * p->rows, head = task / plan->row_blocks;
  int64_t b = head / p->kv_heads, kv_head = head % p->kv_heads;
  int64_t first = task % plan->row_blocks * plan->block_rows, count = least(plan->block_rows, head_rows - first);
  if (count <= 0) return;
  room->mask.from = NULL;
  place_rows(p, b, kv_head, first, count, room->rows, room->room, plan->block_keys);
  if (has_bias(p)) {
    for (int64_t r = 0; r < count; r++) run->numbers.bias_max[index_of(p, room->rows + r)] = room->rows[r].bias_max;
  }
  if (plan->recompute) {
    numbers_from_inputs(run, room, b, kv_head, count);
  } else {
    numbers_from_stored(run, room, count);
  }
}

// ---- gradients ----

// Terms of the gradients of a row: g = factor product - mean + grad_normalizer.
typedef struct {
  const REAL *product;
  REAL factor;  // of the product
  REAL normalizer, mean, grad_normalizer;
} row_terms;

INLINE vec gradient_of(vec weight, vec product, const row_terms *t) {
  vec g = product * t->factor - t->mean;
  // A row that sees one key has w = N and g = 0, but not to the last bit, which h / N = 1 / z would magnify.
  return choose(weight == t->normalizer, splat(0), g) + t->grad_normalizer;
}

// h becomes h g for n keys of a row, and, for the mask, w becomes w g in `bias`. With `share` NULL, f is w.
INLINE row_sums row_gradient(int64_t n, const REAL *w, const REAL *share, REAL *h, const row_terms *t, REAL *bias) {
  vec along = {0}, shares = {0};
  for (int64_t j = 0; j < n; j += V) {
    vec weight = load(w + j), f = share ? load(share + j) : weight, g = gradient_of(weight, load(t->product + j), t);
    store(h + j, load(h + j) * g);
    vec term = weight * g;
    if (bias) store(bias + j, term);
    along += term * f;
    shares += weight * f;
  }
  return (row_sums){sum_of(along), sum_of(shares)};
}

// The same for row r where not all is finite, after it: hidden keys get nothing, and seen vectors that are not finite show.
static row_sums correct_gradient(const ea_problem *p, backward_room *room, int64_t r, int64_t key, int64_t n, REAL *w,
                                 const REAL *share, REAL *h, const row_terms *t, REAL *bias) {
  row_sums sums = {0, 0};
  read_seen(p, room->rows + r, key, n, room->bad.seen);
  for (int64_t j = 0; j < n; j++) {
    REAL g = (w[j] == t->normalizer ? 0 : t->product[j] - t->mean) + t->grad_normalizer;
    REAL bad = room->bad.rows[r] + room->bad.keys[j], term = 0;
    if (room->bad.seen[j]) {
      w[j] += bad;
      bad += room->bad.values[j];
      h[j] += bad;
      term = w[j] * g + bad;
      sums.along += term * (share ? share[j] : w[j]);
      sums.share += w[j] * (share ? share[j] : w[j]);
    } else {
      w[j] = h[j] = 0;
    }
    if (bias) bias[j] = term;
  }
  return sums;
}

static void add_to_mask(backward_run *run, const row_span *row, int64_t key, int64_t n, const REAL *bias) {
  const ea_problem *p = run->p;
  const int64_t *size = p->mask_size;
  int64_t b = size[0] == 1 ? 0 : row->batch, h = size[1] == 1 ? 0 : row->head, i = size[2] == 1 ? 0 : row->query;
  int64_t index = ((b * size[1] + h) * size[2] + i) * size[3] + (size[3] == 1 ? 0 : key);
  if (!run->mask_sums) {
    write_row((char *)p->grad_mask + index * dtype_size(p->mask_dtype), p->mask_dtype, bias, n);
  } else if (size[3] == 1) {
    for (int64_t j = 0; j < n; j++) run->mask_sums[index] += bias[j];
  } else {
    for (int64_t j = 0; j < n; j++) run->mask_sums[index + j] += bias[j];
  }
}

// How far apart query and key of a problem are, at most, and one more.
INLINE int64_t reach_of(const ea_problem *p) { return least(p->reach, most(p->rows, p->keys)); }

static void add_to_relative(backward_run *run, const row_span *row, int64_t key, int64_t n, const REAL *bias) {
  int64_t reach = reach_of(run->p), size = 2 * reach - 1;
  double *to = run->relative_sums + (row->batch * run->p->heads + row->head) * size + (key - row->place + reach - 1);
  for (int64_t j = 0; j < n; j++) to[j] += bias[j];
}

static void add_relative_sums(const backward_run *run) {
  const ea_problem *p = run->p;
  int64_t reach = reach_of(p), size = 2 * reach - 1, whole = 2 * p->reach - 1;
  for (int64_t i = 0; i < p->batch * p->heads; i++) {
    const double *from = run->relative_sums + i * size;
    double *to = p->grad_relative + i / p->heads * p->grad_relative_stride + i % p->heads * whole + (p->reach - reach);
    for (int64_t d = 0; d < size; d++) to[d] += from[d];
  }
}

static void write_mask_sums(const ea_problem *p, const double *sums, int64_t numbers) {
  REAL chunk[256];
  for (int64_t start = 0; start < numbers; start += 256) {
    int64_t n = least(256, numbers - start);
    for (int64_t i = 0; i < n; i++) chunk[i] = (REAL)sums[start + i];
    write_row((char *)p->grad_mask + start * dtype_size(p->mask_dtype), p->mask_dtype, chunk, n);
  }
}

// The terms of row r, which has its product in `product`; `complete` if the block has all n keys that it sees.
INLINE row_terms terms_of(const backward_run *run, const backward_room *room, int64_t r, const REAL *product, int64_t n,
                          int complete) {
  const ea_problem *p = run->p;
  int64_t index = index_of(p, room->rows + r);
  const REAL *w = room->weights + place_of(&run->plan, r);
  REAL total = run->numbers.normalizer[index];
  row_terms t = {.product = product,
                 .factor = !run->plan.pairs ? 1 : total == 0 ? 0 : 1 / total / (REAL)p->keep,
                 .normalizer = total,
                 .mean = run->numbers.mean[index],
                 .grad_normalizer = p->grad_normalizer ? read_number(p->grad_normalizer, sums_dtype(p), index) : 0};
  if (complete && t.normalizer != 0 && !is_bad(room, r)) {
    vec sum = {0};
    for (int64_t j = 0; j < n; j += V) sum += load(w + j) / t.normalizer * load(t.product + j);
    REAL mean = sum_of(sum) * t.factor;
    if (mean == mean) t.mean = mean;  // else a hidden value is so large that its product is infinite
  }
  return t;
}

// Add to the sums of a row.
INLINE void add_sums(const backward_run *run, const row_span *row, row_sums own, row_sums *sums) {
  row_sums *to = sums + index_of(run->p, row);
  to->along += own.along;
  to->share += own.share;
}

#if HAS_PAIRS
// The work of `row_gradient` and `narrow_group` for a group of rows, two by two, where f is w and all weights are kept.
static void pair_gradient(backward_run *run, backward_room *room, int64_t r, int mr, int64_t n, int complete, row_sums *sums) {
  int64_t ldw = leading(run->plan.block_keys);
  const REAL *w = room->weights, *h = room->derivatives, *product = room->products;
  for (int64_t end = r + mr; r < end; r += 2, w += 2 * ldw, h += 2 * ldw, product += 2 * ldw) {
    int rows = (int)least(2, end - r);
    REAL *weight_pairs = room->weight_pairs + r / 2 * ldw, *derivative_pairs = room->derivative_pairs + r / 2 * ldw;
    uint16_t *narrow_derivatives = (uint16_t *)(room->narrow_derivatives + r * ldw / 2);
    row_terms t[2];
    for (int i = 0; i < rows; i++) t[i] = terms_of(run, room, r + i, product + i * ldw, n, complete);
    vec along[2] = {0}, shares[2] = {0};
    for (int64_t j = 0; j < n; j += V) {
      vec weight[2] = {0}, derivative[2] = {0};
      UNROLL for (int i = 0; i < 2; i++) {
        if (i == rows) break;
        vec x = load(w + i * ldw + j), g = gradient_of(x, load(t[i].product + j), t + i);
        derivative[i] = load(h + i * ldw + j) * g;
        weight[i] = x * t[i].factor;
        along[i] += x * g * x;
        shares[i] += x * x;
      }
      store(weight_pairs + j, interleaved(narrow(weight[0], weight[1])));
      __m512i both = narrow(derivative[0], derivative[1]);
      store(derivative_pairs + j, interleaved(both));
      _mm256_storeu_si256((__m256i *)(narrow_derivatives + j), _mm512_castsi512_si256(both));
      if (rows == 2) _mm256_storeu_si256((__m256i *)(narrow_derivatives + ldw + j), _mm512_extracti64x4_epi64(both, 1));
    }
    for (int i = 0; i < rows; i++) {
      row_sums own = {sum_of(along[i]), sum_of(shares[i])};
      if (own.along != own.along) run->left_pairs = 1;
      add_sums(run, room->rows + r + i, own, sums);
    }
  }
}

// w / N and h g of a group of rows as pairs of bfloat16, from the first of n keys.
static void narrow_group(const backward_plan *plan, backward_room *room, int64_t r, int mr, int64_t n,
                         const REAL *factor) {
  int64_t ldw = leading(plan->block_keys);
  static const REAL zeros[BACKWARD_KEYS];
  for (int i = 0; i < mr; i += 2, r += 2) {
    const REAL *w = room->weights + i * ldw, *h = room->derivatives + i * ldw;
    REAL *narrow = room->narrow_derivatives + r * ldw / 2;
    int alone = i + 1 == mr;
    narrow_rows(room->weight_pairs + r / 2 * ldw, NULL, NULL, w, factor[i], alone ? zeros : w + ldw,
                alone ? 0 : factor[i + 1], n);
    narrow_rows(room->derivative_pairs + r / 2 * ldw, narrow, alone ? narrow : narrow + ldw / 2, h, 1,
                alone ? zeros : h + ldw, 1, n);
  }
}
#endif

// From w and h of a group of rows to h g. With pairs, w and h are computed here as well, and both become pairs.
static void group_gradient(backward_run *run, backward_room *room, int64_t r, int mr, int64_t key, int64_t n,
                           row_sums *sums) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t ldw = leading(plan->block_keys);
  visible_range seen = range_of(room->rows + r, mr);
  int64_t columns = least(n, seen.end - key);
  if (plan->pairs) {
    int64_t begin = most(0, round_up(columns, V)), bytes = (padded(n) - begin) * (int64_t)sizeof(REAL);
    for (int i = 0; bytes > 0 && i < mr; i += 2) {
      memset(room->weight_pairs + (r + i) / 2 * ldw + begin, 0, (size_t)bytes);
      memset(room->derivative_pairs + (r + i) / 2 * ldw + begin, 0, (size_t)bytes);
    }
  }
  if (columns <= 0) return;
  if (plan->pairs) backward_weights(p, plan, room, r, r + mr, key, n);
  group_products(p, plan, room, r, mr, key, n, columns);
  int complete = key <= seen.begin && seen.end <= key + n;
  REAL *bias = p->grad_mask || p->grad_relative ? room->room : NULL;
#if HAS_PAIRS
  if (plan->pairs && !plan->keeps_shares && !p->dropout_seeds && !bias) {
    pair_gradient(run, room, r, mr, columns, complete, sums);
    return;
  }
#endif
  REAL factor[MR];
  for (int i = 0; i < mr; i++) {
    const row_span *row = room->rows + r + i;
    int64_t at = place_of(plan, r + i);
    REAL *w = room->weights + at, *h = room->derivatives + at;
    REAL *share = plan->keeps_shares ? room->shares + at : NULL;
    row_terms t = terms_of(run, room, r + i, room->products + i * ldw, columns, complete);
    row_sums own = share ? row_gradient(columns, w, share, h, &t, bias) : row_gradient(columns, w, NULL, h, &t, bias);
    if (plan->pairs && own.along != own.along) run->left_pairs = 1;
    if (!plan->pairs && (is_bad(room, r + i) || own.along != own.along)) {
      own = correct_gradient(p, room, r + i, key, round_up(columns, V), w, share, h, &t, bias);
    }
    if (p->dropout_seeds) drop(w, columns, kept_of(plan, room, r + i), key);  // what is left are the weights of dv
    add_sums(run, row, own, sums);
    if (p->grad_mask) add_to_mask(run, row, key, columns, bias);
    if (p->grad_relative) add_to_relative(run, row, key, columns, bias);
    factor[i] = t.factor;
  }
#if HAS_PAIRS
  if (plan->pairs) narrow_group(plan, room, r, mr, columns, factor);
#else
  (void)factor;
#endif
}

// Add what a block of rows and a block of keys give one another.
static void backward_block(backward_run *run, backward_room *room, int64_t count, int64_t key, int64_t n,
                           REAL *grad_query, row_sums *sums) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t ldw = leading(plan->block_keys), columns = plan->columns, value_columns = plan->value_columns;
  if (!plan->pairs) backward_weights(p, plan, room, 0, count, key, n);
  read_block_kept(p, plan, room, count, key, n);
  int64_t groups = (count + MR - 1) / MR + (n + MR - 1) / MR, rows = rows_at_a_time(&room->ahead, groups);
  for (int64_t r = 0; r < count; r += MR) {
    bring_some(&room->ahead, rows);
    group_gradient(run, room, r, (int)least(MR, count - r), key, n, sums);
  }
  for (int64_t c = 0; c < columns; c += PANEL) {
    int nr = (int)(panel_width(c, columns) / V);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      int64_t seen = least(n, range_of(room->rows + r, mr).end - key);
      REAL *to = grad_query + r * columns + c;
      if (plan->pairs) {
        add_pairs(mr, nr, (seen + 1) / 2, room->narrow_derivatives + r * ldw / 2, ldw / 2, 0, room->keys + c, columns, to,
                  columns);
      } else {
        add(mr, nr, seen, room->derivatives + r * ldw, ldw, 0, room->keys + c, columns, to, columns);
      }
    }
  }
  int step = plan->pairs ? 2 : 1;
  void (*add_some)(int, int, int64_t, const REAL *, int64_t, int, const REAL *, int64_t, REAL *, int64_t) =
      plan->pairs ? add_pairs : add;
  const REAL *w = plan->pairs ? room->weight_pairs : room->weights, *h = plan->pairs ? room->derivative_pairs : room->derivatives;
  const REAL *query = plan->pairs ? room->query_pairs : room->query;
  const REAL *upstream = plan->pairs ? room->upstream_pairs : room->upstream;
  // Rows before `first` see no key from j on.
  for (int64_t c = 0; c < most(columns, value_columns); c += PANEL) {
    for (int64_t j = 0, first = 0; j < n; j += MR) {
      int mr = (int)least(MR, n - j);
      while (first < count && range_of(room->rows + first, least(MR, count - first)).end <= key + j) first += MR;
      if (first >= count) break;
      bring_some(&room->ahead, rows);
      int64_t at = first / step, n_rows = (count - first + step - 1) / step;
      if (c < value_columns) {
        add_some(mr, (int)(panel_width(c, value_columns) / V), n_rows, w + at * ldw + j, ldw, 1,
                 upstream + at * value_columns + c, value_columns, room->grad_value + j * value_columns + c, value_columns);
      }
      if (c < columns) {
        add_some(mr, (int)(panel_width(c, columns) / V), n_rows, h + at * ldw + j, ldw, 1, query + at * columns + c,
                 columns, room->grad_key + j * columns + c, columns);
      }
    }
  }
}

// Have dq . q be `along`, by a multiple of q, which is read from `from` to `query`.
static void set_along(REAL *dq, REAL *query, int64_t n, REAL along, const void *from, int64_t dtype, int64_t stride) {
  REAL largest = 0;
  read_row(query, from, dtype, stride, n);
  for (int64_t e = 0; e < n; e++) largest = query[e] > largest ? query[e] : -query[e] > largest ? -query[e] : largest;
  REAL inverse = 1 / largest;
  if (!(inverse > 0 && inverse <= LARGEST)) return;  // q = 0, or not finite, or so small that its inverse is not
  scale_row(query, n, inverse);
  REAL more = (along * inverse - dot(query, dq, n)) / dot(query, query, n);
  for (int64_t e = 0; e < n; e++) dq[e] += more * query[e];
}

// Add `dq` of the parts of a row up in the first, put in its part along q, and write it. `query` is room for q.
static void finish_query(const backward_run *run, int64_t b, int64_t head, int64_t row, REAL *dq, REAL *query) {
  const ea_problem *p = run->p;
  int64_t rows = p->batch * p->heads * p->rows, index = row_place(p, b, head, row);
  row_sums sums = run->sums[index];
  for (int64_t part = 1; part < run->plan.parts; part++) {
    for (int64_t c = 0; c < p->width; c++) dq[c] += dq[part * run->query_size + c];
    sums.along += run->sums[part * rows + index].along;
    sums.share += run->sums[part * rows + index].share;
  }
  if (run->plan.pairs) scale_row(dq, p->width, (REAL)run->plan.factor);
  REAL normalizer = run->numbers.normalizer[index];
  // Where f is near 1, it is the other way that cancels.
  if (p->squared ? normalizer != 0 : sums.share < normalizer / 2) {
    REAL grad_normalizer = p->grad_normalizer ? read_number(p->grad_normalizer, sums_dtype(p), index) : 0;
    REAL along = 2 * (grad_normalizer * normalizer - (p->squared ? 0 : sums.along));
    set_along(dq, query, p->width, along, row_of(&p->query, p->dtype, b, head, row), p->dtype, p->query.stride[3]);
  }
  if (run->plan.in_place) return;
  write_row((char *)p->grad_query + index * p->width * dtype_size(p->dtype), p->dtype, dq, p->width);
}

// Rows of a block from `first` on, as far as they are in one head.
static void look_at_rows(const ea_problem *p, const backward_plan *plan, lookahead *ahead, int64_t b, int64_t kv_head,
                         int64_t first) {
  int64_t head = kv_head * (p->heads / p->kv_heads) + first / p->rows, query = first % p->rows;
  int64_t count = least(plan->block_rows, p->rows - query);
  look_at(ahead, &p->query, p->dtype, b, head, query, count, p->width);
  look_at(ahead, &p->grad_output, p->dtype, b, head, query, count, p->value_width);
}

// The first rows of a key head, and keys of it.
static lookahead look_at_keys(const ea_problem *p, const backward_plan *plan, int64_t b, int64_t kv_head, int64_t block) {
  int64_t key = block * plan->key_step, keys = has_blocks(p) ? 0 : least(plan->key_step, key_count(p, b) - key);
  lookahead ahead = {.count = 0};
  look_at(&ahead, &p->value, p->dtype, b, kv_head, key, keys, p->value_width);
  look_at(&ahead, &p->key, p->dtype, b, kv_head, key, keys, p->width);
  look_at_rows(p, plan, &ahead, b, kv_head, 0);
  return ahead;
}

// The gradients of key head `kv_head`, from the key blocks part, part + parts, ...
static void backward_head(backward_run *run, backward_room *room, int64_t b, int64_t kv_head, int64_t part) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t head_rows = p->heads / p->kv_heads * p->rows, columns = plan->columns;
  int64_t first_row = (b * p->kv_heads + kv_head) * head_rows;
  REAL *grad_query = plan->in_place      ? (REAL *)p->grad_query + first_row * columns
                     : plan->parts == 1 ? room->grad_query
                                         : run->partial + part * run->query_size + first_row * columns;
  row_sums *sums = run->sums + part * p->batch * p->heads * p->rows;
  int64_t keys = key_count(p, b);
  memset(grad_query, 0, (size_t)(head_rows * columns) * sizeof(REAL));
  int64_t groups = p->heads / p->kv_heads, first_head = kv_head * groups, key_step = is_packed(p) ? p->kv_heads : 1;
  for (int64_t h = first_head; h < first_head + groups; h++) {
    for (int64_t r = 0; r < p->rows; r++) sums[row_place(p, b, h, r)] = (row_sums){0, 0};
  }
  for (int64_t block = part; block < plan->key_blocks; block += plan->parts) {
    int64_t key = block * plan->key_step, n = least(plan->key_step, p->keys - key), size = dtype_size(p->dtype);
    int64_t exist = most(0, least(n, keys - key));
    char *to_keys = (char *)p->grad_key + key_place(p, b, kv_head, key) * p->width * size;
    char *to_values = (char *)p->grad_value + key_place(p, b, kv_head, key) * p->value_width * size;
    for (int64_t j = exist; j < n; j++) {
      clear(to_keys + j * key_step * p->width * size, p->width * size);
      clear(to_values + j * key_step * p->value_width * size, p->value_width * size);
    }
    if ((n = exist) == 0) continue;
    int are_packed = 0;  // not before some row sees the keys
    memset(room->grad_key, 0, (size_t)(n * columns) * sizeof(REAL));
    memset(room->grad_value, 0, (size_t)(n * plan->value_columns) * sizeof(REAL));
    for (int64_t first = 0; first < head_rows; first += plan->block_rows) {
      int64_t count = least(plan->block_rows, head_rows - first);
      locate_rows(p, b, kv_head, first, count, room->rows);
      visible_range seen = range_of(room->rows, count);
      if (seen.end <= key || seen.begin >= key + n) continue;
      int listed = listed_keys(p, room->rows, count, key, n);
      if (listed == BLOCK_HIDDEN) continue;
      room->mask.all_listed = listed == BLOCK_WHOLE;
      if (!are_packed) pack_keys(p, plan, room, b, kv_head, key, n);
      are_packed = 1;
      if (has_bias(p)) {
        for (int64_t r = 0; r < count; r++) room->rows[r].bias_max = run->numbers.bias_max[index_of(p, room->rows + r)];
      }
      pack_row_block(p, plan, room, count, run->numbers.normalizer);
      if (plan->looks_ahead && first + count < head_rows) {
        room->ahead = (lookahead){.count = 0};
        look_at_rows(p, plan, &room->ahead, b, kv_head, first + count);
      } else if (plan->looks_ahead) {
        int64_t next = block + plan->parts;
        room->ahead = next < plan->key_blocks ? look_at_keys(p, plan, b, kv_head, next) : room->following;
      }
      backward_block(run, room, count, key, n, grad_query + first * columns, sums);
    }
    scale_row(room->grad_key, n * columns, (REAL)plan->factor);
    for (int64_t j = 0; j < n; j++) {
      if (plan->looks_ahead && j + ROWS_AHEAD < n) {
        bring(to_keys + (j + ROWS_AHEAD) * key_step * p->width * size, p->width * size);
        bring(to_values + (j + ROWS_AHEAD) * key_step * p->value_width * size, p->value_width * size);
      }
      write_row(to_keys + j * key_step * p->width * size, p->dtype, room->grad_key + j * columns, p->width);
      write_row(to_values + j * key_step * p->value_width * size, p->dtype, room->grad_value + j * plan->value_columns,
                p->value_width);
    }
  }
  if (plan->parts > 1) return;
  for (int64_t h = first_head; h < first_head + groups; h++) {
    for (int64_t r = 0; r < p->rows; r++, grad_query += columns) {
      if (plan->looks_ahead && r + ROWS_AHEAD < p->rows) {
        int64_t size = p->width * dtype_size(p->dtype);
        bring((char *)p->grad_query + row_place(p, b, h, r + ROWS_AHEAD) * size, size);
        bring(row_of(&p->query, p->dtype, b, h, r + ROWS_AHEAD), size);
      }
      finish_query(run, b, h, r, grad_query, room->room);
    }
  }
}

// The output of the first rows of a key head.
static void look_at_output(const ea_problem *p, const backward_plan *plan, lookahead *ahead, int64_t b, int64_t kv_head) {
  int64_t head = kv_head * (p->heads / p->kv_heads), width = p->value_width;
  int64_t stride = row_place(p, 0, 0, 1) * width, start = row_place(p, b, head, 0) * width;
  ea_tensor output = {(const char *)p->output + start * dtype_size(p->dtype), {0, 0, stride, 1}};
  look_at(ahead, &output, p->dtype, 0, 0, 0, least(plan->block_rows, p->rows), width);
}

// The first key head of a task: where it begins.
static lookahead look_at_gradients(const backward_run *run, int64_t task) {
  const backward_plan *plan = &run->plan;
  int64_t unit = task / plan->parts, b = unit / plan->mask_heads, kv_head = unit % plan->mask_heads;
  lookahead ahead = look_at_keys(run->p, plan, b, kv_head, task % plan->parts);
  if (!plan->numbers_first) look_at_output(run->p, plan, &ahead, b, kv_head);
  return ahead;
}

// All key heads that share elements of the gradient of the mask, one after the other.
static void backward_task(backward_run *run, backward_room *room, int64_t task) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t part = task % plan->parts, unit = task / plan->parts;
  int64_t batch = unit / plan->mask_heads, head = unit % plan->mask_heads;
  room->mask.from = NULL;
  for (int64_t b = batch; b < p->batch; b += plan->mask_batches) {
    for (int64_t h = head; h < p->kv_heads; h += plan->mask_heads) {
      int64_t first = (b * p->kv_heads + h) * plan->row_blocks;
      for (int64_t i = 0; !plan->numbers_first && i < plan->row_blocks; i++) numbers_task(run, room, first + i);
      if (!run->unsafe) backward_head(run, room, b, h, part);
    }
  }
}

// The problem of a task, of which those of a thread rise.
static backward_run *run_of(const backward_job *job, backward_run *run, int64_t task) {
  while (run < job->runs + job->count - 1 && run[1].first_task <= task) run++;
  return run;
}

static void backward_thread(void *context, int64_t thread) {
  backward_job *job = context;
  backward_run *run = NULL;
  backward_room room;
  for (int64_t task, end; ea_take(&job->queue, &task, &end);) {
    for (; task < end; task++) {
      backward_run *own = run_of(job, run ? run : job->runs, task);
      if (own != run) lay_out_backward(own->p, &own->plan, job->rooms + thread * job->room_bytes, &room);
      run = own;
      if (run->plan.looks_ahead && !job->numbers) {
        backward_run *next = run_of(job, run, task + 1);
        int is_last = task + 1 == job->queue.count;
        room.following = is_last ? (lookahead){.count = 0} : look_at_gradients(next, task + 1 - next->first_task);
      }
      (job->numbers ? numbers_task : backward_task)(run, &room, task - run->first_task);
    }
  }
}

// Add up the parts of each query of a problem that is not packed.
static void merge_thread(void *context, int64_t thread) {
  (void)thread;
  backward_job *job = context;
  const backward_run *run = job->runs;
  const ea_problem *p = run->p;
  for (int64_t head, end; ea_take(&job->queue, &head, &end);) {
    for (int64_t r = head * p->rows; r < end * p->rows; r++) {
      REAL *sum = run->partial + r * run->plan.columns;
      // Once it is added, the second part is free.
      finish_query(run, r / p->rows / p->heads, r / p->rows % p->heads, r % p->rows, sum, sum + run->query_size);
    }
  }
}

static int64_t numbers_tasks(const backward_run *run) {
  return run->plan.numbers_first ? run->p->batch * run->p->kv_heads * run->plan.row_blocks : 0;
}

static int64_t gradient_tasks(const backward_run *run) {
  return run->plan.mask_batches * run->plan.mask_heads * run->plan.parts;
}

static void share_out(backward_job *job, void (*thread)(void *, int64_t), int64_t tasks) {
  int64_t threads = useful_threads(job->threads, job->work, tasks);
  job->queue = queue_of(job->work, tasks, threads);
  ea_parallel(thread, job, threads);
}

// The numbers of all problems that have them first, or the gradients of those that need no double arithmetic.
static void share_out_all(backward_job *job, int numbers) {
  int64_t tasks = 0;
  job->numbers = numbers;
  for (backward_run *run = job->runs; run < job->runs + job->count; run++) {
    run->first_task = tasks;
    tasks += numbers ? numbers_tasks(run) : run->unsafe ? 0 : gradient_tasks(run);
  }
  if (tasks) share_out(job, backward_thread, tasks);
}

static int64_t mask_numbers(const ea_problem *p) {
  return p->mask_size[0] * p->mask_size[1] * p->mask_size[2] * p->mask_size[3];
}

static int backward_in_double(const problem_list *list);
static int run_backward(const problem_list *list, int may_use_pairs);

// Once more those problems that are in need of double arithmetic, or of no pairs.
static int repeat_some(const backward_job *job, int in_double) {
  ea_problem *some = allocate(job->count * (int64_t)sizeof(ea_problem));
  if (!some) return EA_NO_MEMORY;
  problem_list list = {some, 0, job->threads};
  for (int64_t i = 0; i < job->count; i++) {
    const backward_run *run = job->runs + i;
    if (in_double ? run->unsafe : !run->unsafe && run->left_pairs) some[list.count++] = *run->p;
  }
  int status = list.count == 0 ? EA_OK : in_double ? backward_in_double(&list) : run_backward(&list, 0);
  release(some);
  return status;
}

static void clear_gradients_of_none(const ea_problem *p) {
  int64_t rows = p->batch * p->heads * p->rows, keys = p->batch * p->kv_heads * p->keys, size = dtype_size(p->dtype);
  clear(p->grad_query, rows * p->width * size);
  clear(p->grad_key, keys * p->width * size);
  clear(p->grad_value, keys * p->value_width * size);
}

// Lay out what the problems share at `memory`, or only count its bytes.
static int64_t lay_out_runs(backward_job *job, int64_t threads, char *memory) {
  arena a = {memory, 0};
  job->rooms = take(&a, threads * job->room_bytes);
  for (backward_run *run = job->runs; run < job->runs + job->count; run++) {
    const ea_problem *p = run->p;
    const backward_plan *plan = &run->plan;
    int64_t rows = p->batch * p->heads * p->rows;
    int sum_mask = p->grad_mask && mask_numbers(p) < rows * p->keys;
    run->query_size = rows * plan->columns;
    run->numbers.normalizer = take(&a, rows * sizeof(REAL));
    run->numbers.mean = take(&a, rows * sizeof(REAL));
    run->numbers.bias_max = take(&a, has_bias(p) ? rows * sizeof(REAL) : 0);
    run->sums = take(&a, plan->parts * rows * (int64_t)sizeof(row_sums));
    run->partial = take(&a, plan->parts > 1 ? plan->parts * run->query_size * sizeof(REAL) : 0);
    run->mask_sums = take(&a, sum_mask ? mask_numbers(p) * sizeof(double) : 0);
    if (!sum_mask) run->mask_sums = NULL;
    int64_t distances = p->grad_relative ? p->batch * p->heads * (2 * reach_of(p) - 1) * (int64_t)sizeof(double) : 0;
    run->relative_sums = take(&a, distances);
    if (memory) clear(run->relative_sums, distances);
    if (memory && sum_mask) clear(run->mask_sums, mask_numbers(p) * (int64_t)sizeof(double));
  }
  return a.used;
}

static int run_backward(const problem_list *list, int may_use_pairs) {
  backward_run one, *runs = list->count == 1 ? &one : allocate(list->count * (int64_t)sizeof(backward_run));
  if (!runs) return EA_NO_MEMORY;
  backward_job job = {.runs = runs, .threads = list->threads};
  int64_t tasks = 0, more_tasks = 0;
  for (int64_t i = 0; i < list->count; i++) {
    const ea_problem *p = list->problem + i;
    if (p->grad_mask) clear(p->grad_mask, mask_numbers(p) * dtype_size(p->mask_dtype));
    if (p->batch * p->heads * p->rows == 0 || p->keys == 0) {
      clear_gradients_of_none(p);
      continue;
    }
    backward_run *run = runs + job.count++;
    *run = (backward_run){.p = p, .plan = plan_backward(p, may_use_pairs)};
    backward_room room;
    job.room_bytes = most(job.room_bytes, lay_out_backward(p, &run->plan, NULL, &room));
    job.work += operations(p);
    tasks += numbers_tasks(run);
    more_tasks += gradient_tasks(run);
  }
  int64_t threads = most(1, least(list->threads, most(tasks, more_tasks)));
  void *memory = job.count ? allocate(lay_out_runs(&job, threads, NULL)) : NULL;
  int status = memory || !job.count ? EA_OK : EA_NO_MEMORY;
  if (memory) {
    lay_out_runs(&job, threads, memory);
    share_out_all(&job, 1);
    share_out_all(&job, 0);
    int done = !runs->unsafe && !runs->left_pairs;
    if (done && runs->plan.parts > 1) share_out(&job, merge_thread, runs->p->batch * runs->p->heads);
    if (done && runs->mask_sums) write_mask_sums(runs->p, runs->mask_sums, mask_numbers(runs->p));
    for (int64_t i = 0; i < job.count; i++) {
      if (runs[i].p->grad_relative && !runs[i].unsafe && !runs[i].left_pairs) add_relative_sums(runs + i);
    }
    release(memory);
    int again = 0;
    for (int64_t i = 0; i < job.count; i++) again |= runs[i].unsafe || runs[i].left_pairs;
    if (again) status = repeat_some(&job, 1);
    if (again && status == EA_OK) status = repeat_some(&job, 0);
  }
  if (runs != &one) release(runs);
  return status;
}

#if !REAL_IS_DOUBLE
// The gradients of rows from `row` and keys from `key` on, which are in no sequence.
static void clear_gradients(const ea_problem *p, int64_t row, int64_t key) {
  int64_t size = dtype_size(p->dtype), at = row * p->heads * p->width * size, key_at = key * p->kv_heads * size;
  int64_t keys = (p->keys - key) * p->kv_heads * size;
  clear(moved(p->grad_query, at), (p->rows - row) * p->heads * p->width * size);
  clear(moved(p->grad_key, key_at * p->width), keys * p->width);
  clear(moved(p->grad_value, key_at * p->value_width), keys * p->value_width);
}
#endif
