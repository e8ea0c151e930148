// Forward pass: blocks of rows against blocks of keys. Weights are bounded, so a block of keys adds
// sum_j w_ij v_j and sum_j w_ij to its rows and is forgotten.

// Rows and keys of a block: what a core's caches hold, found by measurement.
#if REAL_IS_DOUBLE
#define BLOCK_ROWS 96
#define BLOCK_KEYS 128
#else
#define BLOCK_ROWS 192
#define BLOCK_KEYS 256
#endif

typedef struct {
  int64_t block_rows, block_keys;
  int64_t row_blocks;        // of a key head
  int64_t parts, part_keys;  // ranges of keys whose results are added in the end
  int64_t value_columns;     // padded
  int few_rows;              // keys and values are read in their place
  int looks_ahead;           // what is needed next is asked for
  int pairs;                 // bfloat16 is multiplied in pairs
  int64_t packed_width;      // of queries and keys: with pairs, half of E
} forward_plan;

// Memory of one thread.
typedef struct {
  row_span *rows;
  const REAL *query;  // those of its block
  REAL *queries, *keys, *values, *weights, *wide_weights, *output, *sums, *room;
  uint64_t *kept;  // with dropout
  mask_room mask;
  lookahead ahead, following;  // what this block of keys, and the last one of the task, bring closer
} forward_room;

static forward_plan plan_forward(const ea_problem *p) {
  int64_t wide = most(p->width, p->value_width), rows = p->heads / p->kv_heads * p->rows;
  forward_plan plan = {.block_keys = wide > 256 ? BLOCK_KEYS / 4 : wide > 128 ? BLOCK_KEYS / 2 : BLOCK_KEYS};
  int64_t block_rows = wide > 256 ? BLOCK_ROWS / 2 : BLOCK_ROWS;
  plan.row_blocks = (rows + block_rows - 1) / block_rows;
  plan.block_rows = least(rows, round_up((rows + plan.row_blocks - 1) / plan.row_blocks, MR));
  if (has_blocks(p)) {
    plan.block_rows = least(rows, fitting(p->listed_rows, block_rows));
    plan.row_blocks = (rows + plan.block_rows - 1) / most(1, plan.block_rows);
  }
  plan.value_columns = padded(p->value_width);
  plan.few_rows = rows <= FEW_ROWS && can_read(p, &p->key, p->width) && can_read(p, &p->value, p->value_width);
  if (plan.few_rows) plan.block_keys = FEW_ROWS_KEYS;
  plan.pairs = !plan.few_rows && can_use_pairs(p);
  plan.packed_width = plan.pairs ? p->width / 2 : p->width;
  plan.block_keys = least(plan.block_keys, padded(p->keys));
  int64_t numbers = plan.block_rows * p->width + plan.block_keys * (p->width + p->value_width);
  plan.looks_ahead = !plan.few_rows && numbers >= LEAST_AHEAD;
  int64_t tasks = p->batch * p->kv_heads * plan.row_blocks;
  int64_t parts = tasks >= p->threads ? 1 : (p->threads + tasks - 1) / tasks;
  int64_t multiple = p->dropout_seeds ? most(PANEL, KEPT_KEYS) : PANEL;
  plan.part_keys = most(multiple, round_up((p->keys + parts - 1) / parts, multiple));
  plan.parts = most(1, (p->keys + plan.part_keys - 1) / plan.part_keys);
  return plan;
}

// Lay `room` out at `memory`; return the bytes it takes. With memory NULL, only count.
static int64_t lay_out_forward(const ea_problem *p, const forward_plan *plan, char *memory, forward_room *room) {
  arena a = {memory, 0};
  int64_t rows = plan->block_rows, keys = plan->block_keys;
  *room = (forward_room){
      .rows = take(&a, rows * sizeof(row_span)),
      .queries = take(&a, rows * p->width * sizeof(REAL)),
      .keys = take(&a, keys * p->width * sizeof(REAL)),
      .values = take(&a, keys * plan->value_columns * sizeof(REAL)),
      .weights = take(&a, rows * leading(keys) * sizeof(REAL)),
      // Weights that are still to be masked, before they become bfloat16.
      .wide_weights = take(&a, plan->pairs ? rows * leading(keys) * sizeof(REAL) : 0),
      .output = take(&a, rows * plan->value_columns * sizeof(REAL)),
      .sums = take(&a, rows * sizeof(vec)),
      .room = take(&a, most(keys, V * round_up(p->width, V)) * sizeof(REAL)),
      .kept = take(&a, p->dropout_seeds ? rows * kept_words(0, keys) * (int64_t)sizeof(uint64_t) : 0),
      .mask = take_mask_room(p, &a, rows, keys),
  };
  return a.used;
}

