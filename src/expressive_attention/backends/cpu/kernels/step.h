// One token of the squared form as a recurrence: its key and value are added to a state, and then its queries read it.
// Time goes into moving the state, so one pass over it does both.
//
// A state holds sum_j phi(k_j) v_j^T, a row for each product k_a k_b with a <= b, and, in double, sum_j phi(k_j).

// Queries that are read in one pass: their sums stay in registers.
#define STEP_QUERIES 4

// One state, and the queries that a pass reads.
typedef struct {
  int64_t width, value_width;
  REAL *sums;
  const REAL *key, *value;
  REAL factor;
  const REAL *query;             // rows of components, of which the largest is 1
  REAL total[STEP_QUERIES];      // their N
  REAL *output;
} step_pass;

// The rows of products a, ..., of which the first is that of equal components: `row` is moved behind them.
INLINE void step_products(int nr, int queries, int adds, const step_pass *s, int64_t a, REAL **row, const vec *value,
                          vec sum[STEP_QUERIES][NR]) {
  vec part[STEP_QUERIES][NR] = {0};
  for (int64_t b = a; b < s->width; b++, *row += s->value_width) {
    vec x[NR];
    REAL product = adds ? s->key[a] * s->key[b] : 0;
    UNROLL
    for (int c = 0; c < nr; c++) {
      x[c] = load(*row + c * V);
      if (adds) {
        x[c] = x[c] * s->factor + value[c] * product;
        store(*row + c * V, x[c]);
      }
    }
    UNROLL
    for (int q = 0; q < queries; q++) {
      const REAL *query = s->query + q * s->width;
      vec twice = splat(query[a] * query[b] * (a == b ? 1 : 2));
      UNROLL
      for (int c = 0; c < nr; c++) part[q][c] += x[c] * twice;
    }
  }
  // So few terms are summed at a time, as each of many that are alike loses the same.
  for (int q = 0; q < queries; q++) {
    for (int c = 0; c < nr; c++) sum[q][c] += part[q][c];
  }
}

// Columns column, ..., column + nr V - 1 of the values.
INLINE void step_tile(int nr, int queries, int adds, const step_pass *s, int64_t column) {
  vec value[NR] = {0}, sum[STEP_QUERIES][NR] = {0};
  REAL *row = s->sums + column;
  for (int c = 0; c < nr && adds; c++) value[c] = load(s->value + column + c * V);
  for (int64_t a = 0; a < s->width; a++) step_products(nr, queries, adds, s, a, &row, value, sum);
  for (int q = 0; q < queries; q++) {
    REAL *output = s->output + q * s->value_width + column;
    for (int c = 0; c < nr; c++) store(output + c * V, s->total[q] > 0 ? sum[q][c] / s->total[q] : splat(s->total[q]) * 0);
  }
}

// One column, where they do not fill a vector.
static void step_column(int queries, const step_pass *s, int64_t column) {
  REAL sum[STEP_QUERIES] = {0}, *x = s->sums + column;
  for (int64_t a = 0; a < s->width; a++) {
    REAL part[STEP_QUERIES] = {0};
    for (int64_t b = a; b < s->width; b++, x += s->value_width) {
      if (s->key) *x = *x * s->factor + s->value[column] * (s->key[a] * s->key[b]);
      for (int q = 0; q < queries; q++) {
        const REAL *query = s->query + q * s->width;
        part[q] += *x * (query[a] * query[b] * (a == b ? 1 : 2));
      }
    }
    for (int q = 0; q < queries; q++) sum[q] += part[q];
  }
  for (int q = 0; q < queries; q++) {
    s->output[q * s->value_width + column] = s->total[q] > 0 ? sum[q] / s->total[q] : s->total[q] * 0;
  }
}

#define STEP_TILE(nr, queries)                                     \
  if (s->key) step_tile(nr, queries, 1, s, column);                \
  else step_tile(nr, queries, 0, s, column);
