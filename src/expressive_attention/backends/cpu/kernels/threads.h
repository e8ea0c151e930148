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

// The next task that nobody has taken, counting from 0.
static inline int64_t ea_next(_Atomic int64_t *taken) {
  return atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
}

#endif