// Whether rows that see `seen` need no mask on the n keys from `key` on, which are those at hand of `mask`. (In double, numbers may be infinite:
// then what lies past the last key in its vector is not 0.)
INLINE int is_plain(const ea_problem *p, const mask_room *mask, visible_range seen, int64_t key, int64_t n) {
  return p->mask_dtype == EA_NONE && !has_distances(p) && mask->all_listed && seen.all_begin <= key && seen.all_end >= key + n && !(REAL_IS_DOUBLE && n % V);
}

// Apply the mask to the weights w of row r over n keys from `key`, and add them to its sum; then drop some of them.
static void mask_and_sum(const ea_problem *p, const forward_plan *plan, forward_room *room, int64_t r, int64_t key,
                         int64_t n, REAL *w) {
  apply_mask(p, room->rows + r, key, round_up(n, V), w, &room->mask, 0);
  vec sum = load(room->sums + r * V);
  for (int64_t j = 0; j < n; j += V) sum += load(w + j);
  store(room->sums + r * V, sum);
  if (p->dropout_seeds) drop(w, n, room->kept + r * kept_words(0, plan->block_keys), key);
}

// Add a block of keys to the rows: weights first, by panels of keys that stay in the first cache, then their
// products with the values. Rows ahead come closer meanwhile. (A function of its own: in the one that calls it, too few
// registers would be left.)
static __attribute__((noinline)) void forward_block(const ea_problem *p, const forward_plan *plan, forward_room *room,
                                                    int64_t count, int64_t key, int64_t n, const REAL *values) {
  int64_t ldw = leading(plan->block_keys), width = plan->packed_width;
  int64_t tiles = ((n + PANEL - 1) / PANEL) * ((count + MR - 1) / MR), step = rows_at_a_time(&room->ahead, tiles);
  weights_target to = {.squared = (int)p->squared,
                       .scale2 = (REAL)(p->scale * p->scale),
                       .inverse = (REAL)(1 / (p->scale * p->scale)),
                       .ld = ldw};
  for (int64_t start = 0; start < n; start += PANEL) {
    const REAL *panel = room->keys + start * width;
    int64_t ld = panel_width(start, n);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      visible_range seen = range_of(room->rows + r, mr);
      int64_t columns = least(n, seen.end - key) - start;
      if (columns <= 0) continue;
      bring_some(&room->ahead, step);
      int plain = !p->dropout_seeds && is_plain(p, &room->mask, seen, key, n);
      to.weights = (plain || !plan->pairs ? room->weights : room->wide_weights) + r * ldw;
      to.sums = plain ? room->sums + r * V : NULL;
      to.column = start;
      weights(mr, columns >= PANEL ? NR : tile_vectors(columns), width, room->query + r * width, width, panel, ld, &to,
              plan->pairs, plan->pairs && plain);
    }
  }
  for (int64_t r = 0; r < count; r += MR) {
    int mr = (int)least(MR, count - r);
    visible_range seen = range_of(room->rows + r, mr);
    int64_t columns = least(n, seen.end - key);
    if (columns <= 0 || (!p->dropout_seeds && is_plain(p, &room->mask, seen, key, n))) continue;
    for (int i = 0; i < mr; i++) {
      REAL *w = (plan->pairs ? room->wide_weights : room->weights) + (r + i) * ldw;
      mask_and_sum(p, plan, room, r + i, key, columns, w);
#if HAS_PAIRS
      if (plan->pairs) narrow_row(room->weights + (r + i) * ldw, w, columns);
#endif
    }
  }
  for (int64_t c = 0; c < plan->value_columns; c += PANEL) {
    int nr = (int)(panel_width(c, plan->value_columns) / V);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      int64_t columns = least(n, range_of(room->rows + r, mr).end - key);
      const REAL *w = room->weights + r * ldw;
      REAL *output = room->output + r * plan->value_columns + c;
      bring_some(&room->ahead, step);
      if (plan->pairs) {
        add_pairs(mr, nr, (columns + 1) / 2, w, ldw, 0, values + c, plan->value_columns, output, plan->value_columns);
      } else {
        add(mr, nr, columns, w, ldw, 0, values + c, plan->value_columns, output, plan->value_columns);
      }
    }
  }
}

