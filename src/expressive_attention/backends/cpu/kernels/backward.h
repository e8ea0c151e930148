// Backward pass. With u_i = dO_i / N_i, h = f'(z) exp(bias) / 2 and g_ij = u_i . v_j - D_i + dN_i, where
// D_i = u_i . o_i = sum_j w_ij u_i . v_j / N_i:
//
//     dv_j = sum_i w_ij u_i,   dq_i = sum_j h_ij g_ij (2 scale k_j),   dk_j = 2 sum_i h_ij g_ij (scale q_i),
//     dbias_ij = w_ij g_ij.
//
// First N and D of all rows, then key head by key head: blocks of keys against blocks of rows. The keys of a
// head may be dealt out to several threads; each then has its own dq, and these are added in a fixed order.

#if REAL_IS_DOUBLE
#define BACKWARD_ROWS 48
#define BACKWARD_KEYS 128
#else
#define BACKWARD_ROWS 96
#define BACKWARD_KEYS 256
#endif

typedef struct {
  int64_t block_rows, block_keys, row_blocks, key_blocks;
  int64_t columns, value_columns;    // padded
  int64_t mask_batches, mask_heads;  // key heads that share no element of the gradient of the mask
  int64_t parts;                     // shares of the key blocks of a head
  int recompute;                     // N and D from the inputs, not from what the forward pass stored
  int in_place;                      // the gradient of the query is added up where it belongs
} backward_plan;

typedef struct {
  row_place *rows;
  REAL *query, *upstream, *keys_transposed, *values_transposed, *keys, *weights, *slopes, *products;
  REAL *grad_query, *grad_key, *grad_value, *room;
  mask_room mask;
} backward_room;

// Numbers of all rows (B, Hq, L).
typedef struct {
  REAL *normalizer, *mean, *peak;
} row_numbers;

typedef struct {
  const ea_problem *p;
  backward_plan plan;
  row_numbers numbers;
  int64_t room_bytes, query_size;
  char *rooms;
  REAL *partial;  // gradients of the query, one for each part, where there are several parts
  double *mask_sums;  // the gradient of the mask, where several terms add up to one element
  ea_queue queue;
  _Atomic int unsafe;
} backward_run;

static int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

static backward_plan plan_backward(const ea_problem *p) {
  int64_t wide = most(p->width, p->value_width), rows = p->heads / p->kv_heads * p->rows;
  backward_plan plan = {.columns = padded(p->width), .value_columns = padded(p->value_width)};
  plan.block_keys = wide > 256 ? BACKWARD_KEYS / 4 : wide > 128 ? BACKWARD_KEYS / 2 : BACKWARD_KEYS;
  plan.block_keys = least(plan.block_keys, padded(p->keys));
  plan.key_blocks = (p->keys + plan.block_keys - 1) / plan.block_keys;
  plan.row_blocks = (rows + BACKWARD_ROWS - 1) / BACKWARD_ROWS;
  plan.block_rows = least(rows, round_up((rows + plan.row_blocks - 1) / plan.row_blocks, MR));
  int shared = p->grad_mask != NULL;
  plan.mask_batches = shared && p->mask_size[0] == 1 ? 1 : p->batch;
  plan.mask_heads = shared && p->mask_size[1] == 1 ? 1 : p->kv_heads;
  int64_t units = plan.mask_batches * plan.mask_heads;
  plan.parts = least(p->threads / greatest_common_divisor(units, p->threads), plan.key_blocks);
  if (shared && p->mask_size[3] == 1) plan.parts = 1;  // all keys add to the same elements
  plan.recompute = p->dtype != REAL_DTYPE;
  plan.in_place = p->dtype == REAL_DTYPE && p->width == plan.columns && plan.parts == 1;
  return plan;
}

static int64_t lay_out_backward(const ea_problem *p, const backward_plan *plan, char *memory, backward_room *room) {
  arena a = {memory, 0};
  int64_t rows = plan->block_rows, keys = plan->block_keys, head_rows = p->heads / p->kv_heads * p->rows;
  *room = (backward_room){
      .rows = take(&a, rows * sizeof(row_place)),
      .query = take(&a, rows * plan->columns * sizeof(REAL)),
      .upstream = take(&a, rows * plan->value_columns * sizeof(REAL)),
      .keys_transposed = take(&a, keys * p->width * sizeof(REAL)),
      .values_transposed = take(&a, keys * p->value_width * sizeof(REAL)),
      .keys = take(&a, keys * plan->columns * sizeof(REAL)),
      .weights = take(&a, rows * leading(keys) * sizeof(REAL)),
      .slopes = take(&a, rows * leading(keys) * sizeof(REAL)),
      .products = take(&a, MR * leading(keys) * sizeof(REAL)),
      .grad_key = take(&a, keys * plan->columns * sizeof(REAL)),
      .grad_value = take(&a, keys * plan->value_columns * sizeof(REAL)),
      .room = take(&a, most(keys, V * round_up(most(p->width, p->value_width), V)) * sizeof(REAL)),
      .mask = {.factor = take(&a, keys * sizeof(REAL))},
  };
  if (!plan->in_place && plan->parts == 1) room->grad_query = take(&a, head_rows * plan->columns * sizeof(REAL));
  return a.used;
}

