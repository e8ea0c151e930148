// Gradients of the squared form in linear time. Pairs have the weight w_ij = (q_i . k_j)^2 F_ij, where F is the decay, and
//
//     dq_i = 2 sum_j s_ij F_ij g_ij k_j,   dk_j = 2 sum_i s_ij F_ij g_ij q_i,   dv_j = sum_i w_ij u_i,
//     g_ij = u_i . v_j - m_i,   u_i = dO_i / N_i,   m_i = u_i . o_i - dN_i.
//
// The part of g with u is linear in sum_j phi(k_j) v_j^T, that with m in the matrix sum_j k_j k_j^T; both are the gradient
// of a quadratic form. First the chunks in order: a state of keys gives dq, and N and m of all rows. Then in reverse: a
// state of rows gives dk and dv. A pair inside of a chunk is multiplied out both times.

// Sums over vectors x and y: `sums` of phi(x) y^T, transposed, each block of products padded to whole panels, and
// `moment` of s x x^T.
typedef struct {
  REAL *sums, *moment;
  int64_t ld;
} quadratic_state;

typedef struct {
  quadratic_state state;
  int64_t *at;  // where each block of products begins in a row of the state
  REAL *query, *upstream, *keys, *keys_transposed, *values, *values_transposed;
  REAL *weights, *scores, *products;   // of the pairs of a chunk
  REAL *phi, *matrix, *half, *moment;  // `half` and `moment`: half the gradients of the two forms
  REAL *weighted, *scaled, *grad, *grad_value, *room;
  REAL *since, *until, *decay;
  int64_t any;  // the first key that is not 0
} linear_backward_room;

typedef struct {
  const ea_problem *p;
  linear_plan plan;
  int64_t room_bytes;
  char *rooms;
  REAL *numbers;  // N and m of all rows (B, Hq, L) from `first_row` on
  int64_t first, first_row;  // of the tasks
  ea_queue queue;
  _Atomic int status;
} linear_backward_run;

static int linear_backward_in_double(const ea_problem *p, int64_t task);

static int64_t most_products(const ea_problem *p) { return most(LINEAR_PRODUCTS, p->width) + PANEL; }

static int64_t lay_out_linear_backward(const ea_problem *p, const linear_plan *plan, char *memory, linear_room *forward,
                                       linear_backward_room *room) {
  int64_t forward_bytes = lay_out_linear(p, plan, memory, forward);
  arena a = {memory ? memory + forward_bytes : NULL, 0};
  int64_t chunk = LINEAR_CHUNK, ldw = leading(padded(chunk)), size = sizeof(REAL);
  int64_t ld = plan->products + plan->blocks * PANEL;
  *room = (linear_backward_room){
      .at = take(&a, plan->blocks * sizeof(int64_t)),
      .query = take(&a, chunk * plan->ld * size),
      .upstream = take(&a, chunk * plan->value_columns * size),
      .keys = take(&a, chunk * plan->ld * size),
      .keys_transposed = take(&a, padded(chunk) * p->width * size),
      .values = take(&a, chunk * plan->value_columns * size),
      .values_transposed = take(&a, padded(chunk) * p->value_width * size),
      .weights = take(&a, chunk * ldw * size),
      .scores = take(&a, chunk * ldw * size),
      .products = take(&a, chunk * ldw * size),
      .phi = take(&a, chunk * leading(most_products(p)) * size),
      .matrix = take(&a, MR * leading(most_products(p)) * size),
      .half = take(&a, chunk * plan->ld * size),
      .moment = take(&a, chunk * plan->ld * size),
      .weighted = take(&a, chunk * plan->value_columns * size),
      .scaled = take(&a, chunk * plan->ld * size),
      .grad = take(&a, chunk * plan->ld * size),
      .grad_value = take(&a, chunk * plan->value_columns * size),
      .room = take(&a, most(chunk, V * round_up(most(p->width, p->value_width), V)) * size),
      .since = take(&a, chunk * size),
      .until = take(&a, chunk * size),
      .decay = take(&a, chunk * size),
      .state = {.ld = ld,
                .sums = take(&a, p->value_width * ld * size),
                .moment = take(&a, p->width * plan->ld * size)},
  };
  if (memory) {
    plan_linear(p, forward->blocks);
    int64_t at = 0;
    for (int64_t i = 0; i < plan->blocks; i++) room->at[i] = at, at += padded(forward->blocks[i].count);
  }
  return forward_bytes + a.used;
}