// The same for few rows, from keys and values in their place.
static void few_rows_block(const ea_problem *p, const forward_plan *plan, forward_room *room, int64_t b,
                           int64_t kv_head, int64_t count, int64_t key, int64_t n) {
  int64_t ldw = leading(plan->block_keys);
  few_rows_weights(p, b, kv_head, key, n, room->query, (int)count, room->weights, ldw);
  for (int64_t r = 0; r < count; r++) mask_and_sum(p, plan, room, r, key, n, room->weights + r * ldw);
  few_rows_values(p, b, kv_head, key, n, room->weights, ldw, (int)count, room->output, plan->value_columns);
}

// sum_j w_ij v_j and sum_j w_ij of rows first, ..., first + count - 1 over the keys begin, ..., end - 1.
static void forward_rows(const ea_problem *p, const forward_plan *plan, forward_room *room, int64_t b, int64_t kv_head,
                         int64_t first, int64_t count, int64_t begin, int64_t end) {
  int64_t width = plan->packed_width, value_columns = plan->value_columns;
  place_rows(p, b, kv_head, first, count, room->rows, room->room, plan->block_keys);
  ea_tensor keys = plan->pairs ? as_pairs(&p->key) : p->key;
  int64_t dtype = plan->pairs ? REAL_DTYPE : p->dtype;
  if (!plan->pairs) {
    pack_places(room->queries, width, &p->query, dtype, p, room->rows, count, width, (REAL)p->scale);
    room->query = room->queries;
#if HAS_PAIRS
  } else {
    room->query = pair_places(room->queries, &p->query, p, room->rows, count, p->width);
#endif
  }
  memset(room->output, 0, (size_t)(count * value_columns) * sizeof(REAL));
  memset(room->sums, 0, (size_t)count * sizeof(vec));
  room->mask.from = NULL;
  visible_range seen = range_of(room->rows, count);
  if (seen.begin > begin) begin += (seen.begin - begin) / plan->block_keys * plan->block_keys;
  end = least(end, seen.end);
  // Values in their place, where panels of them can be read from there.
  int in_place = p->dtype == REAL_DTYPE && p->value.stride[3] == 1 && p->value_width == value_columns &&
                 p->value.stride[2] == value_columns;
  for (int64_t key = begin, n; (n = next_keys(p, room->rows, count, &key, end, plan->block_keys, &room->mask)); key += n) {
    if (p->dropout_seeds) read_kept(p, room->rows, count, key, n, room->kept, kept_words(0, plan->block_keys));
    if (plan->few_rows) {
      few_rows_block(p, plan, room, b, kv_head, count, key, n);
      continue;
    }
    pack_transposed(room->keys, &keys, dtype, b, kv_head, key, n, width, room->room);
    const REAL *values = room->values;
    if (in_place) {
      values = row_of(&p->value, p->dtype, b, kv_head, key);
#if HAS_PAIRS
    } else if (plan->pairs) {
      pack_row_pairs(room->values, value_columns, &p->value, b, kv_head, key, n, p->value_width);
#endif
    } else {
      pack_rows(room->values, value_columns, &p->value, p->dtype, b, kv_head, key, n, p->value_width, 1);
    }
    if (plan->looks_ahead) {
      int64_t after = key + n, next = has_blocks(p) ? 0 : least(plan->block_keys, end - after);
      room->ahead = after < end ? (lookahead){.count = 0} : room->following;
      look_at(&room->ahead, &p->key, p->dtype, b, kv_head, after, next, p->width);
      look_at(&room->ahead, &p->value, p->dtype, b, kv_head, after, next, p->value_width);
    }
    forward_block(p, plan, room, count, key, n, values);
  }
}

INLINE int64_t index_of(const ea_problem *p, const row_span *row) {
  return row_place(p, row->batch, row->head, row->query);
}

// Write the results of a row.
static void write_results(const ea_problem *p, const row_span *row, const REAL *output, REAL normalizer) {
  int64_t index = index_of(p, row);
  write_row((char *)p->output + index * p->value_width * dtype_size(p->dtype), p->dtype, output, p->value_width);
  write_number(p->normalizer, sums_dtype(p), index, normalizer);
  // N = 0 stays 0, however large the exponential of the bias_max is.
  if (has_bias(p)) write_number(p->bias_max, sums_dtype(p), index, normalizer == 0 ? 0 : row->bias_max);
}

