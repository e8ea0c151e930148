// A problem that the library computes. Conventions: call.py; equations: docs/operator.md.
#ifndef EA_PROBLEM_H
#define EA_PROBLEM_H

#include <stdint.h>

enum ea_dtype { EA_FLOAT32, EA_FLOAT64, EA_BFLOAT16, EA_FLOAT16, EA_BOOL, EA_NONE };

enum ea_status { EA_OK, EA_NO_MEMORY };

// Four dimensions (batch, head, row, column) of elements `stride` apart; 0 repeats an element.
typedef struct {
  const void *data;
  int64_t stride[4];
} ea_tensor;

// To be raised when a member changes its meaning, or an enum above its order, but no name does.
#define EA_VERSION "5"

// The members, each with its format in Python's `struct`: backends/cpu/layout.py has the same list, and a library that
// was compiled from another one is refused. All are 8 bytes wide or arrays of such.
#define EA_MEMBERS(M)                                                                               \
  M(q, int64_t, threads, )                                                                          \
  M(q, int64_t, dtype, )      /* of query, key, value, output and their gradients */                \
  M(q, int64_t, mask_dtype, ) /* EA_NONE: there is no mask */                                       \
  M(q, int64_t, squared, )    /* f(z) = z^2 instead of z^2 / (1 + z^2) */                           \
  /* Query i is at place p = i, or, with lower_right, i + S - L, and sees key j if and only if */   \
  /* j <= p + right, with `causal`, and j >= p - left, with `window`. */                            \
  M(q, int64_t, causal, ) M(q, int64_t, right, ) M(q, int64_t, window, ) M(q, int64_t, left, )      \
  M(q, int64_t, lower_right, )                                                                      \
  /* B, Hq, Hkv, L, S, E, Ev */                                                                     \
  M(q, int64_t, batch, ) M(q, int64_t, heads, ) M(q, int64_t, kv_heads, ) M(q, int64_t, rows, )     \
  M(q, int64_t, keys, ) M(q, int64_t, width, ) M(q, int64_t, value_width, )                         \
  M(d, double, scale, )                                                                             \
  /* Packed sequences: in batch 1, so many of them, where their queries and keys start, and where the last one ends. */ \
  /* Results lie as (row, head) then, and key_lengths and slopes are of sequences. NULL: there are none. */ \
  M(q, int64_t, sequences, ) M(q, const int64_t *, query_starts, ) M(q, const int64_t *, key_starts, ) \
  M(q, const int64_t *, key_lengths, ) /* of each batch: how many keys exist, S then; or NULL */    \
  /* ALiBi: weights are multiplied by exp(-slope |p - j|). Slopes of heads, from batch to batch so far apart; or NULL */ \
  M(q, const float *, slopes, ) M(q, int64_t, slopes_stride, )                                      \
  /* Biases by distance: of key j for a query at place p, number j - p + reach - 1 of a row of (batch or sequence, head), */ \
  /* float or double as the normalizer; or no data */                                               \
  M(5q, ea_tensor, relative, ) M(q, int64_t, reach, )                                               \
  /* Dropout, see dropout.h: p 2^24; 1 - p (1 where p = 1); seed, offset and first row of so many batches each, or NULL */ \
  M(q, int64_t, dropout_threshold, ) M(d, double, keep, )                                           \
  M(q, const int64_t *, dropout_seeds, ) M(q, int64_t, dropout_batches, )                            \
  /* Blocks of keys that blocks of so many queries see, see blocks.h: int32 (batch, head, block of queries, block of */ \
  /* keys), adjacent in the last; or no data. Tiles of bytes (queries, keys) for blocks that are seen in part. */ \
  M(5q, ea_tensor, blocks, ) M(q, int64_t, listed_rows, ) M(q, int64_t, listed_keys, )              \
  M(q, const uint8_t *, tiles, )                                                                    \
  M(5q, ea_tensor, query, ) M(5q, ea_tensor, key, ) M(5q, ea_tensor, value, ) M(5q, ea_tensor, mask, ) \
  /* In linear time: cumulative log decays of keys (batch, head, key), of double, of so many heads; or no data */ \
  M(q, int64_t, decay_heads, )                                                                      \
  M(5q, ea_tensor, decay, )                                                                         \
  /* Contiguous. Normalizer, bias_max and their like are float, double for EA_FLOAT64. */           \
  M(q, void *, output, ) M(q, void *, normalizer, ) M(q, void *, bias_max, )                        \
  /* The rest is for the backward pass. */                                                          \
  M(5q, ea_tensor, grad_output, )                                                                   \
  M(q, const void *, grad_normalizer, ) /* or NULL */                                               \
  M(q, void *, grad_query, ) M(q, void *, grad_key, ) M(q, void *, grad_value, )                    \
  M(q, void *, grad_mask, )       /* or NULL; contiguous, of the dtype of the mask */               \
  M(q, void *, grad_decay, )      /* or NULL; contiguous, of one double for each key of each state */ \
  M(4q, int64_t, mask_size, [4])  /* of the dimensions of grad_mask: 1 where it is broadcast */     \
  /* double, to which is added: rows of (head), those of batches or sequences so far apart; or NULL */ \
  M(q, double *, grad_relative, ) M(q, int64_t, grad_relative_stride, )

// One token for states of the squared form, see step.h, likewise. All memory is contiguous; REAL is float or double.
#define EA_TOKEN_MEMBERS(M)                                                                          \
  M(q, int64_t, threads, )                                                                          \
  M(q, int64_t, in_double, )             /* whether REAL is double */                               \
  M(q, int64_t, states, ) M(q, int64_t, groups, ) /* queries of a state */                          \
  M(q, int64_t, width, ) M(q, int64_t, value_width, )                                               \
  M(q, void *, sums, )                   /* REAL (state, product, column of the value) */           \
  M(q, double *, moment, )               /* (state, product) */                                     \
  M(q, const void *, key, ) M(q, const void *, value, ) /* REAL (state, component), or NULL: none is added */ \
  M(q, const double *, factor, )         /* (state), by which what came before is multiplied; or NULL */ \
  M(q, const void *, query, ) M(q, void *, output, ) /* REAL (state, group, component) */               \
  M(q, double *, normalizer, )           /* (state, group), of a scale of 1 */

#define EA_DECLARE(format, type, name, size) type name size;
typedef struct {
  EA_MEMBERS(EA_DECLARE)
} ea_problem;
typedef struct {
  EA_TOKEN_MEMBERS(EA_DECLARE)
} ea_token;
#undef EA_DECLARE

#endif
