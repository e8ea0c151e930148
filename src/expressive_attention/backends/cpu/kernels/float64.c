// Everything in double arithmetic: for double tensors, and for numbers whose squares leave float32's range.
#define REAL double
#define REAL_IS_DOUBLE 1
#define REAL_DTYPE EA_FLOAT64
#include "kernels.h"

static int rescue_row(const ea_problem *p, int64_t b, int64_t kv_head, int64_t index, REAL normalizer) {
  return one_row(p, b, kv_head, index, &normalizer);
}

int ENTRY(ea_forward_double)(const problem_list *list) { return run_forward(list); }

int ENTRY(ea_one_row_double)(const ea_problem *p, int64_t b, int64_t kv_head, int64_t index) {
  REAL normalizer;
  return one_row(p, b, kv_head, index, &normalizer);
}

static int backward_in_double(const problem_list *list) {
  (void)list;
  return EA_OK;
}

int ENTRY(ea_backward_double)(const problem_list *list) { return run_backward(list, 1); }

// There is no wider arithmetic: rows that a state of double does not hold are marked.
static int linear_in_double(const ea_problem *p, int64_t task) {
  (void)p, (void)task;
  return EA_OK;
}

static int linear_backward_in_double(const ea_problem *p, int64_t task) { return linear_in_double(p, task); }

int ENTRY(ea_linear_double)(const ea_problem *p) { return run_linear(p, 0, -1); }

int ENTRY(ea_linear_state_double)(const ea_problem *p, int64_t task) { return run_linear(p, task, task + 1); }

int ENTRY(ea_step_double)(const ea_token *p) { return run_step(p); }

int ENTRY(ea_linear_backward_double)(const ea_problem *p) { return run_linear_backward(p, 0, -1); }

int ENTRY(ea_linear_backward_state_double)(const ea_problem *p, int64_t task) {
  return run_linear_backward(p, task, task + 1);
}
