// The squared form in linear time: (q . k)^2 = phi(q) . phi(k), with phi the E (E + 1) / 2 distinct products of components.
// A state holds sum_j phi(k_j) v_j^T and sum_j phi(k_j). A chunk of keys multiplies its own pairs one by one, takes what
// earlier chunks amount to from the state, and is added to it.
//
// With decay, a pair has the factor exp(c_p - c_j): c are cumulative, never rise, and p is the place of the query.
//
// A state that a row cannot be read from with the accuracy of its arithmetic is computed again in double. A row that cannot
// be read from that one either is marked by NaN, in N and in the gradient of the query: the caller multiplies its pairs.

// Keys of a chunk: a multiple of MR, so that no tile of rows is cut short.
#define LINEAR_CHUNK 96
// The error of a normalizer that is read from a state is that of |q|^2 sum_j |k_j|^2, whose terms cancel where q is nearly
// orthogonal to the keys: of random ones, it has a share of 1 / E. Rows with a much smaller one are unsafe; double has digits
// to spare for other dtypes.
#define LEAST_SHARE(p) (REAL_IS_DOUBLE && (p)->dtype != EA_FLOAT64 ? (REAL)0x1p-28 : (REAL)0.25 / (REAL)(p)->width)
#if REAL_IS_DOUBLE
#define LEAST_LINEAR_SUM 0x1p-900
#else
#define LEAST_LINEAR_SUM 0x1p-80f
#endif

// Products that are formed at a time, where one component has no more: their part of the state stays in the first cache.
#define LINEAR_PRODUCTS 128

// Where keys are alike, so is what each term of a sum loses. So few keys are summed before their sum goes to one of double,
// and some more before it goes to one that is not.
#define MOMENT_KEYS 16
#define SUMMED_KEYS 32

// The products of components first, ..., last - 1 with those from themselves on: `count` of them, from `begin` on.
typedef struct {
  int64_t first, last, begin, count;
} product_block;

typedef struct {
  int64_t products, blocks, value_columns, ld;  // ld: of rows of components
  int64_t states, state_heads;                  // one for each key head, or, with a decay for each query head, for those
  int64_t groups;                               // query heads of a state
} linear_plan;

// V numbers of double.
typedef double wide_vec __attribute__((vector_size(V * sizeof(double)), aligned(sizeof(double)), may_alias));

// Memory of one thread.
typedef struct {
  product_block *blocks;
  REAL *sums;                                      // the state
  double *moment;                                  // and that of N
  REAL *query, *keys, *columns, *values, *decayed;  // of a chunk; `columns` are the keys, transposed
  REAL *phi, *weights, *output, *total, *room;
  double *totals;  // V for each row
  REAL *since, *until;  // of a chunk: exp(c_p - c_before) of rows, exp(c_last - c_j) of keys
  REAL trace;           // of the matrix sum_j k_j k_j^T of the state, a sum of squares
  int64_t any;          // the first key that is not 0
  int unsafe;           // whether a row is in need of double
} linear_room;

// Whether N of a row q lost what counts: of the state, `trace` is that at the row. `any`: whether it sees a key that is not 0.
INLINE int is_unsafe_sum(const ea_problem *p, const REAL *q, REAL total, REAL trace, int any) {
  REAL square = 0;
  int is_zero = 1;
  for (int64_t e = 0; e < p->width; e++) square += q[e] * q[e], is_zero &= q[e] == 0;
  if (is_zero || !any) return total != 0;
  return !(total > LEAST_LINEAR_SUM && total <= LARGEST && total >= LEAST_SHARE(p) * square * trace);
}

static linear_plan plan_linear(const ea_problem *p, product_block *blocks) {
  linear_plan plan = {.value_columns = padded(p->value_width), .ld = padded(p->width) + V};
  plan.groups = p->decay.data && p->decay_heads != p->kv_heads ? 1 : p->heads / p->kv_heads;
  plan.state_heads = p->heads / plan.groups;
  plan.states = p->batch * plan.state_heads;
  for (int64_t a = 0; a < p->width;) {
    product_block block = {.first = a, .begin = plan.products};
    do block.count += p->width - a++;
    while (a < p->width && block.count + p->width - a <= LINEAR_PRODUCTS);
    block.last = a;
    if (blocks) blocks[plan.blocks] = block;
    plan.blocks++, plan.products += block.count;
  }
  return plan;
}

