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
} forward_plan;

// Memory of one thread.
typedef struct {
  row_place *rows;
  REAL *query, *keys, *values, *weights, *output, *sums, *room;
  mask_room mask;
} forward_room;

static forward_plan plan_forward(const ea_problem *p) {
  int64_t wide = most(p->width, p->value_width), rows = p->heads / p->kv_heads * p->rows;
  forward_plan plan = {.block_keys = wide > 256 ? BLOCK_KEYS / 4 : wide > 128 ? BLOCK_KEYS / 2 : BLOCK_KEYS};
  int64_t block_rows = wide > 256 ? BLOCK_ROWS / 2 : BLOCK_ROWS;
  plan.row_blocks = (rows + block_rows - 1) / block_rows;
  plan.block_rows = least(rows, round_up((rows + plan.row_blocks - 1) / plan.row_blocks, MR));
  plan.block_keys = least(plan.block_keys, padded(p->keys));
  plan.value_columns = padded(p->value_width);
  int64_t tasks = p->batch * p->kv_heads * plan.row_blocks;
  int64_t parts = tasks >= p->threads ? 1 : (p->threads + tasks - 1) / tasks;
  plan.part_keys = round_up((p->keys + parts - 1) / parts, plan.block_keys);
  plan.parts = (p->keys + plan.part_keys - 1) / plan.part_keys;
  return plan;
}

// Lay `room` out at `memory`; return the bytes it takes. With memory NULL, only count.
static int64_t lay_out_forward(const ea_problem *p, const forward_plan *plan, char *memory, forward_room *room) {
  arena a = {memory, 0};
  int64_t rows = plan->block_rows, keys = plan->block_keys;
  *room = (forward_room){
      .rows = take(&a, rows * sizeof(row_place)),
      .query = take(&a, rows * p->width * sizeof(REAL)),
      .keys = take(&a, keys * p->width * sizeof(REAL)),
      .values = take(&a, keys * plan->value_columns * sizeof(REAL)),
      .weights = take(&a, rows * leading(keys) * sizeof(REAL)),
      .output = take(&a, rows * plan->value_columns * sizeof(REAL)),
      .sums = take(&a, rows * sizeof(vec)),
      .room = take(&a, most(keys, V * round_up(p->width, V)) * sizeof(REAL)),
      .mask = {.factor = take(&a, keys * sizeof(REAL))},
  };
  return a.used;
}

// Whether rows that see `seen` need no mask on the n keys from `key` on. (In double, numbers may be infinite:
// then what lies past the last key in its vector is not 0.)
INLINE int is_plain(const ea_problem *p, visible_range seen, int64_t key, int64_t n) {
  return p->mask_dtype == EA_NONE && seen.first >= key + n && !(REAL_IS_DOUBLE && n % V);
}

// Add a block of keys to the rows: weights first, by panels of keys that stay in the first cache, then their
// products with the values.
static void forward_block(const ea_problem *p, const forward_plan *plan, forward_room *room, int64_t count, int64_t key,
                          int64_t n, const REAL *values, int64_t value_stride) {
  int64_t ldw = leading(plan->block_keys), width = p->width;
  for (int64_t start = 0; start < n; start += PANEL) {
    const REAL *panel = room->keys + start * width;
    int64_t ld = panel_width(start, n);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      visible_range seen = range_of(room->rows + r, mr);
      int64_t columns = least(n, seen.last - key) - start;
      if (columns <= 0) continue;
      int plain = is_plain(p, seen, key, n);
      weights(mr, (int)(columns >= PANEL ? NR : tile_vectors(columns)), width, room->query + r * width, width, panel, ld,
              room->weights + r * ldw + start, ldw, plain ? room->sums + r * V : NULL, (int)p->squared);
    }
  }
  for (int64_t r = 0; r < count; r += MR) {
    int mr = (int)least(MR, count - r);
    visible_range seen = range_of(room->rows + r, mr);
    int64_t columns = least(n, seen.last - key);
    if (columns <= 0 || is_plain(p, seen, key, n)) continue;
    for (int i = 0; i < mr; i++) {
      REAL *w = room->weights + (r + i) * ldw;
      apply_mask(p, room->rows + r + i, key, round_up(columns, V), w, &room->mask);
      vec sum = load(room->sums + (r + i) * V);
      for (int64_t j = 0; j < columns; j += V) sum += load(w + j);
      store(room->sums + (r + i) * V, sum);
    }
  }
  for (int64_t c = 0; c < plan->value_columns; c += PANEL) {
    int nr = (int)(panel_width(c, plan->value_columns) / V);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      int64_t columns = least(n, range_of(room->rows + r, mr).last - key);
      add(mr, nr, columns, room->weights + r * ldw, ldw, 0, values + c, value_stride,
          room->output + r * plan->value_columns + c, plan->value_columns);
    }
  }
}

// sum_j w_ij v_j and sum_j w_ij of rows first, ..., first + count - 1 over the keys begin, ..., end - 1.
static void forward_rows(const ea_problem *p, const forward_plan *plan, forward_room *room, int64_t b, int64_t kv_head,
                         int64_t first, int64_t count, int64_t begin, int64_t end) {
  int64_t width = p->width, value_columns = plan->value_columns;
  place_rows(p, b, kv_head, first, count, room->rows, room->room, plan->block_keys);
  for (int64_t r = 0; r < count; r++) {
    const row_place *row = room->rows + r;
    pack_rows(room->query + r * width, width, &p->query, p->dtype, b, row->head, row->query, 1, width, (REAL)p->scale);
  }
  memset(room->output, 0, (size_t)(count * value_columns) * sizeof(REAL));
  memset(room->sums, 0, (size_t)count * sizeof(vec));
  room->mask.from = NULL;
  end = least(end, range_of(room->rows, count).last);
  // Values in their place, where a panel of them can be read from there.
  int direct = p->dtype == REAL_DTYPE && p->value.stride[3] == 1 && p->value_width == value_columns &&
               p->value.stride[2] == value_columns;
  for (int64_t key = begin; key < end; key += plan->block_keys) {
    int64_t n = least(plan->block_keys, end - key);
    const REAL *values = direct ? row_of(&p->value, p->dtype, b, kv_head, key) : room->values;
    pack_transposed(room->keys, &p->key, p->dtype, b, kv_head, key, n, width, room->room);
    if (!direct) pack_rows(room->values, value_columns, &p->value, p->dtype, b, kv_head, key, n, p->value_width, 1);
    forward_block(p, plan, room, count, key, n, values, value_columns);
  }
}

