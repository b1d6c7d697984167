// SPDX-License-Identifier: Apache-2.0
// Row movement and key re-rotation of kv_gather / kv_compact_.
#include "core/cpu/math.h"
#include "kv_eviction/kv_gather.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kVecBytes = kWidth * 4;
// Rows ahead that are prefetched, into L2: L1 has too few miss buffers for as many lines as hide
// the latency (27 MB of 256-byte rows: 2.0 ms with L1 prefetches at any distance, 1.35 ms with
// these). Far ahead costs nothing; 32 rows are too near for a large last-level cache (10 % slower).
constexpr int64_t kAhead = 128;

// Ascending copy of `bytes` bytes; from >= to where they overlap, so it is also a move down.
template <bool kStream>
inline void copy_up(char* to, const char* from, int64_t bytes) {
  const auto put = [](char* at, VF x) {
    if constexpr (kStream) {
      stream(reinterpret_cast<float*>(at), x);
    } else {
      store(reinterpret_cast<float*>(at), x);
    }
  };
  const auto get = [](const char* at) { return load(reinterpret_cast<const float*>(at)); };
  int64_t i = 0;
  for (; i + 4 * kVecBytes <= bytes; i += 4 * kVecBytes) {
    const VF a = get(from + i), b = get(from + i + kVecBytes);
    const VF c = get(from + i + 2 * kVecBytes), d = get(from + i + 3 * kVecBytes);
    put(to + i, a);
    put(to + i + kVecBytes, b);
    put(to + i + 2 * kVecBytes, c);
    put(to + i + 3 * kVecBytes, d);
  }
  for (; i + kVecBytes <= bytes; i += kVecBytes) put(to + i, get(from + i));
  for (; i + 2 <= bytes; i += 2)
    *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
}

// Rows of kBytes (0: m.row_bytes) one after another: a constant size leaves no inner loop.
template <bool kStream, int64_t kBytes>
void move(const KvMove& m, const int64_t* idx, int64_t n) {
  const int64_t bytes = kBytes ? kBytes : m.row_bytes;
  const auto fetch = [&](int64_t row) {
    const char* at = m.from + idx[row] * m.from_stride;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
  };
  for (int64_t c = 0; c < n && c < kAhead; ++c) fetch(c);
  for (int64_t c = 0; c < n; ++c) {
    if (c + kAhead < n) fetch(c + kAhead);
    const char* from = m.from + idx[c] * m.from_stride;
    char* to = m.to + c * m.to_stride;
    if (from != to) copy_up<kStream>(to, from, bytes);
  }
  if constexpr (kStream) stream_fence();
}

template <bool kStream>
void move_by_size(const KvMove& m, const int64_t* idx, int64_t n) {
  switch (m.row_bytes) {
    case 128: return move<kStream, 128>(m, idx, n);
    case 256: return move<kStream, 256>(m, idx, n);
    case 512: return move<kStream, 512>(m, idx, n);
    default: return move<kStream, 0>(m, idx, n);
  }
}

template <class T>
void rotate(T* row, const RotaryTable& t, int64_t shift) {
  const int64_t size = shift < 0 ? -shift : shift;
  const float* coarse = t.coarse + size / RotaryTable::kFine * 2 * t.half;
  const float* fine = t.fine + size % RotaryTable::kFine * 2 * t.half;
  const VF sign = set1(shift < 0 ? -1.0f : 1.0f);
  for (int64_t i = 0; i < t.half; i += kWidth) {
    const int n = static_cast<int>(t.half - i < kWidth ? t.half - i : kWidth);
    const VF ca = load_n(coarse + i, n), sa = load_n(coarse + t.half + i, n);
    const VF cb = load_n(fine + i, n), sb = load_n(fine + t.half + i, n);
    const VF c = ca * cb - sa * sb, s = (sa * cb + ca * sb) * sign;
    const VF x1 = load_n(row + i, n), x2 = load_n(row + t.half + i, n);
    store_n(row + i, x1 * c - x2 * s, n);
    store_n(row + t.half + i, x2 * c + x1 * s, n);
  }
}

}  // namespace

void move_rows(const KvMove& m, const int64_t* idx, int64_t n) {
  if (m.stream) {
    move_by_size<true>(m, idx, n);
  } else {
    move_by_size<false>(m, idx, n);
  }
}

IndexFacts index_facts(const int64_t* idx, int64_t n) {
  int64_t lowest = n > 0 ? idx[0] : 0, highest = lowest;
  for (int64_t i = 0; i < n; ++i) {
    lowest = idx[i] < lowest ? idx[i] : lowest;
    highest = idx[i] > highest ? idx[i] : highest;
  }
  int falls = 0;
  for (int64_t i = 1; i < n; ++i) falls |= idx[i] <= idx[i - 1];
  return {lowest, highest, falls == 0};
}

void rotate_row(void* row, Dtype dtype, const RotaryTable& table, int64_t shift) {
  if (dtype == Dtype::f32) rotate(static_cast<float*>(row), table, shift);
  if (dtype == Dtype::bf16) rotate(static_cast<bf16_t*>(row), table, shift);
  if (dtype == Dtype::f16) rotate(static_cast<fp16_t*>(row), table, shift);
}

TENFOLD_ISA_END