static void clear_state(const ea_problem *p, const linear_plan *plan, quadratic_state *state) {
  clear(state->sums, p->value_width * state->ld * (int64_t)sizeof(REAL));
  clear(state->moment, p->width * plan->ld * (int64_t)sizeof(REAL));
}

static void decay_state(const ea_problem *p, const linear_plan *plan, quadratic_state *state, REAL log_factor) {
  REAL factor = exponential_of(log_factor);
  scale_row(state->sums, p->value_width * state->ld, factor);
  scale_row(state->moment, p->width * plan->ld, factor);
}

// to[r] = from[r] * factor[r] for `count` rows of n numbers, `ld` apart. factor NULL: 1.
static void scale_rows(REAL *to, const REAL *from, int64_t ld, int64_t count, int64_t n, const REAL *factor) {
  for (int64_t r = 0; r < count; r++) {
    REAL x = factor ? factor[r] : 1;
    for (int64_t i = 0; i < n; i++) to[r * ld + i] = from[r * ld + i] * x;
  }
}

// Add `count` vectors x and y to a state, and s x x^T to its moment; y and s carry the decay.
static void add_to_state(const ea_problem *p, const linear_plan *plan, const linear_room *forward,
                         linear_backward_room *room, const REAL *x, const REAL *y, const REAL *s, int64_t count) {
  quadratic_state *state = &room->state;
  int64_t ld = leading(most_products(p));
  for (int64_t i = 0; i < plan->blocks; i++) {
    const product_block *block = forward->blocks + i;
    int64_t whole = padded(block->count);
    for (int64_t j = 0; j < count; j++) {
      REAL *phi = room->phi + j * ld;
      form_products(phi, block, x + j * plan->ld, p->width, 1);
      for (int64_t k = block->count; k < whole; k++) phi[k] = 0;
    }
    for (int64_t k = 0; k < whole; k += PANEL) {
      int nr = (int)(panel_width(k, whole) / V);
      for (int64_t e = 0; e < p->value_width; e += MR) {
        int mr = (int)least(MR, p->value_width - e);
        add_keys(mr, nr, count, y + e, plan->value_columns, room->phi + k, ld,
                 state->sums + e * state->ld + room->at[i] + k, state->ld);
      }
    }
  }
  scale_rows(room->scaled, x, plan->ld, count, p->width, s);
  int64_t columns = padded(p->width);
  for (int64_t c = 0; c < columns; c += PANEL) {
    int nr = (int)(panel_width(c, columns) / V);
    for (int64_t e = 0; e < p->width; e += MR) {
      int mr = (int)least(MR, p->width - e);
      add_keys(mr, nr, count, room->scaled + e, plan->ld, x + c, plan->ld, state->moment + e * plan->ld + c, plan->ld);
    }
  }
}

// h += half the gradient, with respect to x, of phi(x)^T y over a block of products.
INLINE void add_half_gradient(REAL *h, const product_block *block, const REAL *y, const REAL *x, int64_t width) {
  for (int64_t a = block->first; a < block->last; a++) {
    vec sum = {0}, own = splat(x[a]);
    for (int64_t b = a; b < width; b += V) {
      vec row = load(y + b - a);
      sum += row * load(x + b);  // x is 0 past its end
      store(h + b, load(h + b) + row * own);
    }
    h[a] += sum_of(sum) - y[0] * x[a];
    y += width - a;
  }
}

