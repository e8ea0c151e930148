#include "threads.h"

#include <stdlib.h>
#ifdef _WIN32
#include <windows.h>

#include <process.h>
#else
#include <pthread.h>
#include <unistd.h>
#endif

typedef void (*gomp_parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static gomp_parallel openmp;
static int owner;  // the process whose OpenMP threads these are: a fork does not inherit them

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

#ifdef _WIN32
typedef HANDLE thread;

static unsigned __stdcall own_member(void *data) {
  member(data);
  return 0;
}

static int start(thread *started, team *t) {
  *started = (HANDLE)_beginthreadex(NULL, 0, own_member, t, 0, NULL);
  return *started != NULL;
}

static void join(thread started) {
  WaitForSingleObject(started, INFINITE);
  CloseHandle(started);
}

static int this_process(void) { return (int)GetCurrentProcessId(); }
#else
typedef pthread_t thread;

static int start(thread *started, team *t) { return pthread_create(started, NULL, member, t) == 0; }
static void join(thread started) { pthread_join(started, NULL); }
static int this_process(void) { return (int)getpid(); }
#endif

void ea_use_openmp(void *function) {
  openmp = (gomp_parallel)function;
  owner = this_process();
}

static void on_own_threads(team *t) {
  thread *others = malloc(sizeof(thread) * (size_t)(t->queue.count - 1));
  int64_t count = 0;
  while (others && count < t->queue.count - 1 && start(others + count, t)) count++;
  member(t);
  for (int64_t i = 0; i < count; i++) join(others[i]);
  free(others);
}

void ea_parallel(void (*body)(void *, int64_t), void *context, int64_t threads) {
  team t = {.body = body, .context = context, .queue = {.count = threads, .chunk = 1}};
  if (threads <= 1) {
    member(&t);
  } else if (openmp && owner == this_process()) {
    openmp(openmp_member, &t, (unsigned)threads, 0);
  } else {
    on_own_threads(&t);
  }
}