INLINE int64_t index_of(const ea_problem *p, const row_place *row) {
  return (row->batch * p->heads + row->head) * p->rows + row->query;
}

// ---- N and D of all rows ----

static void numbers_from_stored(backward_run *run, backward_room *room, int64_t count) {
  const ea_problem *p = run->p;
  for (int64_t r = 0; r < count; r++) {
    const row_place *row = room->rows + r;
    int64_t index = index_of(p, row);
    const REAL *output = (const REAL *)p->output + index * p->value_width;
    const REAL *upstream = row_of(&p->grad_output, p->dtype, row->batch, row->head, row->query);
    REAL normalizer = ((const REAL *)p->normalizer)[index];
    if (p->grad_output.stride[3] != 1) {
      read_row(room->room, upstream, p->dtype, p->grad_output.stride[3], p->value_width);
      upstream = room->room;
    }
    run->numbers.normalizer[index] = normalizer;
    run->numbers.mean[index] = normalizer == 0 ? 0 : dot(upstream, output, p->value_width) / normalizer;
    if (is_unsafe(p, row, normalizer)) run->unsafe = 1;
  }
}

// Weights and slopes of the rows over n keys from `key`, masked. Past the keys that a
// row sees there are zeros.
static void backward_weights(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t count,
                             int64_t key, int64_t n) {
  int64_t ldw = leading(plan->block_keys), whole = padded(n);
  for (int64_t start = 0; start < n; start += PANEL) {
    int64_t ld = panel_width(start, n);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      int64_t columns = least(n, range_of(room->rows + r, mr).end - key) - start;
      if (columns <= 0) continue;
      slopes(mr, columns >= PANEL ? NR : tile_vectors(columns), p->width, room->query + r * plan->columns,
             plan->columns, room->keys_transposed + start * p->width, ld, room->weights + r * ldw + start,
             room->slopes + r * ldw + start, ldw, (int)p->squared);
    }
  }
  for (int64_t r = 0; r < count; r += MR) {
    int mr = (int)least(MR, count - r);
    visible_range seen = range_of(room->rows + r, mr);
    if (is_plain(p, seen, key, n)) continue;
    for (int i = 0; i < mr; i++) {
      apply_mask(p, room->rows + r + i, key, whole, room->weights + (r + i) * ldw, &room->mask);
      apply_mask(p, room->rows + r + i, key, whole, room->slopes + (r + i) * ldw, &room->mask);
    }
  }
}

static void pack_key_block(const ea_problem *p, backward_room *room, int64_t b, int64_t kv_head, int64_t key,
                           int64_t n) {
  pack_transposed(room->keys_transposed, &p->key, p->dtype, b, kv_head, key, n, p->width, room->room);
  pack_transposed(room->values_transposed, &p->value, p->dtype, b, kv_head, key, n, p->value_width, room->room);
}

static void pack_row_block(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t count,
                           const REAL *normalizer) {
  pack_places(room->query, plan->columns, &p->query, p->dtype, p, room->rows, count, p->width, (REAL)p->scale);
  pack_places(room->upstream, plan->value_columns, &p->grad_output, p->dtype, p, room->rows, count, p->value_width, 1);
  if (!normalizer) return;
  for (int64_t r = 0; r < count; r++) {
    REAL total = normalizer[index_of(p, room->rows + r)];
    scale_row(room->upstream + r * plan->value_columns, plan->value_columns, total == 0 ? 0 : 1 / total);
  }
}

// dO_i . v_j of a group of rows and the n keys of the block.
static void group_products(const ea_problem *p, const backward_plan *plan, backward_room *room, int64_t r, int mr,
                           int64_t n, int64_t columns) {
  for (int64_t start = 0; start < columns; start += PANEL) {
    int nr = columns - start >= PANEL ? NR : tile_vectors(columns - start);
    product(mr, nr, p->value_width, room->upstream + r * plan->value_columns, plan->value_columns,
            room->values_transposed + start * p->value_width, panel_width(start, n), room->products + start,
            leading(plan->block_keys));
  }
}