// room->half: half the gradient, with respect to x, of phi(x)^T sums y; room->moment: moment x; of `count` rows.
static void half_gradients(const ea_problem *p, const linear_plan *plan, const linear_room *forward,
                           linear_backward_room *room, const REAL *x, const REAL *y, int64_t count) {
  const quadratic_state *state = &room->state;
  int64_t ld = leading(most_products(p)), columns = padded(p->width);
  clear(room->half, count * plan->ld * (int64_t)sizeof(REAL));
  clear(room->moment, count * plan->ld * (int64_t)sizeof(REAL));
  for (int64_t i = 0; i < plan->blocks; i++) {
    const product_block *block = forward->blocks + i;
    int64_t whole = padded(block->count);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      for (int64_t k = 0; k < whole; k += PANEL) {
        int nr = (int)(panel_width(k, whole) / V);
        product(mr, nr, p->value_width, y + r * plan->value_columns, plan->value_columns,
                state->sums + room->at[i] + k, state->ld, room->matrix + k, ld, 0);
      }
      for (int j = 0; j < mr; j++) {
        store(room->matrix + j * ld + whole, (vec){0});  // is read, and multiplied by 0
        add_half_gradient(room->half + (r + j) * plan->ld, block, room->matrix + j * ld, x + (r + j) * plan->ld, p->width);
      }
    }
  }
  for (int64_t r = 0; r < count; r++) {
    clear(room->half + r * plan->ld + p->width, (plan->ld - p->width) * (int64_t)sizeof(REAL));
  }
  for (int64_t c = 0; c < columns; c += PANEL) {
    int nr = (int)(panel_width(c, columns) / V);
    for (int64_t r = 0; r < count; r += MR) {
      int mr = (int)least(MR, count - r);
      add(mr, nr, p->width, x + r * plan->ld, plan->ld, 0, state->moment + c, plan->ld, room->moment + r * plan->ld + c,
          plan->ld);
    }
  }
}

// forward->sums: the state with its products as rows, as `read_state` has it.
static void turn_state(const ea_problem *p, const linear_plan *plan, linear_room *forward,
                       const linear_backward_room *room) {
  for (int64_t i = 0; i < plan->blocks; i++) {
    const product_block *block = forward->blocks + i;
    for (int64_t k = 0; k < block->count; k += V) {
      for (int64_t e = 0; e < plan->value_columns; e += V) {
        vec square[V];
        UNROLL for (int r = 0; r < V; r++) {
          square[r] = e + r < p->value_width ? load(room->state.sums + (e + r) * room->state.ld + room->at[i] + k) : (vec){0};
        }
        transpose(square);
        int64_t n = least(V, block->count - k);
        for (int64_t r = 0; r < n; r++) store(forward->sums + (block->begin + k + r) * plan->value_columns + e, square[r]);
      }
    }
  }
}

// A chunk of keys begin, ..., begin + n - 1, and the rows first, ..., first + count - 1 of a query head, of which the first
// has the place `place`.
typedef struct {
  int64_t b, head, kv_head, first, count, place, begin, n;
  const double *c;  // cumulative log decays, or NULL
} linear_chunk;

static void load_rows(const ea_problem *p, const linear_plan *plan, linear_backward_room *room, const linear_chunk *at) {
  pack_rows(room->query, plan->ld, &p->query, p->dtype, at->b, at->head, at->first, at->count, p->width, (REAL)p->scale);
  pack_rows(room->upstream, plan->value_columns, &p->grad_output, p->dtype, at->b, at->head, at->first, at->count,
            p->value_width, 1);
  if (!at->c) return;
  if (!at->begin) return;
  for (int64_t r = 0; r < at->count; r++) {
    room->since[r] = (REAL)(at->c[least(at->place + r, key_count(p, at->b) - 1)] - at->c[at->begin - 1]);
  }
  exponentials(room->since, at->count);
}

