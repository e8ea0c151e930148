// Everything in float arithmetic: for float, bfloat16 and float16 tensors.
#define REAL float
#define REAL_IS_DOUBLE 0
#define REAL_DTYPE EA_FLOAT32
#include "kernels.h"

static int rescue_row(const ea_problem *p, int64_t b, int64_t kv_head, int64_t index, REAL normalizer) {
  int status = EA_OK;
  // Not where the row is in need of double anyway.
  if (!(normalizer <= LEAST_SUM)) status = one_row(p, b, kv_head, index, &normalizer);
  if (status == EA_OK && !is_in_range(normalizer)) status = ENTRY(ea_one_row_double)(p, b, kv_head, index);
  return status;
}

int ENTRY(ea_forward)(const ea_problem *p) {
  problem_list list;
  int64_t row, key;
  if (list_problems(p, &list, &row, &key) != EA_OK) return EA_NO_MEMORY;
  int status = p->dtype == EA_FLOAT64 ? ENTRY(ea_forward_double)(&list) : run_forward(&list);
  if (is_packed(p)) clear_output(p, row);
  release_list(p, &list);
  return status;
}

static int linear_in_double(const ea_problem *p, int64_t task) { return ENTRY(ea_linear_state_double)(p, task); }

static int linear_backward_in_double(const ea_problem *p, int64_t task) {
  return ENTRY(ea_linear_backward_state_double)(p, task);
}

int ENTRY(ea_linear)(const ea_problem *p) {
  return p->dtype == EA_FLOAT64 ? ENTRY(ea_linear_double)(p) : run_linear(p, 0, -1);
}

int ENTRY(ea_linear_backward)(const ea_problem *p) {
  return p->dtype == EA_FLOAT64 ? ENTRY(ea_linear_backward_double)(p) : run_linear_backward(p, 0, -1);
}

int ENTRY(ea_step)(const ea_token *p) { return p->in_double ? ENTRY(ea_step_double)(p) : run_step(p); }

static int backward_in_double(const problem_list *list) { return ENTRY(ea_backward_double)(list); }

int ENTRY(ea_backward)(const ea_problem *p) {
  problem_list list;
  int64_t row, key;
  if (list_problems(p, &list, &row, &key) != EA_OK) return EA_NO_MEMORY;
  int status = p->dtype == EA_FLOAT64 ? ENTRY(ea_backward_double)(&list) : run_backward(&list, 1);
  if (is_packed(p)) clear_gradients(p, row, key);
  release_list(p, &list);
  return status;
}