// Write the results of a row: o = output / N. Return whether N lost what counts, or o is not finite. `output` has room
// for whole vectors, and is changed.
static int finish_row(const ea_problem *p, const row_span *row, REAL *output, REAL normalizer) {
  REAL total = (normalizer == 0 ? 1 : normalizer) * (REAL)p->keep;
  vec beyond = {0};
  for (int64_t c = 0; c < p->value_width; c += V) {
    vec o = load(output + c) / total;
    beyond += o * 0;
    store(output + c, o);
  }
  write_results(p, row, output, normalizer);
  return is_unsafe(p, row, normalizer) || sum_of(beyond) != 0;
}

typedef struct {
  const ea_problem *p;
  forward_plan plan;
  int64_t first_task;
  REAL *partial;  // output and normalizer of every row of every part, where there are several parts
  _Atomic int status;
} forward_run;

// All problems of a call.
typedef struct {
  forward_run *runs;
  int64_t count;
  int64_t room_bytes;
  char *rooms;
  ea_queue queue;
} forward_job;

static int rescue_row(const ea_problem *p, int64_t b, int64_t kv_head, int64_t index, REAL normalizer);

// The results of row `index` of a key head, from its sums.
static void settle_row(forward_run *run, const row_span *row, int64_t b, int64_t kv_head, int64_t index, REAL *output,
                       REAL normalizer) {
  if (!finish_row(run->p, row, output, normalizer)) return;
  int status = rescue_row(run->p, b, kv_head, index, normalizer);
  if (status != EA_OK) run->status = status;
}

// The rows and keys of a task: one head after the other, while its keys are in a cache; its last rows first, which may see the
// most keys.
typedef struct {
  int64_t part, head, b, kv_head;
  int64_t first, count, begin, end;
} forward_share;

INLINE forward_share share_of(const forward_run *run, int64_t task) {
  const ea_problem *p = run->p;
  const forward_plan *plan = &run->plan;
  int64_t part = task % plan->parts, rest = task / plan->parts, head = rest / plan->row_blocks;
  int64_t first = (plan->row_blocks - 1 - rest % plan->row_blocks) * plan->block_rows, begin = part * plan->part_keys;
  return (forward_share){.part = part,
                         .head = head,
                         .b = head / p->kv_heads,
                         .kv_head = head % p->kv_heads,
                         .first = first,
                         .count = least(plan->block_rows, p->heads / p->kv_heads * p->rows - first),
                         .begin = begin,
                         .end = least(p->keys, begin + plan->part_keys)};
}

// The rows of a task, of those in one head, and its first keys.
static lookahead look_at_task(const forward_run *run, int64_t task) {
  const ea_problem *p = run->p;
  forward_share at = share_of(run, task);
  lookahead ahead = {.count = 0};
  if (at.count <= 0) return ahead;
  int64_t head = at.kv_head * (p->heads / p->kv_heads) + at.first / p->rows, query = at.first % p->rows;
  int64_t keys = has_blocks(p) ? 0 : least(run->plan.block_keys, at.end - at.begin);
  look_at(&ahead, &p->value, p->dtype, at.b, at.kv_head, at.begin, keys, p->value_width);
  look_at(&ahead, &p->key, p->dtype, at.b, at.kv_head, at.begin, keys, p->width);
  look_at(&ahead, &p->query, p->dtype, at.b, head, query, least(at.count, p->rows - query), p->width);
  return ahead;
}

static void forward_task(forward_run *run, forward_room *room, int64_t task) {
  const ea_problem *p = run->p;
  const forward_plan *plan = &run->plan;
  forward_share at = share_of(run, task);
  int64_t first = at.first, count = at.count, heads = p->batch * p->kv_heads, all_rows = p->heads / p->kv_heads * p->rows;
  if (count <= 0) return;
  forward_rows(p, plan, room, at.b, at.kv_head, first, count, at.begin, at.end);
  int64_t columns = plan->value_columns;
  if (plan->parts > 1) {
    REAL *to = run->partial + ((at.part * heads + at.head) * all_rows + first) * (columns + 1);
    for (int64_t r = 0; r < count; r++, to += columns + 1) {
      memcpy(to, room->output + r * columns, (size_t)columns * sizeof(REAL));
      to[columns] = sum_of(load(room->sums + r * V));
    }
    return;
  }
  for (int64_t r = 0; r < count; r++) {
    REAL normalizer = sum_of(load(room->sums + r * V));
    if (plan->looks_ahead && r + ROWS_AHEAD < count) {
      int64_t size = p->value_width * dtype_size(p->dtype);
      bring((char *)p->output + index_of(p, room->rows + r + ROWS_AHEAD) * size, size);
    }
    settle_row(run, room->rows + r, at.b, at.kv_head, first + r, room->output + r * columns, normalizer);
  }
}