static void load_keys(const ea_problem *p, const linear_plan *plan, linear_backward_room *room, const linear_chunk *at) {
  pack_rows(room->keys, plan->ld, &p->key, p->dtype, at->b, at->kv_head, at->begin, at->n, p->width, 1);
  pack_rows(room->values, plan->value_columns, &p->value, p->dtype, at->b, at->kv_head, at->begin, at->n, p->value_width, 1);
  pack_transposed(room->keys_transposed, &p->key, p->dtype, at->b, at->kv_head, at->begin, at->n, p->width, room->room);
  pack_transposed(room->values_transposed, &p->value, p->dtype, at->b, at->kv_head, at->begin, at->n, p->value_width,
                  room->room);
  if (!at->c) return;
  for (int64_t j = 0; j < at->n; j++) room->until[j] = (REAL)(at->c[at->begin + at->n - 1] - at->c[at->begin + j]);
  exponentials(room->until, at->n);
}

// The keys of the chunk that row r sees.
INLINE int64_t seen_of(const linear_chunk *at, int64_t r) { return least(at->n, at->place + r + 1 - at->begin); }

// Weights, scores times the decay, and dO_i . v_j of the pairs of a chunk; 0 past the keys that a row sees.
static void pairs_of_chunk(const ea_problem *p, const linear_plan *plan, linear_backward_room *room,
                           const linear_chunk *at) {
  int64_t ldw = leading(padded(LINEAR_CHUNK));
  for (int64_t r = 0; r < at->count; r += MR) {
    int mr = (int)least(MR, at->count - r);
    int64_t seen = seen_of(at, r + mr - 1);
    for (int64_t start = 0; start < seen; start += PANEL) {
      int64_t ld = panel_width(start, at->n);
      derivatives(mr, (int)(ld / V), p->width, room->query + r * plan->ld, plan->ld,
             room->keys_transposed + start * p->width, ld, room->weights + r * ldw + start, room->scores + r * ldw + start,
             ldw, 1, 1, 1, 0);
      product(mr, (int)(ld / V), p->value_width, room->upstream + r * plan->value_columns, plan->value_columns,
              room->values_transposed + start * p->value_width, ld, room->products + r * ldw + start, ldw, 0);
    }
    for (int i = 0; i < mr; i++) {
      REAL *w = room->weights + (r + i) * ldw, *s = room->scores + (r + i) * ldw, *g = room->products + (r + i) * ldw;
      int64_t last = seen_of(at, r + i);
      if (at->c) {
        double now = at->c[least(at->place + r + i, key_count(p, at->b) - 1)];
        for (int64_t j = 0; j < last; j++) room->decay[j] = (REAL)(now - at->c[at->begin + j]);
        exponentials(room->decay, last);
        for (int64_t j = 0; j < last; j++) w[j] *= room->decay[j], s[j] *= room->decay[j];
      }
      for (int64_t j = last; j < seen; j++) w[j] = s[j] = g[j] = 0;
    }
  }
}

INLINE REAL grad_normalizer_of(const ea_problem *p, int64_t index) {
  return p->grad_normalizer ? read_number(p->grad_normalizer, sums_dtype(p), index) : 0;
}

// N g of the pairs of a row, in place of dO_i . v_j, for `shift` = N m. Where one key has all the weight, g is dN.
INLINE void subtract_mean(REAL *g, const REAL *w, int64_t n, REAL total, REAL shift, REAL of_normalizer) {
  for (int64_t j = 0; j < n; j++) g[j] = w[j] == total ? of_normalizer * total : g[j] - shift;
}

