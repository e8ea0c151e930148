// Running a function on several threads, and sharing out numbered tasks among them.
#ifndef EA_THREADS_H
#define EA_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

// Call body(context, t) once for every t < threads, at the same time; return when all have returned.
void ea_parallel(void (*body)(void *context, int64_t thread), void *context, int64_t threads);

// GOMP_parallel of the OpenMP runtime that the process uses, so that its threads serve here too; NULL: start
// threads of our own for every call.
void ea_use_openmp(void *gomp_parallel);

// Tasks 0, ..., count - 1, of which threads take `chunk` at a time. On a cache line of its own: what else the threads
// read would have to be fetched again whenever one of them takes tasks.
typedef struct {
  _Alignas(64) _Atomic int64_t taken;
  int64_t count, chunk;
} ea_queue;

// Take the tasks *task, ..., *end - 1; return 0 when none is left.
static inline int ea_take(ea_queue *queue, int64_t *task, int64_t *end) {
  *task = atomic_fetch_add_explicit(&queue->taken, queue->chunk, memory_order_relaxed);
  *end = *task + queue->chunk < queue->count ? *task + queue->chunk : queue->count;
  return *task < queue->count;
}

#endif
