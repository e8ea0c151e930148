#include "threads.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

typedef void (*gomp_parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static gomp_parallel openmp;
static pid_t owner;  // the process whose OpenMP threads these are: a fork does not inherit them

typedef struct {
  void (*body)(void *context, int64_t thread);
  void *context;
  ea_queue queue;
} team;

// A runtime may give fewer threads than it was asked for: each takes numbers until none is left.
static void *member(void *data) {
  team *t = data;
  for (int64_t i, end; ea_take(&t->queue, &i, &end);) t->body(t->context, i);
  return NULL;
}

static void openmp_member(void *data) { member(data); }

void ea_use_openmp(void *function) {
  openmp = (gomp_parallel)function;
  owner = getpid();
}

static void on_own_threads(team *t) {
  pthread_t *others = malloc(sizeof(pthread_t) * (size_t)(t->queue.count - 1));
  int64_t count = 0;
  while (others && count < t->queue.count - 1 && pthread_create(others + count, NULL, member, t) == 0) count++;
  member(t);
  for (int64_t i = 0; i < count; i++) pthread_join(others[i], NULL);
  free(others);
}

void ea_parallel(void (*body)(void *, int64_t), void *context, int64_t threads) {
  team t = {.body = body, .context = context, .queue = {.count = threads, .chunk = 1}};
  if (threads <= 1) {
    member(&t);
  } else if (openmp && owner == getpid()) {
    openmp(openmp_member, &t, (unsigned)threads, 0);
  } else {
    on_own_threads(&t);
  }
}
