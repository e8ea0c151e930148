// One allocation, shared out in pieces.
#include <stdlib.h>

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
