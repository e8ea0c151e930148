// Everything in double arithmetic: for double tensors, and for numbers whose squares leave float32's range.
#define REAL double
#define REAL_IS_DOUBLE 1
#define REAL_DTYPE EA_FLOAT64
#include "kernels.h"

static void rescue_rows(forward_run *run, int64_t b, int64_t kv_head, int64_t first, int64_t count) {
  (void)run, (void)b, (void)kv_head, (void)first, (void)count;
}

int ENTRY(ea_forward_double)(const ea_problem *p) { return run_forward(p); }

int ENTRY(ea_forward_rows_double)(const ea_problem *p, int64_t b, int64_t kv_head, int64_t first, int64_t count) {
  forward_run run = {.p = p, .plan = plan_forward(p)};
  run.plan.block_rows = count;
  forward_room room;
  int64_t bytes = lay_out_forward(p, &run.plan, NULL, &room);
  void *memory;
  if (posix_memalign(&memory, 64, (size_t)bytes) != 0) return EA_NO_MEMORY;
  lay_out_forward(p, &run.plan, memory, &room);
  forward_rows(p, &run.plan, &room, b, kv_head, first, count, 0, p->keys);
  for (int64_t r = 0; r < count; r++) {
    REAL *output = room.output + r * run.plan.value_columns;
    finish_row(p, room.rows + r, output, sum_of(load(room.sums + r * V)), output);
  }
  free(memory);
  return EA_OK;
}

static int backward_in_double(const ea_problem *p) {
  (void)p;
  return EA_OK;
}

int ENTRY(ea_backward_double)(const ea_problem *p) { return run_backward(p); }
