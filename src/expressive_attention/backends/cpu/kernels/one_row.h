// Rows one by one, from the keys that they see alone. Blocks multiply what a hidden key holds by 0, and make NaN of what
// is not finite; in float, sums may leave its range. Rows that lost something by it are computed again here.

typedef struct {
  REAL *query, *panel, *weights, *numbers, *output;
  double *sums;
  uint8_t *seen;
  uint64_t *kept;
  mask_room mask;
} one_row_room;

static int64_t lay_out_one_row(const ea_problem *p, char *memory, one_row_room *room) {
  arena a = {memory, 0};
  *room = (one_row_room){
      .query = take(&a, p->width * sizeof(REAL)),
      .panel = take(&a, p->width * PANEL * sizeof(REAL)),
      .weights = take(&a, PANEL * sizeof(REAL)),
      .numbers = take(&a, most(PANEL, most(2 * p->width, p->value_width)) * sizeof(REAL)),
      .output = take(&a, p->value_width * sizeof(REAL)),
      .sums = take(&a, p->value_width * sizeof(double)),
      .seen = take(&a, PANEL),
      .kept = take(&a, kept_words(KEPT_KEYS - 1, PANEL) * (int64_t)sizeof(uint64_t)),
      .mask = take_mask_room(p, &a, PANEL, PANEL),
  };
  return a.used;
}

// Infinite numbers of a query or key count as very large ones, with or without others of another sign. In float, the row is
// in need of double.
static int enlarge_infinite(REAL *numbers, int64_t width) {
  int found = 0;
  for (int64_t e = 0; REAL_IS_DOUBLE && e < width; e++) {
    if (isinf(numbers[e])) numbers[e] = numbers[e] < 0 ? -0x1p100 : 0x1p100, found = 1;
  }
  return found;
}

// The weights of n keys from `key`, masked; return whether the row sees one of them. In each, numbers are added in the
// order of the tiles: the backward pass compares weights with their sum. *is_infinite: whether a key is, is added to it.
static int one_row_weights(const ea_problem *p, const row_span *row, one_row_room *room, int64_t kv_head, int64_t key,
                           int64_t n, int *is_infinite) {
  int any = 0;
  read_seen(p, row, key, n, room->seen);
  for (int64_t j = 0; j < n; j++) any |= room->seen[j];
  if (!any) return 0;
  memset(room->panel, 0, (size_t)(p->width * PANEL) * sizeof(REAL));
  for (int64_t j = 0; j < n; j++) {
    if (!room->seen[j]) continue;
    read_row(room->numbers, row_of(&p->key, p->dtype, row->batch, kv_head, key + j), p->dtype, p->key.stride[3], p->width);
    *is_infinite |= enlarge_infinite(room->numbers, p->width);
    for (int64_t e = 0; e < p->width; e++) room->panel[e * PANEL + j] = room->numbers[e];
  }
  weights_target to = {.squared = (int)p->squared, .scale2 = 1, .inverse = 1, .weights = room->weights, .ld = PANEL};
  weights(1, NR, p->width, room->query, p->width, room->panel, PANEL, &to, 0, 0);
  if (has_bias(p)) {
    const REAL *factor = read_bias(p, row, key, n, &room->mask);
    for (int64_t j = 0; j < n; j++) room->weights[j] *= room->seen[j] ? factor[j] : 0;
  }
  return 1;
}

// Row `index` of a key head; its normalizer goes to *normalizer.
static int one_row(const ea_problem *p, int64_t b, int64_t kv_head, int64_t index, REAL *normalizer) {
  one_row_room room;
  void *memory = allocate(lay_out_one_row(p, NULL, &room));
  if (!memory) return EA_NO_MEMORY;
  lay_out_one_row(p, memory, &room);
  row_span row;
  place_rows(p, b, kv_head, index, 1, &row, room.numbers, PANEL);
  pack_places(room.query, p->width, &p->query, p->dtype, p, &row, 1, p->width, (REAL)p->scale);
  int is_infinite = enlarge_infinite(room.query, p->width);
  clear(room.sums, p->value_width * (int64_t)sizeof(double));
  double total = 0;
  for (int64_t key = row.start; key < row.limit; key += PANEL) {
    int64_t n = least(PANEL, row.limit - key);
    if (!one_row_weights(p, &row, &room, kv_head, key, n, &is_infinite)) continue;
    if (p->dropout_seeds) read_kept(p, &row, 1, key, n, room.kept, 0);
    for (int64_t j = 0; j < n; j++) {
      if (!room.seen[j]) continue;
      double w = room.weights[j], kept = p->dropout_seeds && !is_kept(room.kept, key, j) ? 0 : w;
      read_row(room.numbers, row_of(&p->value, p->dtype, b, kv_head, key + j), p->dtype, p->value.stride[3], p->value_width);
      for (int64_t c = 0; c < p->value_width; c++) room.sums[c] += kept * room.numbers[c];
      total += w;
    }
  }
  for (int64_t c = 0; c < p->value_width; c++) room.output[c] = (REAL)(room.sums[c] / ((total == 0 ? 1 : total) * p->keep));
  if (p->squared && is_infinite && total > 0) total = INFINITY;
  write_results(p, &row, room.output, (REAL)total);
  *normalizer = (REAL)total;
  release(memory);
  return EA_OK;
}