// dq, N and m of the rows of a chunk, with the state of all keys before it. Return whether a row is in need of double. One
// that double does not help has gradient NaN, and N = m = 0: so it gives nothing to the gradients of keys.
static int rows_backward(linear_backward_run *run, const linear_room *forward, linear_backward_room *room,
                          const linear_chunk *at) {
  const ea_problem *p = run->p;
  const linear_plan *plan = &run->plan;
  int64_t ldw = leading(padded(LINEAR_CHUNK)), columns = padded(p->width);
  load_rows(p, plan, room, at);
  if (at->begin) half_gradients(p, plan, forward, room, room->query, room->upstream, at->count);
  if (at->n) pairs_of_chunk(p, plan, room, at);
  clear(room->grad, at->count * plan->ld * (int64_t)sizeof(REAL));
  int64_t index = (at->b * p->heads + at->head) * p->rows + at->first;
  REAL *numbers = run->numbers + 2 * (index - run->first_row), trace = 0;
  for (int64_t e = 0; at->begin && e < p->width; e++) trace += room->state.moment[e * plan->ld + e];
  REAL marks[LINEAR_CHUNK];
  int unsafe = 0;
  for (int64_t r = 0; r < at->count; r++) {
    const REAL *q = room->query + r * plan->ld;
    REAL *half = room->half + r * plan->ld, *moment = room->moment + r * plan->ld, *grad = room->grad + r * plan->ld;
    REAL *w = room->weights + r * ldw, *s = room->scores + r * ldw, *g = room->products + r * ldw;
    int64_t seen = at->n ? seen_of(at, r) : 0;
    REAL decay = at->c && at->begin ? room->since[r] : 1;
    double all = 0, weighted = 0;
    for (int64_t e = 0; at->begin && e < p->width; e++) all += q[e] * moment[e], weighted += q[e] * half[e];
    all *= decay, weighted *= decay;
    for (int64_t j = 0; j < seen; j++) all += w[j], weighted += w[j] * g[j];
    REAL total = (REAL)all, mean = (REAL)weighted;
    REAL of_normalizer = grad_normalizer_of(p, index + r), inverse = total == 0 ? 0 : 1 / total;
    REAL shift = mean * inverse - of_normalizer * total;
    int is_unsafe = is_unsafe_sum(p, q, total, trace * decay, room->any <= least(at->begin + at->n - 1, at->place + r));
    is_unsafe |= shift * 0 != 0;
    unsafe |= is_unsafe && !REAL_IS_DOUBLE;
    numbers[2 * r] = is_unsafe ? 0 : total;
    numbers[2 * r + 1] = is_unsafe ? 0 : shift * inverse;
    marks[r] = is_unsafe ? NAN : 0;
    if (at->begin) {
      for (int64_t e = 0; e < p->width; e++) grad[e] = decay * (half[e] - shift * moment[e]);
    }
    subtract_mean(g, w, seen, total, shift, of_normalizer);
    for (int64_t j = 0; j < seen; j++) s[j] *= g[j];
  }
  for (int64_t c = 0; at->n && c < columns; c += PANEL) {
    int nr = (int)(panel_width(c, columns) / V);
    for (int64_t r = 0; r < at->count; r += MR) {
      int mr = (int)least(MR, at->count - r);
      add(mr, nr, seen_of(at, r + mr - 1), room->scores + r * ldw, ldw, 0, room->keys + c, plan->ld,
          room->grad + r * plan->ld + c, plan->ld);
    }
  }
  for (int64_t r = 0; r < at->count; r++) {
    const REAL *q = room->query + r * plan->ld;
    REAL *grad = room->grad + r * plan->ld, total = numbers[2 * r], along = 0, square = 0;
    REAL inverse = total == 0 ? 0 : 1 / total;
    for (int64_t e = 0; e < p->width; e++) grad[e] *= inverse, along += grad[e] * q[e], square += q[e] * q[e];
    // q . dq / 2 is dN N: what is left of terms that cancel.
    REAL change = square > 0 ? (grad_normalizer_of(p, index + r) * total - along) / square : 0;
    for (int64_t e = 0; e < p->width; e++) grad[e] = 2 * (REAL)p->scale * (grad[e] + change * q[e]) + marks[r];
    write_row((char *)p->grad_query + (index + r) * p->width * dtype_size(p->dtype), p->dtype, grad, p->width);
  }
  return unsafe;
}