static int64_t lay_out_linear(const ea_problem *p, const linear_plan *plan, char *memory, linear_room *room) {
  arena a = {memory, 0};
  int64_t chunk = LINEAR_CHUNK, most_products = most(LINEAR_PRODUCTS, p->width) + V;
  *room = (linear_room){
      .blocks = take(&a, plan->blocks * sizeof(product_block)),
      .sums = take(&a, plan->products * plan->value_columns * sizeof(REAL)),
      .moment = take(&a, (plan->products + V) * sizeof(double)),
      .query = take(&a, chunk * plan->ld * sizeof(REAL)),
      .keys = take(&a, chunk * plan->ld * sizeof(REAL)),
      .columns = take(&a, padded(chunk) * p->width * sizeof(REAL)),
      .values = take(&a, chunk * plan->value_columns * sizeof(REAL)),
      .decayed = take(&a, chunk * plan->value_columns * sizeof(REAL)),
      .phi = take(&a, chunk * leading(most_products) * sizeof(REAL)),
      .weights = take(&a, chunk * leading(padded(chunk)) * sizeof(REAL)),
      .output = take(&a, chunk * plan->value_columns * sizeof(REAL)),
      .totals = take(&a, chunk * V * sizeof(double)),
      .total = take(&a, chunk * sizeof(REAL)),
      .room = take(&a, V * round_up(p->width, V) * sizeof(REAL)),
      .since = take(&a, chunk * sizeof(REAL)),
      .until = take(&a, chunk * sizeof(REAL)),
  };
  return a.used;
}

// The products of a block of x (padded with zeros), those of different components times `twice`. Rows overlap: the zeros
// behind one are written over by the next. `to` has room for V numbers more.
INLINE void form_products(REAL *to, const product_block *block, const REAL *x, int64_t width, REAL twice) {
  for (int64_t a = block->first; a < block->last; a++) {
    vec factor = splat(x[a] * twice);
    for (int64_t b = a; b < width; b += V) store(to + b - a, factor * load(x + b));
    to[0] = x[a] * x[a];
    to += width - a;
  }
}

// Add phi(x)^T of the state to the output of `count` rows x, and to their totals.
static void read_state(const linear_plan *plan, linear_room *room, const ea_problem *p, const REAL *x, int64_t count) {
  int64_t columns = plan->value_columns, ld = leading(most(LINEAR_PRODUCTS, p->width) + V);
  for (const product_block *block = room->blocks; block < room->blocks + plan->blocks; block++) {
    const REAL *sums = room->sums + block->begin * columns;
    const double *moment = room->moment + block->begin;
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      for (int i = 0; i < mr; i++) {
        REAL *phi = room->phi + i * ld;
        form_products(phi, block, x + (r + i) * plan->ld, p->width, 2);
        // The numbers that other rows left behind the products must not count.
        store(phi + block->count, (vec){0});
        // In double, as products of keys that are alike add up what they lose; it is one column among those of values.
        wide_vec total = *(wide_vec *)(room->totals + (r + i) * V);
        for (int64_t k = 0; k < block->count; k += V) {
          total += __builtin_convertvector(load(phi + k), wide_vec) * *(const wide_vec *)(moment + k);
        }
        *(wide_vec *)(room->totals + (r + i) * V) = total;
      }
      for (int64_t c = 0; c < columns; c += PANEL) {
        int nr = (int)(panel_width(c, columns) / V);
        add(mr, nr, block->count, room->phi, ld, 0, sums + c, columns, room->output + r * columns + c, columns);
      }
    }
  }
}

