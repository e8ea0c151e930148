// One allocation, shared out in pieces.
#ifdef _WIN32
#include <malloc.h>
#else
#include <stdlib.h>
#endif

// Memory that starts on a cache line; NULL: there is not enough. To be given back by `release`.
static void *allocate(int64_t bytes) {
#ifdef _WIN32
  return _aligned_malloc((size_t)bytes, 64);
#else
  void *memory;
  return posix_memalign(&memory, 64, (size_t)bytes) == 0 ? memory : NULL;
#endif
}

static void release(void *memory) {
#ifdef _WIN32
  _aligned_free(memory);
#else
  free(memory);
#endif
}

typedef struct {
  char *memory;  // NULL: only count
  int64_t used;
} arena;

static void *take(arena *a, int64_t bytes) {
  char *piece = a->memory ? a->memory + a->used : NULL;
  a->used += round_up(bytes, 64);
  return piece;
}

// Fill with zeros. A tensor without elements has no address, which memset must not be given.
INLINE void clear(void *memory, int64_t bytes) {
  if (bytes) memset(memory, 0, (size_t)bytes);
}

// Distance between the rows of a matrix of `columns` numbers. A line more than they need: rows that lie a
// power of two apart would drive each other out of the first cache.
INLINE int64_t leading(int64_t columns) { return columns + 64 / (int64_t)sizeof(REAL); }