static void numbers_from_inputs(backward_run *run, backward_room *room, int64_t b, int64_t kv_head, int64_t count) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t ldw = leading(plan->block_keys), end = range_of(room->rows, count).end;
  int64_t begin = range_of(room->rows, count).begin / plan->block_keys * plan->block_keys;
  for (int64_t r = 0; r < count; r++) {
    int64_t index = index_of(p, room->rows + r);
    run->numbers.normalizer[index] = run->numbers.mean[index] = 0;
  }
  pack_row_block(p, plan, room, count, NULL);
  for (int64_t key = begin; key < end; key += plan->block_keys) {
    int64_t n = least(plan->block_keys, end - key);
    pack_key_block(p, room, b, kv_head, key, n);
    backward_weights(p, plan, room, count, key, n);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      int64_t columns = least(n, range_of(room->rows + r, mr).end - key);
      group_products(p, plan, room, r, mr, n, columns);
      for (int i = 0; i < mr; i++) {
        int64_t index = index_of(p, room->rows + r + i);
        for (int64_t j = 0; j < columns; j++) {
          REAL w = room->weights[(r + i) * ldw + j];
          run->numbers.normalizer[index] += w;
          run->numbers.mean[index] += w * room->products[i * ldw + j];
        }
      }
    }
  }
  for (int64_t r = 0; r < count; r++) {
    int64_t index = index_of(p, room->rows + r);
    REAL total = run->numbers.normalizer[index], *mean = &run->numbers.mean[index];
    *mean = total == 0 ? 0 : *mean / total / total;
    if (is_unsafe(p, room->rows + r, total)) run->unsafe = 1;
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
    for (int64_t r = 0; r < count; r++) run->numbers.peak[index_of(p, room->rows + r)] = room->rows[r].peak;
  }
  if (plan->recompute) {
    numbers_from_inputs(run, room, b, kv_head, count);
  } else {
    numbers_from_stored(run, room, count);
  }
}

// ---- gradients ----

// h becomes h g for n keys of a row, and, for the mask, w becomes w g in `bias`.
INLINE void row_gradient(int64_t n, const REAL *w, REAL *h, const REAL *product, REAL normalizer, REAL mean,
                         REAL grad_normalizer, REAL *bias) {
  for (int64_t j = 0; j < n; j += V) {
    vec weight = load(w + j), g = load(product + j) - mean;
    // A row that sees one key has w = N and g = 0, but not to the last bit, which h / N = 1 / z would magnify.
    g = choose(weight == normalizer, splat(0), g) + grad_normalizer;
    store(h + j, load(h + j) * g);
    if (bias) store(bias + j, weight * g);
  }
}

static void add_to_mask(backward_run *run, const row_place *row, int64_t key, int64_t n, const REAL *bias) {
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

static void write_mask_sums(const ea_problem *p, const double *sums, int64_t numbers) {
  REAL chunk[256];
  for (int64_t start = 0; start < numbers; start += 256) {
    int64_t n = least(256, numbers - start);
    for (int64_t i = 0; i < n; i++) chunk[i] = (REAL)sums[start + i];
    write_row((char *)p->grad_mask + start * dtype_size(p->mask_dtype), p->mask_dtype, chunk, n);
  }
}

// From w and h of a group of rows to h g.
static void group_gradient(backward_run *run, backward_room *room, int64_t r, int mr, int64_t key, int64_t n) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t ldw = leading(plan->block_keys);
  visible_range seen = range_of(room->rows + r, mr);
  int64_t columns = least(n, seen.end - key);
  if (columns <= 0) return;
  group_products(p, plan, room, r, mr, n, columns);
  int complete = key <= seen.begin && seen.end <= key + n;
  for (int i = 0; i < mr; i++) {
    const row_place *row = room->rows + r + i;
    int64_t index = index_of(p, row);
    REAL *w = room->weights + (r + i) * ldw, *h = room->slopes + (r + i) * ldw, *product = room->products + i * ldw;
    REAL normalizer = run->numbers.normalizer[index], mean = run->numbers.mean[index];
    if (complete && normalizer != 0) {
      vec sum = {0};
      for (int64_t j = 0; j < columns; j += V) sum += load(w + j) / normalizer * load(product + j);
      mean = sum_of(sum);
    }
    REAL grad_normalizer = p->grad_normalizer ? read_number(p->grad_normalizer, sums_dtype(p), index) : 0;
    REAL *bias = p->grad_mask ? room->room : NULL;
    row_gradient(columns, w, h, product, normalizer, mean, grad_normalizer, bias);
    if (bias) add_to_mask(run, row, key, columns, bias);
  }
}