// to += a^T b over `count` keys, the rows of a and b.
static void add_keys(int mr, int nr, int64_t count, const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *to,
                     int64_t ldc) {
  for (int64_t begin = 0; begin < count; begin += SUMMED_KEYS) {
    add(mr, nr, least(SUMMED_KEYS, count - begin), a + begin * lda, lda, 1, b + begin * ldb, ldb, to, ldc);
  }
}

// Add `count` keys and values, which carry their decay until the end of the chunk, to the state.
static void write_state(const linear_plan *plan, linear_room *room, const ea_problem *p, int64_t count, int decays) {
  int64_t columns = plan->value_columns;
  const REAL *values = decays ? room->decayed : room->values;
  for (const product_block *block = room->blocks; block < room->blocks + plan->blocks; block++) {
    REAL *sums = room->sums + block->begin * columns;
    double *moment = room->moment + block->begin;
    int64_t ld = leading(round_up(block->count, V));
    for (int64_t j = 0; j < count; j++) {
      form_products(room->phi + j * ld, block, room->keys + j * plan->ld, p->width, 1);
    }
    for (int64_t k = 0; k < block->count; k += V) {
      int lanes = (int)least(V, block->count - k);
      for (int64_t begin = 0; begin < count; begin += MOMENT_KEYS) {
        int64_t end = least(count, begin + MOMENT_KEYS);
        vec sum = {0};
        for (int64_t j = begin; j < end; j++) {
          vec x = load(room->phi + j * ld + k);
          sum += decays ? x * room->until[j] : x;
        }
        for (int i = 0; i < lanes; i++) moment[k + i] += sum[i];
      }
    }
    for (int64_t c = 0; c < columns; c += PANEL) {
      int nr = (int)(panel_width(c, columns) / V);
      for (int64_t k = 0; k < block->count; k += MR) {
        int mr = (int)least(MR, block->count - k);
        add_keys(mr, nr, count, room->phi + k, ld, values + c, columns, sums + k * columns + c, columns);
      }
    }
  }
}

// Pairs of the rows of a chunk with its keys begin, ..., begin + n - 1; the place of row r is `place` + r.
static void add_pairs_of_chunk(const linear_plan *plan, linear_room *room, const ea_problem *p, const double *c,
                               int64_t keys, int64_t count, int64_t place, int64_t begin, int64_t n) {
  int64_t ldw = leading(padded(LINEAR_CHUNK)), columns = plan->value_columns;
  weights_target to = {.squared = 1, .scale2 = 1, .inverse = 1, .ld = ldw};
  for (int64_t r = 0; r < count; r += MR) {
    int mr = (int)least(MR, count - r);
    int64_t seen = least(n, place + r + mr - begin);
    to.weights = room->weights;
    for (int64_t start = 0; start < seen; start += PANEL) {
      to.column = start;
      weights(mr, (int)(panel_width(start, n) / V), p->width, room->query + r * plan->ld, plan->ld,
              room->columns + start * p->width, panel_width(start, n), &to, 0, 0);
    }
    for (int i = 0; i < mr; i++) {
      REAL *w = room->weights + i * ldw;
      double total = 0;
      int64_t last = least(n, place + r + i + 1 - begin);
      if (c) {
        int64_t at = least(place + r + i, keys - 1);
        for (int64_t j = 0; j < last; j++) room->until[j] = (REAL)(c[at] - c[begin + j]);
        exponentials(room->until, last);
        for (int64_t j = 0; j < last; j++) w[j] *= room->until[j];
      }
      for (int64_t j = last; j < seen; j++) w[j] = 0;
      for (int64_t j = 0; j < last; j++) total += w[j];
      room->total[r + i] += (REAL)total;
    }
    for (int64_t col = 0; col < columns; col += PANEL) {
      int nr = (int)(panel_width(col, columns) / V);
      add(mr, nr, seen, room->weights, ldw, 0, room->values + col, columns, room->output + r * columns + col, columns);
    }
  }
}

