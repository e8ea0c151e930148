// How work is shared out among threads.

// Below this number of operations, a thread takes longer to wake than to work.
#define LEAST_WORK 500000

// Tasks that take fewer operations are taken several at a time.
#define LEAST_CHUNK 500000

static double operations(const ea_problem *p) {
  return 2.0 * p->batch * p->heads * p->rows * p->keys * (p->width + p->value_width) * listed_share(p);
}

static int64_t useful_threads(int64_t threads, double work, int64_t tasks) {
  return work < LEAST_WORK ? 1 : most(1, least(threads, tasks));
}

// The queue of `tasks` tasks that together are all `work`, for so many threads.
static ea_queue queue_of(double work, int64_t tasks, int64_t threads) {
  int64_t chunk = (int64_t)(LEAST_CHUNK * (double)tasks / (work > 1 ? work : 1));
  return (ea_queue){.count = tasks, .chunk = most(1, least(chunk, tasks / (4 * threads)))};
}