// Add what a block of rows and a block of keys give one another.
static void backward_block(backward_run *run, backward_room *room, int64_t count, int64_t key, int64_t n,
                           REAL *grad_query) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t ldw = leading(plan->block_keys), columns = plan->columns, value_columns = plan->value_columns;
  backward_weights(p, plan, room, count, key, n);
  for (int64_t r = 0; r < count; r += MR) group_gradient(run, room, r, (int)least(MR, count - r), key, n);
  for (int64_t c = 0; c < columns; c += PANEL) {
    int nr = (int)(panel_width(c, columns) / V);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      int64_t seen = least(n, range_of(room->rows + r, mr).end - key);
      add(mr, nr, seen, room->slopes + r * ldw, ldw, 0, room->keys + c, columns, grad_query + r * columns + c, columns);
    }
  }
  // Rows before `first` see no key from j on.
  for (int64_t c = 0; c < most(columns, value_columns); c += PANEL) {
    for (int64_t j = 0, first = 0; j < n; j += MR) {
      int mr = (int)least(MR, n - j);
      while (first < count && range_of(room->rows + first, least(MR, count - first)).end <= key + j) first += MR;
      if (first >= count) break;
      int64_t at = first * ldw + j;
      if (c < value_columns) {
        add(mr, (int)(panel_width(c, value_columns) / V), count - first, room->weights + at, ldw, 1,
            room->upstream + first * value_columns + c, value_columns, room->grad_value + j * value_columns + c,
            value_columns);
      }
      if (c < columns) {
        add(mr, (int)(panel_width(c, columns) / V), count - first, room->slopes + at, ldw, 1,
            room->query + first * columns + c, columns, room->grad_key + j * columns + c, columns);
      }
    }
  }
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
  memset(grad_query, 0, (size_t)(head_rows * columns) * sizeof(REAL));
  for (int64_t block = part; block < plan->key_blocks; block += plan->parts) {
    int64_t key = block * plan->block_keys, n = least(plan->block_keys, p->keys - key);
    pack_key_block(p, room, b, kv_head, key, n);
    pack_rows(room->keys, columns, &p->key, p->dtype, b, kv_head, key, n, p->width, (REAL)(2 * p->scale));
    memset(room->grad_key, 0, (size_t)(n * columns) * sizeof(REAL));
    memset(room->grad_value, 0, (size_t)(n * plan->value_columns) * sizeof(REAL));
    for (int64_t first = 0; first < head_rows; first += plan->block_rows) {
      int64_t count = least(plan->block_rows, head_rows - first);
      locate_rows(p, b, kv_head, first, count, room->rows);
      visible_range seen = range_of(room->rows, count);
      if (seen.end <= key || seen.begin >= key + n) continue;
      if (has_bias(p)) {
        for (int64_t r = 0; r < count; r++) room->rows[r].peak = run->numbers.peak[index_of(p, room->rows + r)];
      }
      pack_row_block(p, plan, room, count, run->numbers.normalizer);
      backward_block(run, room, count, key, n, grad_query + first * columns);
    }
    int64_t at = (b * p->kv_heads + kv_head) * p->keys + key, size = dtype_size(p->dtype);
    scale_row(room->grad_key, n * columns, 2);
    for (int64_t j = 0; j < n; j++) {
      write_row((char *)p->grad_key + (at + j) * p->width * size, p->dtype, room->grad_key + j * columns, p->width);
      write_row((char *)p->grad_value + (at + j) * p->value_width * size, p->dtype,
                room->grad_value + j * plan->value_columns, p->value_width);
    }
  }
  if (plan->in_place || plan->parts > 1) return;
  for (int64_t r = 0; r < head_rows; r++) {
    write_row((char *)p->grad_query + (first_row + r) * p->width * dtype_size(p->dtype), p->dtype,
              grad_query + r * columns, p->width);
  }
}

// All key heads that share elements of the gradient of the mask, one after the other.
static void backward_task(backward_run *run, backward_room *room, int64_t task) {
  const ea_problem *p = run->p;
  const backward_plan *plan = &run->plan;
  int64_t part = task % plan->parts, unit = task / plan->parts;
  int64_t batch = unit / plan->mask_heads, head = unit % plan->mask_heads;
  room->mask.from = NULL;
  for (int64_t b = batch; b < p->batch; b += plan->mask_batches) {
    for (int64_t h = head; h < p->kv_heads; h += plan->mask_heads) backward_head(run, room, b, h, part);
  }
}