// The problem of a task, of which those of a thread rise.
static forward_run *forward_run_of(const forward_job *job, forward_run *run, int64_t task) {
  while (run < job->runs + job->count - 1 && run[1].first_task <= task) run++;
  return run;
}

static void forward_thread(void *context, int64_t thread) {
  forward_job *job = context;
  forward_run *run = NULL;
  forward_room room;
  for (int64_t task, end; ea_take(&job->queue, &task, &end);) {
    for (; task < end; task++) {
      forward_run *own = forward_run_of(job, run ? run : job->runs, task);
      if (own != run) lay_out_forward(own->p, &own->plan, job->rooms + thread * job->room_bytes, &room);
      run = own;
      if (run->plan.looks_ahead) {
        forward_run *next = forward_run_of(job, run, task + 1);
        int is_last = task + 1 == job->queue.count;
        room.following = is_last ? (lookahead){.count = 0} : look_at_task(next, task + 1 - next->first_task);
      }
      forward_task(run, &room, task - run->first_task);
    }
  }
}

// Add the parts of each row, always in the same order, and finish it.
static void merge_parts(forward_run *run, forward_room *room) {
  const ea_problem *p = run->p;
  int64_t all_rows = p->heads / p->kv_heads * p->rows, total = p->batch * p->kv_heads * all_rows;
  int64_t size = run->plan.value_columns + 1;
  for (int64_t r = 0; r < total; r++) {
    REAL *sum = run->partial + r * size;
    for (int64_t part = 1; part < run->plan.parts; part++) {
      const REAL *more = sum + part * total * size;
      for (int64_t c = 0; c < size; c++) sum[c] += more[c];
    }
    int64_t head = r / all_rows, first = r % all_rows;
    place_rows(p, head / p->kv_heads, head % p->kv_heads, first, 1, room->rows, room->room, run->plan.block_keys);
    settle_row(run, room->rows, head / p->kv_heads, head % p->kv_heads, first, sum, sum[size - 1]);
  }
}

static int run_forward(const problem_list *list) {
  forward_run one = {0}, *runs = list->count == 1 ? &one : allocate(list->count * (int64_t)sizeof(forward_run));
  if (!runs) return EA_NO_MEMORY;
  forward_job job = {.runs = runs};
  int64_t tasks = 0, partial_bytes = 0;
  double work = 0;
  for (int64_t i = 0; i < list->count; i++) {
    const ea_problem *p = list->problem + i;
    if (p->batch * p->heads * p->rows == 0) continue;
    forward_run *run = runs + job.count++;
    *run = (forward_run){.p = p, .plan = plan_forward(p), .first_task = tasks};
    tasks += p->batch * p->kv_heads * run->plan.row_blocks * run->plan.parts;
    work += operations(p);
    forward_room room;
    job.room_bytes = most(job.room_bytes, lay_out_forward(p, &run->plan, NULL, &room));
    if (run->plan.parts > 1) {  // of a problem alone
      partial_bytes = run->plan.parts * p->batch * p->heads * p->rows * (run->plan.value_columns + 1) * (int64_t)sizeof(REAL);
    }
  }
  int64_t threads = useful_threads(list->threads, work, tasks);
  job.queue = queue_of(work, tasks, threads);
  void *memory = job.count ? allocate(threads * job.room_bytes + partial_bytes) : NULL;
  int status = memory || !job.count ? EA_OK : EA_NO_MEMORY;
  if (memory) {
    job.rooms = memory;
    runs->partial = (REAL *)(job.rooms + threads * job.room_bytes);
    ea_parallel(forward_thread, &job, threads);
    if (runs->plan.parts > 1) {
      forward_room room;
      lay_out_forward(runs->p, &runs->plan, job.rooms, &room);
      merge_parts(runs, &room);
    }
    for (int64_t i = 0; i < job.count; i++) status = runs[i].status != EA_OK ? runs[i].status : status;
    release(memory);
  }
  if (runs != &one) release(runs);
  return status;
}

#if !REAL_IS_DOUBLE
// Rows from `row` on, which are in no sequence.
static void clear_output(const ea_problem *p, int64_t row) {
  int64_t at = row * p->heads, rows = p->rows * p->heads - at, size = dtype_size(p->dtype), sums_size = dtype_size(sums_dtype(p));
  clear(moved(p->output, at * p->value_width * size), rows * p->value_width * size);
  clear(moved(p->normalizer, at * sums_size), rows * sums_size);
  if (has_bias(p)) clear(moved(p->bias_max, at * sums_size), rows * sums_size);
}
#endif
