// Runs every build of the kernels on several threads, forward and backward: under ThreadSanitizer, or to count
// instructions. run_kernels THREADS [BUILD [B H L E CAUSAL REPEATS]]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "problem.h"

const char *ea_build_name(int i);
void *ea_forward(const char *name), *ea_backward(const char *name);
void ea_set_openmp(void *function);

typedef int kernel(const ea_problem *);

static float *drawn(int64_t count) {
  static uint32_t state = 1;
  float *x = malloc((size_t)(count ? count : 1) * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    state = state * 1664525 + 1013904223;
    x[i] = (float)(state >> 8) / 0x1p23f - 1;
  }
  return x;
}

static ea_tensor tensor(const float *data, int64_t heads, int64_t rows, int64_t columns) {
  return (ea_tensor){data, {heads * rows * columns, rows * columns, columns, 1}};
}

// A bias (rows, keys) for all heads, with its gradient, where `biased`. With `packed`, four sequences share rows and keys.
static void run(const char *build, int64_t threads, int64_t b, int64_t heads, int64_t kv_heads, int64_t rows,
                int64_t keys, int64_t width, int causal, int biased, int packed, int repeats) {
  int64_t queries = b * heads * rows, all_keys = b * kv_heads * keys;
  float *numbers[13] = {drawn(queries * width), drawn(all_keys * width), drawn(all_keys * width), drawn(rows * keys),
                        drawn(queries * width), drawn(queries), drawn(queries), drawn(queries * width),
                        drawn(queries * width), drawn(all_keys * width), drawn(all_keys * width), drawn(rows * keys),
                        drawn(queries)};
  ea_problem p = {.threads = threads,
                  .dtype = EA_FLOAT32,
                  .mask_dtype = biased ? EA_FLOAT32 : EA_NONE,
                  .causal = causal,
                  .batch = b,
                  .heads = heads,
                  .kv_heads = kv_heads,
                  .rows = rows,
                  .keys = keys,
                  .width = width,
                  .value_width = width,
                  .scale = 1 / sqrt((double)width),
                  .keep = 1,
                  .query = tensor(numbers[0], heads, rows, width),
                  .key = tensor(numbers[1], kv_heads, keys, width),
                  .value = tensor(numbers[2], kv_heads, keys, width),
                  .output = numbers[4],
                  .normalizer = numbers[5],
                  .bias_max = numbers[6],
                  .grad_output = tensor(numbers[7], heads, rows, width),
                  .grad_normalizer = numbers[12],
                  .grad_query = numbers[8],
                  .grad_key = numbers[9],
                  .grad_value = numbers[10]};
  if (biased) {
    p.mask = (ea_tensor){numbers[3], {0, 0, keys, 1}};
    p.grad_mask = numbers[11];
    memcpy(p.mask_size, (int64_t[]){1, 1, rows, keys}, sizeof p.mask_size);
  }
  int64_t starts[] = {0, rows / 3, rows / 2, rows / 2, rows - 1}, key_starts[] = {0, keys / 2, keys / 2, keys / 2 + 1, keys - 2};
  if (packed) p.sequences = 4, p.query_starts = starts, p.key_starts = key_starts;
  for (int i = 0; i < repeats; i++) {
    if (((kernel *)ea_forward(build))(&p) || ((kernel *)ea_backward(build))(&p)) abort();
  }
  for (int64_t i = 0; i < queries * width; i++) {
    if (!isfinite(numbers[4][i]) || !isfinite(numbers[8][i])) abort();
  }
  for (int i = 0; i < 13; i++) free(numbers[i]);
}

int main(int count, char **arguments) {
  int64_t threads = count > 1 ? atoll(arguments[1]) : 4, n[6];
  ea_set_openmp(NULL);
  if (count > 8) {
    for (int i = 0; i < 6; i++) n[i] = atoll(arguments[i + 3]);
    run(arguments[2], threads, n[0], n[1], n[1], n[2], n[2], n[3], (int)n[4], 0, 0, (int)n[5]);
    return 0;
  }
  for (int i = 0; ea_build_name(i); i++) {
    const char *build = ea_build_name(i);
    if (count > 2 && strcmp(arguments[2], build)) continue;
    for (int causal = 0; causal < 2; causal++) {
      run(build, threads, 2, 4, 2, 300, 300, 33, causal, 0, 0, 2);  // several heads
      run(build, threads, 1, 1, 1, 500, 900, 32, causal, 0, 0, 2);  // one head, whose keys are dealt out
      run(build, threads, 2, 4, 4, 130, 600, 32, causal, 1, 0, 2);  // a bias whose gradient all heads share
      run(build, threads, 1, 2, 1, 1, 9000, 64, causal, 0, 0, 2);   // decoding, over parts of the keys
      run(build, threads, 1, 4, 2, 700, 900, 33, causal, 0, 1, 2);  // packed sequences, one of them without keys
    }
    printf("%s: done\n", build);
  }
  return 0;
}
