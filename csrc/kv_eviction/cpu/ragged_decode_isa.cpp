// Inner kernel of decode attention: all query rows of a key head against one chunk of its keys.
// Blocks of kDecodeKeyBlock keys: logits (4 keys x 4 rows in registers, lanes along D), running
// softmax, then values (4 rows x 4 vectors in registers, lanes along DV).
#include "core/cpu/math.h"
#include "kv_eviction/ragged_decode.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kRows = 4, kKeys = 4;
constexpr int64_t kAheadKeys = 2 * kDecodeKeyBlock;
constexpr float kNothing = -1e30f;

// logits[r][j] of up to 4 rows and 4 keys; missing ones repeat the last. Loops over rows and keys
// have constant bounds: the accumulators must not be indexed at run time, or they live on the
// stack.
template <class T>
void logits_4x4(const DecodeChunk& c, const T* k, int64_t r0, int64_t j0, int64_t num_keys,
                float* logits) {
  const float* q[kRows];
  const T* key[kKeys];
  const int64_t pitch = decode_pitch(c.head_dim);
  for (int r = 0; r < kRows; ++r) q[r] = c.q + (r0 + r < c.rows ? r0 + r : c.rows - 1) * pitch;
  for (int j = 0; j < kKeys; ++j)
    key[j] = k + (j0 + j < num_keys ? j0 + j : num_keys - 1) * c.k_stride;
  VF acc[kRows][kKeys];
  for (auto& row : acc)
    for (auto& a : row) a = set1(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= c.head_dim; i += kWidth) {
    VF x[kKeys];
    for (int j = 0; j < kKeys; ++j) x[j] = load(key[j] + i);
    for (int r = 0; r < kRows; ++r) {
      const VF y = load(q[r] + i);
      for (int j = 0; j < kKeys; ++j) acc[r][j] = fma(x[j], y, acc[r][j]);
    }
  }
  if (i < c.head_dim) {
    VF x[kKeys];
    for (int j = 0; j < kKeys; ++j) x[j] = load_n(key[j] + i, static_cast<int>(c.head_dim - i));
    for (int r = 0; r < kRows; ++r) {
      const VF y = load(q[r] + i);  // zero padded
      for (int j = 0; j < kKeys; ++j) acc[r][j] = fma(x[j], y, acc[r][j]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    if (r0 + r < c.rows)
      hsum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], logits + (r0 + r) * kDecodeKeyBlock + j0);
}

// Turns a row of logits into weights relative to the running maximum; rescales what was summed.
void softmax_row(const DecodeChunk& c, int64_t r, int64_t visible, float* logits) {
  const int64_t n = visible < 0 ? 0 : visible < kDecodeKeyBlock ? visible : kDecodeKeyBlock;
  const VF hidden = from_bits(seti(0xFF800000u));
  VF top = set1(c.max[r]);
  for (int64_t j = 0; j < kDecodeKeyBlock; j += kWidth) {
    VF x = load(logits + j);
    if (j + kWidth > n) {
      const VM seen = lt(seti(static_cast<uint32_t>(j)) + iota(), seti(static_cast<uint32_t>(n)));
      x = select(seen, x, hidden);
      store(logits + j, x);
    }
    top = vmax(top, x);
  }
  const float old = c.max[r], now = hmax(top) > old ? hmax(top) : old;
  VF sum = set1(0.0f);
  for (int64_t j = 0; j < kDecodeKeyBlock; j += kWidth) {
    const VF e = exp2(load(logits + j) - set1(now));
    store(logits + j, e);
    sum = sum + e;
  }
  if (now != old) {
    float factor[kWidth];
    store(factor, exp2(set1(old - now)));
    c.sum[r] *= factor[0];
    float* out = c.out + r * decode_pitch(c.value_dim);
    for (int64_t i = 0; i < decode_pitch(c.value_dim); i += kWidth)
      store(out + i, load(out + i) * set1(factor[0]));
    c.max[r] = now;
  }
  c.sum[r] += hsum(sum);
}

// out[r0 .. r0+4)[i0 .. i0 + 4 vectors) += weights * v over the block's keys; kPart: the last
// vector is not whole.
template <class T, int kVectors, bool kPart>
void values_block(const DecodeChunk& c, const T* v, int64_t r0, int64_t i0, int64_t num_keys,
                  const float* weights) {
  const int64_t pitch = decode_pitch(c.value_dim);
  const int last = static_cast<int>(c.value_dim - i0 - (kVectors - 1) * kWidth);
  float* out[kRows];
  const float* w[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = r0 + r < c.rows ? r0 + r : c.rows - 1;
    out[r] = c.out + row * pitch + i0;
    w[r] = weights + row * kDecodeKeyBlock;
  }
  VF acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int x = 0; x < kVectors; ++x) acc[r][x] = load(out[r] + x * kWidth);
  for (int64_t j = 0; j < num_keys; ++j) {
    const T* row = v + j * c.v_stride + i0;
    VF value[kVectors];
    for (int x = 0; x < kVectors; ++x)
      value[x] =
          kPart && x == kVectors - 1 ? load_n(row + x * kWidth, last) : load(row + x * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const VF weight = set1(w[r][j]);
      for (int x = 0; x < kVectors; ++x) acc[r][x] = fma(weight, value[x], acc[r][x]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    if (r0 + r < c.rows)
      for (int x = 0; x < kVectors; ++x) store(out[r] + x * kWidth, acc[r][x]);
}

// The same for one key that not every row sees: whatever it holds must not reach the others.
template <class T>
void value_of_some(const DecodeChunk& c, const T* row, int64_t key, int64_t j,
                   const float* weights) {
  const int64_t pitch = decode_pitch(c.value_dim);
  for (int64_t r = 0; r < c.rows; ++r) {
    if (key >= c.visible[r]) continue;
    const VF weight = set1(weights[r * kDecodeKeyBlock + j]);
    float* out = c.out + r * pitch;
    for (int64_t i = 0; i < c.value_dim; i += kWidth) {
      const int n = static_cast<int>(c.value_dim - i < kWidth ? c.value_dim - i : kWidth);
      store_n(out + i, fma(weight, load_n(row + i, n), load_n(out + i, n)), n);
    }
  }
}

// The hardware follows neither k nor v: they take turns, a page at a time. Rows of the block after
// the next are fetched into L2, a few at a time.
inline void fetch_rows(const char* from, int64_t stride, int64_t bytes, int64_t num_rows) {
  for (int64_t j = 0; j < num_rows; ++j)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + j * stride + at, 0, 2);
}

template <class T>
void run(const DecodeChunk& c) {
  constexpr int kVectors = kWidth == 4 ? 1 : kWidth == 8 ? 2 : 4;
  const int64_t width = decode_pitch(c.value_dim);
  for (int64_t r = 0; r < c.rows; ++r) c.max[r] = kNothing, c.sum[r] = 0.0f;
  for (int64_t i = 0; i < c.rows * width; ++i) c.out[i] = 0.0f;
  int64_t seen_by_all = c.num_keys;
  for (int64_t r = 0; r < c.rows; ++r)
    seen_by_all = c.visible[r] < seen_by_all ? c.visible[r] : seen_by_all;
  for (int64_t j0 = 0; j0 < c.num_keys; j0 += kDecodeKeyBlock) {
    const int64_t n = c.num_keys - j0 < kDecodeKeyBlock ? c.num_keys - j0 : kDecodeKeyBlock;
    const T* k = static_cast<const T*>(c.k) + j0 * c.k_stride;
    const T* v = static_cast<const T*>(c.v) + j0 * c.v_stride;
    for (int64_t j = 0; j < n; j += kKeys) {
      const int64_t ahead = j + kAheadKeys, left = c.num_keys - j0 - ahead;
      const int64_t rows = left < 0 ? 0 : left < kKeys ? left : kKeys;
      fetch_rows(reinterpret_cast<const char*>(k + ahead * c.k_stride), c.k_stride * sizeof(T),
                 c.head_dim * sizeof(T), rows);
      fetch_rows(reinterpret_cast<const char*>(v + ahead * c.v_stride), c.v_stride * sizeof(T),
                 c.value_dim * sizeof(T), rows);
      for (int64_t r = 0; r < c.rows; r += kRows) logits_4x4(c, k, r, j, n, c.scratch);
    }
    for (int64_t r = 0; r < c.rows; ++r)
      softmax_row(c, r, c.visible[r] - j0 < n ? c.visible[r] - j0 : n,
                  c.scratch + r * kDecodeKeyBlock);
    const int64_t by_all = seen_by_all - j0 < 0 ? 0 : seen_by_all - j0 < n ? seen_by_all - j0 : n;
    for (int64_t r = 0; r < c.rows; r += kRows) {
      int64_t i = 0;
      for (; i + kVectors * kWidth <= c.value_dim; i += kVectors * kWidth)
        values_block<T, kVectors, false>(c, v, r, i, by_all, c.scratch);
      for (; i + kWidth <= c.value_dim; i += kWidth)
        values_block<T, 1, false>(c, v, r, i, by_all, c.scratch);
      if (i < c.value_dim) values_block<T, 1, true>(c, v, r, i, by_all, c.scratch);
    }
    for (int64_t j = by_all; j < n; ++j) value_of_some(c, v + j * c.v_stride, j0 + j, j, c.scratch);
  }
}

}  // namespace

void decode_chunk(const DecodeChunk& c) {
  if (c.dtype == Dtype::f32) return run<float>(c);
  if (c.dtype == Dtype::bf16) return run<bf16_t>(c);
  run<fp16_t>(c);
}

TENFOLD_ISA_END