// u of the rows in place of dO; the rows' m.
static void divide_rows(const linear_backward_run *run, linear_backward_room *room, const linear_chunk *at, REAL *mean) {
  int64_t index = (at->b * run->p->heads + at->head) * run->p->rows + at->first;
  const REAL *numbers = run->numbers + 2 * (index - run->first_row);
  for (int64_t r = 0; r < at->count; r++) {
    REAL total = numbers[2 * r];
    scale_row(room->upstream + r * run->plan.value_columns, run->plan.value_columns, total == 0 ? 0 : 1 / total);
    mean[r] = numbers[2 * r + 1];
  }
}

// Add the rows of a chunk to the state of rows, with their decay since the end of the chunk before.
static void remember_rows(const linear_backward_run *run, const linear_room *forward, linear_backward_room *room,
                          const linear_chunk *at, REAL *mean) {
  const linear_plan *plan = &run->plan;
  const REAL *decay = at->c ? room->since : NULL;
  scale_rows(room->weighted, room->upstream, plan->value_columns, at->count, run->p->value_width, decay);
  for (int64_t r = 0; decay && r < at->count; r++) mean[r] *= decay[r];
  add_to_state(run->p, plan, forward, room, room->query, room->weighted, mean, at->count);
}

// Add what pairs inside of the chunk give to dk and dv; the rows' numbers are those of `divide_rows`.
static void keys_of_chunk(const linear_backward_run *run, linear_backward_room *room, const linear_chunk *at,
                          const REAL *mean, double *grad_decay) {
  const ea_problem *p = run->p;
  const linear_plan *plan = &run->plan;
  int64_t ldw = leading(padded(LINEAR_CHUNK)), columns = padded(p->width);
  int64_t index = (at->b * p->heads + at->head) * p->rows + at->first;
  pairs_of_chunk(p, plan, room, at);
  for (int64_t r = 0; r < at->count; r++) {
    REAL *w = room->weights + r * ldw, *s = room->scores + r * ldw, *g = room->products + r * ldw;
    int64_t seen = seen_of(at, r);
    REAL total = run->numbers[2 * (index - run->first_row + r)], of_normalizer = grad_normalizer_of(p, index + r);
    for (int64_t j = 0; j < seen; j++) {
      g[j] = w[j] == total ? of_normalizer : g[j] - mean[r];
      s[j] *= g[j];
      if (grad_decay) grad_decay[at->begin + j] -= w[j] * g[j];
    }
    for (int64_t j = seen; j < at->n; j++) w[j] = s[j] = 0;
  }
  for (int64_t j = 0; j < at->n; j += MR) {
    int mr = (int)least(MR, at->n - j);
    for (int64_t c = 0; c < columns; c += PANEL) {
      int nr = (int)(panel_width(c, columns) / V);
      add(mr, nr, at->count, room->scores + j, ldw, 1, room->query + c, plan->ld, room->grad + j * plan->ld + c, plan->ld);
    }
    for (int64_t c = 0; c < plan->value_columns; c += PANEL) {
      int nr = (int)(panel_width(c, plan->value_columns) / V);
      add(mr, nr, at->count, room->weights + j, ldw, 1, room->upstream + c, plan->value_columns,
          room->grad_value + j * plan->value_columns + c, plan->value_columns);
    }
  }
}

// dk and dv of a chunk of keys from the state of the rows after it.
static void keys_from_state(const linear_backward_run *run, linear_room *forward, linear_backward_room *room,
                            const linear_chunk *at, double *grad_decay) {
  const ea_problem *p = run->p;
  const linear_plan *plan = &run->plan;
  half_gradients(p, plan, forward, room, room->keys, room->values, at->n);
  turn_state(p, plan, forward, room);
  clear(forward->output, at->n * plan->value_columns * (int64_t)sizeof(REAL));
  read_state(plan, forward, p, room->keys, at->n);
  for (int64_t j = 0; j < at->n; j++) {
    const REAL *k = room->keys + j * plan->ld, *half = room->half + j * plan->ld, *moment = room->moment + j * plan->ld;
    REAL decay = at->c ? room->until[j] : 1, sum = 0;
    for (int64_t e = 0; e < p->width; e++) {
      REAL part = decay * (half[e] - moment[e]);
      room->grad[j * plan->ld + e] += part;
      sum += k[e] * part;
    }
    for (int64_t e = 0; e < p->value_width; e++) {
      room->grad_value[j * plan->value_columns + e] += decay * forward->output[j * plan->value_columns + e];
    }
    if (grad_decay) grad_decay[at->begin + j] -= sum;  // sum_i w_ij g_ij: the form itself, by Euler's theorem
  }
}

