// Where rows and keys have their results, and packed sequences: in tensors of batch 1, one after the other. Each of these is
// a problem of its own, to which the tensors begin at its first row.

INLINE int is_packed(const ea_problem *p) { return p->query_starts != NULL; }

// The place of a row among the numbers of all rows: (batch, head, row), of packed sequences (row, head).
INLINE int64_t row_place(const ea_problem *p, int64_t b, int64_t head, int64_t query) {
  return is_packed(p) ? query * p->heads + head : (b * p->heads + head) * p->rows + query;
}

// The same of keys, for their gradients.
INLINE int64_t key_place(const ea_problem *p, int64_t b, int64_t kv_head, int64_t key) {
  return is_packed(p) ? key * p->kv_heads + kv_head : (b * p->kv_heads + kv_head) * p->keys + key;
}

// Problems that are computed together, by so many threads.
typedef struct {
  const ea_problem *problem;
  int64_t count, threads;
} problem_list;

INLINE void *moved(const void *address, int64_t bytes) { return (void *)((uintptr_t)address + (uintptr_t)bytes); }

#if !REAL_IS_DOUBLE
static ea_tensor from_row(const ea_tensor *t, int64_t dtype, int64_t row) {
  ea_tensor moved_tensor = *t;
  moved_tensor.data = moved(t->data, row * t->stride[2] * dtype_size(dtype));
  return moved_tensor;
}

// Sequence i, whose queries and keys begin at these rows. One thread works on a task of it, so that its sums are the same
// for any number of them.
static ea_problem sequence_of(const ea_problem *p, int64_t i, int64_t row, int64_t rows, int64_t key, int64_t keys) {
  int64_t size = dtype_size(p->dtype), sums_size = dtype_size(sums_dtype(p)), at = row * p->heads, key_at = key * p->kv_heads;
  ea_problem own = *p;
  own.threads = 1;
  own.rows = rows;
  own.keys = keys;
  own.query_starts = p->query_starts + i;
  own.key_starts = p->key_starts + i;
  if (p->key_lengths) own.key_lengths = p->key_lengths + i;
  if (p->slopes) own.slopes = p->slopes + i * p->slopes_stride;
  if (p->relative.data) own.relative.data = moved(p->relative.data, i * p->relative.stride[0] * sums_size);
  if (p->grad_relative) own.grad_relative = p->grad_relative + i * p->grad_relative_stride;
  own.query = from_row(&p->query, p->dtype, row);
  own.key = from_row(&p->key, p->dtype, key);
  own.value = from_row(&p->value, p->dtype, key);
  own.grad_output = from_row(&p->grad_output, p->dtype, row);
  own.output = moved(p->output, at * p->value_width * size);
  own.normalizer = moved(p->normalizer, at * sums_size);
  own.bias_max = moved(p->bias_max, at * sums_size);
  if (p->grad_normalizer) own.grad_normalizer = moved(p->grad_normalizer, at * sums_size);
  own.grad_query = moved(p->grad_query, at * p->width * size);
  own.grad_key = moved(p->grad_key, key_at * p->width * size);
  own.grad_value = moved(p->grad_value, key_at * p->value_width * size);
  return own;
}

// The problems in `p`, to be given back by `release_list`; with packed sequences, *row and *key are where the last one ends.
// Starts that fall, or lie outside of the tensors, are as the nearest ones that do not.
static int list_problems(const ea_problem *p, problem_list *list, int64_t *row, int64_t *key) {
  *list = (problem_list){p, 1, p->threads};
  *row = *key = 0;
  if (!is_packed(p)) return EA_OK;
  ea_problem *own = allocate(most(1, p->sequences) * (int64_t)sizeof(ea_problem));
  if (!own) return EA_NO_MEMORY;
  for (int64_t i = 0; i < p->sequences; i++) {
    int64_t end = most(*row, least(p->rows, p->query_starts[i + 1])), key_end = most(*key, least(p->keys, p->key_starts[i + 1]));
    own[i] = sequence_of(p, i, *row, end - *row, *key, key_end - *key);
    *row = end;
    *key = key_end;
  }
  *list = (problem_list){own, p->sequences, p->threads};
  return EA_OK;
}

static void release_list(const ea_problem *p, problem_list *list) {
  if (list->problem != p) release((void *)list->problem);
}
#endif