#define STEP_TILES(nr)                                             \
  switch (queries) {                                               \
    case 0: STEP_TILE(nr, 0) break;                                \
    case 1: STEP_TILE(nr, 1) break;                                \
    default: STEP_TILE(nr, STEP_QUERIES)                           \
  }

static void step_columns(int queries, const step_pass *s) {
  int64_t column = 0;
  for (; column + PANEL <= s->value_width; column += PANEL) { STEP_TILES(NR) }
  for (; column + V <= s->value_width; column += V) { STEP_TILES(1) }
  for (; column < s->value_width; column++) step_column(queries, s, column);
}

// A query over its largest component, which is returned: its size cancels, and its square must not leave the range of
// the sums.
static REAL scale_to_one(REAL *to, const REAL *query, int64_t width) {
  REAL size = 0;
  for (int64_t e = 0; e < width; e++) {
    REAL x = query[e] < 0 ? -query[e] : query[e];
    if (x > size) size = x;
  }
  for (int64_t e = 0; e < width; e++) to[e] = size == 0 ? query[e] : query[e] / size;
  return size;
}

static void add_to_moment(double *moment, const REAL *key, int64_t width, double factor) {
  for (int64_t a = 0; a < width; moment += width - a++) {
    for (int64_t b = a; b < width; b++) moment[b - a] = moment[b - a] * factor + (double)key[a] * key[b];
  }
}

static double read_moment(const double *moment, const REAL *query, int64_t width) {
  double total = 0;
  for (int64_t a = 0; a < width; moment += width - a++) {
    double part = moment[0] * query[a];
    for (int64_t b = a + 1; b < width; b++) part += 2 * moment[b - a] * query[b];
    total += part * query[a];
  }
  return total;
}

static void step_task(const ea_token *p, REAL *room, int64_t state) {
  int64_t products = p->width * (p->width + 1) / 2, groups = p->groups;
  double *moment = p->moment + state * products, factor = p->factor ? p->factor[state] : 1;
  step_pass s = {
      .width = p->width,
      .value_width = p->value_width,
      .sums = (REAL *)p->sums + state * products * p->value_width,
      .key = p->key ? (const REAL *)p->key + state * p->width : NULL,
      .value = p->value ? (const REAL *)p->value + state * p->value_width : NULL,
      .factor = (REAL)factor,
      .query = room,
  };
  if (s.key) add_to_moment(moment, s.key, p->width, factor);
  int64_t first = 0;
  do {
    int queries = (int)(groups - first < STEP_QUERIES ? least(1, groups - first) : STEP_QUERIES);
    for (int q = 0; q < queries; q++) {
      int64_t index = state * groups + first + q;
      double size = scale_to_one(room + q * p->width, (const REAL *)p->query + index * p->width, p->width);
      double total = read_moment(moment, room + q * p->width, p->width);
      s.total[q] = (REAL)total;
      p->normalizer[index] = total > 0 ? total * size * size : total * 0;
    }
    if (queries) s.output = (REAL *)p->output + (state * groups + first) * p->value_width;
    step_columns(queries, &s);
    s.key = NULL;  // it is added once
    first += queries;
  } while (first < groups);
}

typedef struct {
  const ea_token *p;
  REAL *rooms;
  int64_t room;
  ea_queue queue;
} step_run;

static void step_thread(void *context, int64_t thread) {
  step_run *run = context;
  for (int64_t task, end; ea_take(&run->queue, &task, &end);) {
    for (; task < end; task++) step_task(run->p, run->rooms + thread * run->room, task);
  }
}

static int run_step(const ea_token *p) {
  double work = 2.0 * p->states * (p->width * (p->width + 1) / 2) * p->value_width * (1 + p->groups);
  int64_t threads = useful_threads(p->threads, work, p->states);
  step_run run = {.p = p, .room = round_up(STEP_QUERIES * p->width, 64), .queue = {.count = p->states, .chunk = 1}};
  run.rooms = allocate(threads * run.room * (int64_t)sizeof(REAL));
  if (!run.rooms) return EA_NO_MEMORY;
  ea_parallel(step_thread, &run, threads);
  release(run.rooms);
  return EA_OK;
}