// Output and normalizer of rows first, ..., first + count - 1 of a query head, of which the first has the place `place`,
// with the state of all keys before `begin` and the n keys from there on.
static void linear_rows(const linear_plan *plan, linear_room *room, const ea_problem *p, const double *c, int64_t b,
                        int64_t head, int64_t first, int64_t count, int64_t place, int64_t begin, int64_t n) {
  int64_t columns = plan->value_columns, keys = key_count(p, b);
  pack_rows(room->query, plan->ld, &p->query, p->dtype, b, head, first, count, p->width, (REAL)p->scale);
  clear(room->output, count * columns * (int64_t)sizeof(REAL));
  clear(room->total, count * (int64_t)sizeof(REAL));
  if (begin) {
    clear(room->totals, count * V * (int64_t)sizeof(double));
    read_state(plan, room, p, room->query, count);
    for (int64_t r = 0; r < count; r++) {
      double total = 0;
      for (int lane = 0; lane < V; lane++) total += room->totals[r * V + lane];
      room->total[r] = (REAL)total;
    }
    if (c) {
      for (int64_t r = 0; r < count; r++) room->since[r] = (REAL)(c[least(place + r, keys - 1)] - c[begin - 1]);
      exponentials(room->since, count);
      for (int64_t r = 0; r < count; r++) {
        scale_row(room->output + r * columns, columns, room->since[r]);
        room->total[r] *= room->since[r];
      }
    }
  }
  if (n) add_pairs_of_chunk(plan, room, p, c, keys, count, place, begin, n);
  int64_t index = (b * p->heads + head) * p->rows + first;
  for (int64_t r = 0; r < count; r++, index++) {
    REAL *output = room->output + r * columns, total = room->total[r];
    int64_t last = least(begin + n - 1, place + r);
    REAL trace = !begin ? 0 : c ? room->trace * room->since[r] : room->trace, beyond = 0;
    for (int64_t e = 0; e < p->value_width; e++) output[e] /= total == 0 ? 1 : total, beyond += output[e] * 0;
    if (beyond != 0 || is_unsafe_sum(p, room->query + r * plan->ld, total, trace, room->any <= last)) {
      if (REAL_IS_DOUBLE) total = NAN;
      else room->unsafe = 1;
    }
    write_row((char *)p->output + index * p->value_width * dtype_size(p->dtype), p->dtype, output, p->value_width);
    write_number(p->normalizer, sums_dtype(p), index, total);
  }
}

// The cumulative log decays of a state; NULL: there are none.
INLINE const double *decays_of(const ea_problem *p, int64_t b, int64_t state) {
  return p->decay.data ? (const double *)p->decay.data + b * p->decay.stride[0] + state * p->decay.stride[1] : NULL;
}

INLINE REAL square_of(const REAL *x, int64_t n) {
  REAL sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  return sum;
}

// The first of `count` vectors that is not 0; `count`: there is none.
INLINE int64_t first_nonzero(const REAL *x, int64_t ld, int64_t count, int64_t n) {
  for (int64_t j = 0; j < count; j++) {
    for (int64_t e = 0; e < n; e++) {
      if (x[j * ld + e] != 0) return j;
    }
  }
  return count;
}