static void write_keys(const ea_problem *p, const linear_plan *plan, linear_backward_room *room, const linear_chunk *at) {
  int64_t index = (at->b * p->kv_heads + at->kv_head) * p->keys + at->begin;
  for (int64_t j = 0; j < at->n; j++) {
    scale_row(room->grad + j * plan->ld, p->width, 2);
    write_row((char *)p->grad_key + (index + j) * p->width * dtype_size(p->dtype), p->dtype, room->grad + j * plan->ld,
              p->width);
    write_row((char *)p->grad_value + (index + j) * p->value_width * dtype_size(p->dtype), p->dtype,
              room->grad_value + j * plan->value_columns, p->value_width);
  }
}

// All of one state: its chunks in order, and in reverse. Return whether a row is in need of double: then there are no
// gradients.
static int linear_backward_task(linear_backward_run *run, linear_room *forward, linear_backward_room *room, int64_t task) {
  const ea_problem *p = run->p;
  const linear_plan *plan = &run->plan;
  int64_t b = task / plan->state_heads, state = task % plan->state_heads;
  int64_t keys = key_count(p, b), corner = (p->lower_right ? keys - p->rows : 0) + p->right;
  int64_t rest = p->causal ? most(0, least(p->rows, keys - corner)) : 0;
  int64_t before = p->causal ? least(p->rows, -corner) : 0;  // rows before the first key
  double *grad_decay = p->grad_decay ? (double *)p->grad_decay + (b * plan->state_heads + state) * p->keys : NULL;
  REAL mean[LINEAR_CHUNK];
  linear_chunk at = {.b = b, .kv_head = state * plan->groups / (p->heads / p->kv_heads)};
  at.c = decays_of(p, b, state);
  room->any = INT64_MAX;
  int unsafe = 0;

  clear_state(p, plan, &room->state);
  for (at.begin = 0; at.begin < keys; at.begin += LINEAR_CHUNK) {
    at.n = least(LINEAR_CHUNK, keys - at.begin);
    at.first = most(0, least(p->rows, at.begin - corner));
    at.count = p->causal ? most(0, least(p->rows, at.begin + at.n - corner)) - at.first : 0;
    at.place = at.first + corner;
    load_keys(p, plan, room, &at);
    int64_t found = room->any == INT64_MAX ? first_nonzero(room->keys, plan->ld, at.n, p->width) : at.n;
    if (found < at.n) room->any = at.begin + found;
    for (int64_t g = 0; at.count > 0 && g < plan->groups; g++) {
      at.head = state * plan->groups + g;
      unsafe |= rows_backward(run, forward, room, &at);
    }
    if (unsafe) return 1;
    if (at.c && at.begin) decay_state(p, plan, &room->state, (REAL)(at.c[at.begin + at.n - 1] - at.c[at.begin - 1]));
    const REAL *until = at.c ? room->until : NULL;
    scale_rows(room->weighted, room->values, plan->value_columns, at.n, p->value_width, until);
    add_to_state(p, plan, forward, room, room->keys, room->weighted, until, at.n);
  }
  for (int64_t g = 0; g < plan->groups; g++) {
    at.head = state * plan->groups + g, at.n = 0;
    for (at.first = 0, at.begin = 0; at.first < before; at.first += LINEAR_CHUNK) {
      at.count = least(LINEAR_CHUNK, before - at.first), at.place = at.first + corner;
      unsafe |= rows_backward(run, forward, room, &at);
    }
    for (at.first = rest, at.begin = keys; at.first < p->rows; at.first += LINEAR_CHUNK) {
      at.count = least(LINEAR_CHUNK, p->rows - at.first), at.place = at.first + corner;
      unsafe |= rows_backward(run, forward, room, &at);
    }
  }
  if (unsafe) return 1;

  clear_state(p, plan, &room->state);
  for (int64_t g = 0; keys && g < plan->groups; g++) {
    at.head = state * plan->groups + g;
    for (at.first = rest; at.first < p->rows; at.first += LINEAR_CHUNK) {
      at.count = least(LINEAR_CHUNK, p->rows - at.first), at.place = at.first + corner;
      load_rows(p, plan, room, &at);
      divide_rows(run, room, &at, mean);
      remember_rows(run, forward, room, &at, mean);
    }
  }
  for (at.begin = (keys - 1) / LINEAR_CHUNK * LINEAR_CHUNK; at.begin >= 0 && keys; at.begin -= LINEAR_CHUNK) {
    at.n = least(LINEAR_CHUNK, keys - at.begin);
    at.first = most(0, least(p->rows, at.begin - corner));
    at.count = p->causal ? most(0, least(p->rows, at.begin + at.n - corner)) - at.first : 0;
    at.place = at.first + corner;
    load_keys(p, plan, room, &at);
    clear(room->grad, at.n * plan->ld * (int64_t)sizeof(REAL));
    clear(room->grad_value, at.n * plan->value_columns * (int64_t)sizeof(REAL));
    keys_from_state(run, forward, room, &at, grad_decay);
    if (at.c && at.begin) decay_state(p, plan, &room->state, (REAL)(at.c[at.begin + at.n - 1] - at.c[at.begin - 1]));
    for (int64_t g = 0; at.count > 0 && g < plan->groups; g++) {
      at.head = state * plan->groups + g;
      load_rows(p, plan, room, &at);
      divide_rows(run, room, &at, mean);
      keys_of_chunk(run, room, &at, mean, grad_decay);
      if (at.begin) remember_rows(run, forward, room, &at, mean);
    }
    write_keys(p, plan, room, &at);
  }
  return 0;
}