// Write the results of a row: o = output / N. Return whether N lost what counts.
static int finish_row(const ea_problem *p, const row_place *row, const REAL *output, REAL normalizer, REAL *room) {
  int64_t index = (row->batch * p->heads + row->head) * p->rows + row->query;
  int64_t sums_dtype = p->dtype == EA_FLOAT64 ? EA_FLOAT64 : EA_FLOAT32;
  REAL total = normalizer == 0 ? 1 : normalizer;
  for (int64_t c = 0; c < p->value_width; c++) room[c] = output[c] / total;
  write_row((char *)p->output + index * p->value_width * dtype_size(p->dtype), p->dtype, room, p->value_width);
  write_number(p->normalizer, sums_dtype, index, normalizer);
  if (has_bias(p)) write_number(p->peak, sums_dtype, index, row->peak);
  return is_unsafe(p, row, normalizer);
}

typedef struct {
  const ea_problem *p;
  forward_plan plan;
  int64_t tasks, room_bytes;
  char *rooms;
  REAL *partial;  // output and normalizer of every row of every part, where there are several parts
  _Atomic int64_t taken;
  _Atomic int status;
} forward_run;

static void rescue_rows(forward_run *run, int64_t b, int64_t kv_head, int64_t first, int64_t count);

static void forward_task(forward_run *run, forward_room *room, int64_t task) {
  const ea_problem *p = run->p;
  const forward_plan *plan = &run->plan;
  // The last rows first: under causality they see the most keys.
  int64_t part = task % plan->parts, rest = task / plan->parts;
  int64_t heads = p->batch * p->kv_heads, head = rest % heads, block = plan->row_blocks - 1 - rest / heads;
  int64_t all_rows = p->heads / p->kv_heads * p->rows;
  int64_t first = block * plan->block_rows, count = least(plan->block_rows, all_rows - first);
  int64_t begin = part * plan->part_keys, end = least(p->keys, begin + plan->part_keys);
  int64_t b = head / p->kv_heads, kv_head = head % p->kv_heads;
  if (count <= 0) return;
  forward_rows(p, plan, room, b, kv_head, first, count, begin, end);
  int64_t columns = plan->value_columns;
  if (plan->parts > 1) {
    REAL *to = run->partial + ((part * heads + head) * all_rows + first) * (columns + 1);
    for (int64_t r = 0; r < count; r++, to += columns + 1) {
      memcpy(to, room->output + r * columns, (size_t)columns * sizeof(REAL));
      to[columns] = sum_of(load(room->sums + r * V));
    }
    return;
  }
  int unsafe = 0;
  for (int64_t r = 0; r < count; r++) {
    REAL normalizer = sum_of(load(room->sums + r * V));
    unsafe |= finish_row(p, room->rows + r, room->output + r * columns, normalizer, room->output + r * columns);
  }
  if (unsafe) rescue_rows(run, b, kv_head, first, count);
}

static void forward_thread(void *context, int64_t thread) {
  forward_run *run = context;
  forward_room room;
  lay_out_forward(run->p, &run->plan, run->rooms + thread * run->room_bytes, &room);
  for (int64_t task; (task = ea_next(&run->taken)) < run->tasks;) forward_task(run, &room, task);
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
    if (finish_row(p, room->rows, sum, sum[size - 1], sum)) {
      rescue_rows(run, head / p->kv_heads, head % p->kv_heads, first, 1);
    }
  }
}

// Below this, a thread takes longer to wake than to work.
#define LEAST_WORK 500000

static int64_t useful_threads(const ea_problem *p, int64_t tasks) {
  double work = 2.0 * p->batch * p->heads * p->rows * p->keys * (p->width + p->value_width);
  return work < LEAST_WORK ? 1 : most(1, least(p->threads, tasks));
}

static int run_forward(const ea_problem *p) {
  if (p->batch * p->heads * p->rows == 0) return EA_OK;
  forward_run run = {.p = p, .plan = plan_forward(p)};
  const forward_plan *plan = &run.plan;
  int64_t all_rows = p->batch * p->heads * p->rows;
  run.tasks = p->batch * p->kv_heads * plan->row_blocks * plan->parts;
  int64_t threads = useful_threads(p, run.tasks);
  forward_room room;
  run.room_bytes = lay_out_forward(p, plan, NULL, &room);
  int64_t partial_bytes = plan->parts > 1 ? plan->parts * all_rows * (plan->value_columns + 1) * sizeof(REAL) : 0;
  void *memory;
  if (posix_memalign(&memory, 64, (size_t)(threads * run.room_bytes + partial_bytes)) != 0) return EA_NO_MEMORY;
  run.rooms = memory;
  run.partial = (REAL *)(run.rooms + threads * run.room_bytes);
  ea_parallel(forward_thread, &run, threads);
  if (plan->parts > 1) {
    lay_out_forward(p, plan, run.rooms, &room);
    merge_parts(&run, &room);
  }
  free(memory);
  return run.status;
}
