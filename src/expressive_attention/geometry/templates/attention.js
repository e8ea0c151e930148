// ---- attention of the kept tokens, from their queries and keys ----
function unpacked(text, Kind) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Kind(bytes.buffer);
}
function vectors(packed) {  // unpacks lazily, once
  if (!packed.whole) {
    packed.whole = unpacked(packed.bytes, packed.factors ? Int8Array : Float32Array);
    if (packed.factors) packed.scales = unpacked(packed.factors, Float32Array);
  }
  return packed;
}
function vector(packed, example, head, i) {
  const [, heads, length, dim] = packed.shape, place = (example * heads + head) * length + i;
  const start = place * dim, x = new Float64Array(dim), scale = packed.scales ? packed.scales[place] : 1;
  for (let d = 0; d < dim; d++) x[d] = packed.whole[start + d] * scale;
  return x;
}
const dot = (a, b) => { let s = 0; for (let d = 0; d < a.length; d++) s += a[d] * b[d]; return s; };
function masked(mask, Kind, example, head, i, j) {  // the mask's value at a position, with broadcasting
  if (!mask.numbers) mask.numbers = unpacked(mask.bytes, Kind);
  const [B, H, L, S] = mask.shape, row = Math.min(example, B - 1) * H + Math.min(head, H - 1);
  i = Math.min(i, L - 1); j = Math.min(j, S - 1);
  return mask.diagonals ? mask.numbers[row * (L + S - 1) + j - i + L - 1] : mask.numbers[(row * L + i) * S + j];
}
// z, cos, attention and lengths of all kept pairs, or of those of the first `most` tokens.
function scored(layer, example, head, most = Infinity) {
  const q = vectors(layer.query), k = vectors(layer.key), group = q.shape[1] / k.shape[1];
  const rows = Math.min(most, q.shape[2]), keys = Math.min(most, k.shape[2]), ks = [], lengths = [];
  for (let j = 0; j < keys; j++) { ks.push(vector(k, example, Math.floor(head / group), j)); lengths.push(Math.sqrt(dot(ks[j], ks[j]))); }
  const z = [], cos = [], a = [];
  for (let i = 0; i < rows; i++) {
    const x = vector(q, example, head, i), size = Math.sqrt(dot(x, x));
    const zi = [], ci = [], logs = [];
    for (let j = 0; j < keys; j++) {
      const product = dot(x, ks[j]), score = layer.scale * product;
      zi.push(score); ci.push(product / Math.max(size * lengths[j], 1e-30));
      const seen = !layer.keep || masked(layer.keep, Uint8Array, example, head, i, j);
      const bias = layer.bias ? masked(layer.bias, Float32Array, example, head, i, j) : 0;
      logs.push(!seen ? -Infinity : layer.form === "softmax" ? score + bias : bias);
    }
    const peak = Math.max(...logs);
    const w = logs.map((log, j) => {
      if (peak === -Infinity) return 0;
      const s = zi[j] * zi[j], f = layer.form === "softmax" ? 1 : layer.form === "squared" ? s : s / (1 + s);
      return Math.exp(log - peak) * f;
    });
    const total = w.reduce((x, y) => x + y, 0) || 1;
    z.push(zi); cos.push(ci); a.push(w.map(x => x / total));
  }
  return {z, cos, a, lengths};
}
