// What the library is asked to compute. Conventions: backends/problem.py; equations: docs/operator.md.
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

// Every member is 8 bytes wide, so that the caller can pack the struct with one format string.
typedef struct {
  int64_t threads;
  int64_t dtype;       // of query, key, value, output and their gradients
  int64_t mask_dtype;  // EA_NONE: there is no mask
  int64_t squared;     // f(z) = z^2 instead of z^2 / (1 + z^2)
  // Query i is at place p = i, or, with lower_right, i + S - L, and sees key j if and only if j <= p + right, with
  // `causal`, and j >= p - left, with `window`.
  int64_t causal, right, window, left, lower_right;
  int64_t batch, heads, kv_heads, rows, keys, width, value_width;  // B, Hq, Hkv, L, S, E, Ev
  double scale;
  const int64_t *key_lengths;  // of each batch: how many keys exist, which is S then; or NULL
  ea_tensor query, key, value, mask;
  // Contiguous. Normalizer, peak and their like are float, double for EA_FLOAT64.
  void *output, *normalizer, *peak;
  // The rest is for the backward pass.
  ea_tensor grad_output;
  const void *grad_normalizer;  // or NULL
  void *grad_query, *grad_key, *grad_value;
  void *grad_mask;       // or NULL; contiguous, of the dtype of the mask
  int64_t mask_size[4];  // of the dimensions of grad_mask: 1 where the mask is broadcast
} ea_problem;

#endif