static void backward_thread(void *context, int64_t thread) {
  backward_run *run = context;
  backward_room room;
  lay_out_backward(run->p, &run->plan, run->rooms + thread * run->room_bytes, &room);
  for (int64_t task, end; ea_take(&run->queue, &task, &end);) {
    for (; task < end; task++) backward_task(run, &room, task);
  }
}

static void numbers_thread(void *context, int64_t thread) {
  backward_run *run = context;
  backward_room room;
  lay_out_backward(run->p, &run->plan, run->rooms + thread * run->room_bytes, &room);
  for (int64_t task, end; ea_take(&run->queue, &task, &end);) {
    for (; task < end; task++) numbers_task(run, &room, task);
  }
}

static void merge_thread(void *context, int64_t thread) {
  (void)thread;
  backward_run *run = context;
  const ea_problem *p = run->p;
  int64_t columns = run->plan.columns, size = dtype_size(p->dtype);
  for (int64_t head, end; ea_take(&run->queue, &head, &end);) {
    for (int64_t r = head * p->rows; r < end * p->rows; r++) {
      REAL *sum = run->partial + r * columns;
      for (int64_t part = 1; part < run->plan.parts; part++) {
        for (int64_t c = 0; c < p->width; c++) sum[c] += sum[part * run->query_size + c];
      }
      write_row((char *)p->grad_query + r * p->width * size, p->dtype, sum, p->width);
    }
  }
}

static void share_out(backward_run *run, void (*thread)(void *, int64_t), int64_t tasks) {
  int64_t threads = useful_threads(run->p, tasks);
  run->queue = queue_of(run->p, tasks, threads);
  ea_parallel(thread, run, threads);
}

static int backward_in_double(const ea_problem *p);

static int run_backward(const ea_problem *p) {
  int64_t rows = p->batch * p->heads * p->rows, mask_numbers = 1;
  for (int i = 0; i < 4; i++) mask_numbers *= p->mask_size[i];
  if (p->grad_mask) clear(p->grad_mask, mask_numbers * dtype_size(p->mask_dtype));
  if (rows == 0 || p->keys == 0) {
    clear(p->grad_query, rows * p->width * dtype_size(p->dtype));
    int64_t keys = p->batch * p->kv_heads * p->keys * dtype_size(p->dtype);
    clear(p->grad_key, keys * p->width);
    clear(p->grad_value, keys * p->value_width);
    return EA_OK;
  }
  backward_run run = {.p = p, .plan = plan_backward(p)};
  const backward_plan *plan = &run.plan;
  run.query_size = rows * plan->columns;
  backward_room room;
  run.room_bytes = lay_out_backward(p, plan, NULL, &room);
  int64_t tasks = plan->mask_batches * plan->mask_heads * plan->parts;
  int sum_mask = p->grad_mask && mask_numbers < rows * p->keys;
  arena a = {NULL, 0};
  void *memory = NULL;
  // Twice: first to count.
  for (int i = 0; i < 2; i++) {
    if (i == 1 && posix_memalign(&memory, 64, (size_t)a.used) != 0) return EA_NO_MEMORY;
    a = (arena){memory, 0};
    run.rooms = take(&a, most(1, least(p->threads, most(tasks, p->batch * p->kv_heads * plan->row_blocks))) * run.room_bytes);
    run.numbers.normalizer = take(&a, rows * sizeof(REAL));
    run.numbers.mean = take(&a, rows * sizeof(REAL));
    run.numbers.peak = take(&a, has_bias(p) ? rows * sizeof(REAL) : 0);
    run.partial = take(&a, plan->parts > 1 ? plan->parts * run.query_size * sizeof(REAL) : 0);
    run.mask_sums = take(&a, sum_mask ? mask_numbers * sizeof(double) : 0);
  }
  if (sum_mask) {
    clear(run.mask_sums, mask_numbers * (int64_t)sizeof(double));
  } else {
    run.mask_sums = NULL;
  }
  share_out(&run, numbers_thread, p->batch * p->kv_heads * plan->row_blocks);
  if (run.unsafe) {
    free(memory);
    return backward_in_double(p);
  }
  share_out(&run, backward_thread, tasks);
  if (plan->parts > 1) share_out(&run, merge_thread, p->batch * p->heads);
  if (sum_mask) write_mask_sums(p, run.mask_sums, mask_numbers);
  free(memory);
  return EA_OK;
}