static void linear_backward_thread(void *context, int64_t thread) {
  linear_backward_run *run = context;
  linear_room forward;
  linear_backward_room room;
  lay_out_linear_backward(run->p, &run->plan, run->rooms + thread * run->room_bytes, &forward, &room);
  for (int64_t task, end; ea_take(&run->queue, &task, &end);) {
    for (; task < end; task++) {
      int unsafe = linear_backward_task(run, &forward, &room, run->first + task);
      int status = unsafe ? linear_backward_in_double(run->p, run->first + task) : EA_OK;
      if (status != EA_OK) run->status = status;
    }
  }
}

// The states first, ..., end - 1; end -1: all.
static int run_linear_backward(const ea_problem *p, int64_t first, int64_t end) {
  if (p->batch * p->heads * p->rows == 0) return EA_OK;
  linear_backward_run run = {.p = p, .plan = plan_linear(p, NULL), .first = first};
  int64_t tasks = (end < 0 ? run.plan.states : end) - first, threads = most(1, least(p->threads, tasks));
  int64_t state_rows = run.plan.groups * p->rows;
  run.first_row = first * state_rows;
  run.queue = (ea_queue){.count = tasks, .chunk = 1};
  linear_room forward;
  linear_backward_room room;
  run.room_bytes = round_up(lay_out_linear_backward(p, &run.plan, NULL, &forward, &room), 64);
  int64_t numbers = 2 * tasks * state_rows * (int64_t)sizeof(REAL);
  void *memory = allocate(threads * run.room_bytes + numbers);
  if (!memory) return EA_NO_MEMORY;
  run.rooms = memory;
  run.numbers = (REAL *)(run.rooms + threads * run.room_bytes);
  ea_parallel(linear_backward_thread, &run, threads);
  release(memory);
  return run.status;
}