// All of one state: its keys in turn.
static void linear_task(const linear_plan *plan, linear_room *room, const ea_problem *p, int64_t task) {
  int64_t b = task / plan->state_heads, state = task % plan->state_heads;
  int64_t kv_head = state * plan->groups / (p->heads / p->kv_heads), keys = key_count(p, b);
  int64_t corner = (p->lower_right ? keys - p->rows : 0) + p->right;
  const double *c = decays_of(p, b, state);
  room->trace = 0, room->any = INT64_MAX, room->unsafe = 0;
  clear(room->sums, plan->products * plan->value_columns * (int64_t)sizeof(REAL));
  clear(room->moment, (plan->products + V) * (int64_t)sizeof(double));
  for (int64_t begin = 0; begin < keys; begin += LINEAR_CHUNK) {
    int64_t n = least(LINEAR_CHUNK, keys - begin);
    pack_rows(room->keys, plan->ld, &p->key, p->dtype, b, kv_head, begin, n, p->width, 1);
    pack_rows(room->values, plan->value_columns, &p->value, p->dtype, b, kv_head, begin, n, p->value_width, 1);
    if (room->any == INT64_MAX) {
      int64_t found = first_nonzero(room->keys, plan->ld, n, p->width);
      if (found < n) room->any = begin + found;
    }
    int64_t first = most(0, least(p->rows, begin - corner)), end = most(0, least(p->rows, begin + n - corner));
    if (p->causal && end > first) {
      pack_transposed(room->columns, &p->key, p->dtype, b, kv_head, begin, n, p->width, room->room);
      for (int64_t g = 0; g < plan->groups; g++) {
        linear_rows(plan, room, p, c, b, state * plan->groups + g, first, end - first, first + corner, begin, n);
      }
    }
    if (c) {
      REAL factor = begin ? exponential_of((REAL)(c[begin + n - 1] - c[begin - 1])) : 1;
      room->trace *= factor;
      scale_row(room->sums, plan->products * plan->value_columns, factor);
      for (int64_t k = 0; k < plan->products; k++) room->moment[k] *= factor;
      for (int64_t j = 0; j < n; j++) room->until[j] = (REAL)(c[begin + n - 1] - c[begin + j]);
      exponentials(room->until, n);
      memcpy(room->decayed, room->values, (size_t)(n * plan->value_columns) * sizeof(REAL));
      for (int64_t j = 0; j < n; j++) {
        scale_row(room->decayed + j * plan->value_columns, plan->value_columns, room->until[j]);
      }
    }
    for (int64_t j = 0; j < n; j++) {
      room->trace += square_of(room->keys + j * plan->ld, p->width) * (c ? room->until[j] : 1);
    }
    write_state(plan, room, p, n, c != NULL);
  }
  // Rows that see all keys.
  int64_t rest = p->causal ? most(0, least(p->rows, keys - corner)) : 0;
  for (int64_t g = 0; g < plan->groups; g++) {
    for (int64_t first = rest; first < p->rows; first += LINEAR_CHUNK) {
      linear_rows(plan, room, p, c, b, state * plan->groups + g, first, least(LINEAR_CHUNK, p->rows - first),
                  first + corner, keys, 0);
    }
    // Rows before the first key.
    for (int64_t r = 0; p->causal && r < least(p->rows, -corner); r += LINEAR_CHUNK) {
      linear_rows(plan, room, p, NULL, b, state * plan->groups + g, r, least(LINEAR_CHUNK, least(p->rows, -corner) - r),
                  r + corner, 0, 0);
    }
  }
}

typedef struct {
  const ea_problem *p;
  linear_plan plan;
  int64_t room_bytes;
  char *rooms;
  ea_queue queue;
  int64_t first;  // of the tasks
  _Atomic int status;
} linear_run;

static int linear_in_double(const ea_problem *p, int64_t task);

static void linear_thread(void *context, int64_t thread) {
  linear_run *run = context;
  linear_room room;
  lay_out_linear(run->p, &run->plan, run->rooms + thread * run->room_bytes, &room);
  plan_linear(run->p, room.blocks);
  for (int64_t task, end; ea_take(&run->queue, &task, &end);) {
    for (; task < end; task++) {
      linear_task(&run->plan, &room, run->p, run->first + task);
      int status = room.unsafe ? linear_in_double(run->p, run->first + task) : EA_OK;
      if (status != EA_OK) run->status = status;
    }
  }
}

// The states first, ..., end - 1; end -1: all.
static int run_linear(const ea_problem *p, int64_t first, int64_t end) {
  if (p->batch * p->heads * p->rows == 0) return EA_OK;
  linear_run run = {.p = p, .plan = plan_linear(p, NULL), .first = first};
  int64_t tasks = (end < 0 ? run.plan.states : end) - first, threads = most(1, least(p->threads, tasks));
  run.queue = (ea_queue){.count = tasks, .chunk = 1};
  linear_room room;
  run.room_bytes = lay_out_linear(p, &run.plan, NULL, &room);
  void *memory = allocate(threads * run.room_bytes);
  if (!memory) return EA_NO_MEMORY;
  run.rooms = memory;
  ea_parallel(linear_thread, &run, threads);
  release(memory);
  return run.status;
}
