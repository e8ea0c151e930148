// Everything in float arithmetic: for float, bfloat16 and float16 tensors.
#define REAL float
#define REAL_IS_DOUBLE 0
#define REAL_DTYPE EA_FLOAT32
#include "kernels.h"

static void rescue_rows(forward_run *run, int64_t b, int64_t kv_head, int64_t first, int64_t count) {
  int status = ENTRY(ea_forward_rows_double)(run->p, b, kv_head, first, count);
  if (status != EA_OK) run->status = status;
}

int ENTRY(ea_forward)(const ea_problem *p) {
  return p->dtype == EA_FLOAT64 ? ENTRY(ea_forward_double)(p) : run_forward(p);
}

static int backward_in_double(const ea_problem *p) { return ENTRY(ea_backward_double)(p); }

int ENTRY(ea_backward)(const ea_problem *p) {
  return p->dtype == EA_FLOAT64 ? ENTRY(ea_backward_double)(p) : run_backward(p);
}
