// SPDX-License-Identifier: Apache-2.0
// Logits of one tile of proxy_scores: kTileRows proxy rows (lanes) x kKeys keys. For ISA sources.
#pragma once

#include "core/cpu/amx_split.h"
#include "core/cpu/math.h"
#include "kv_eviction/proxy_scores.h"

TENFOLD_ISA_BEGIN
namespace {

// Register blocking: kVecs * kTileKeys accumulators + kVecs rows of q + a broadcast must fit the
// register file: 2 * 12 + 3 of 32 (AVX-512), 2 * 6 + 3 of 16 (AVX2).
constexpr int kVecs = 2;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kTileKeys = 12;
#elif defined(TENFOLD_ISA_AVX2)
constexpr int kTileKeys = 6;
#else
constexpr int kTileKeys = 4;
#endif
constexpr int kTileRows = kVecs * kWidth;

// How logits are multiplied: float32 FMAs, dot products of pairs of bf16 (by AMX where there is
// AMX), or, with AMX, float32 split in three bf16.
enum class Product { fma, dot, split };

// AMX multiplies a block of keys and rows of its own size, the others as above.
#if defined(TENFOLD_ISA_AMX)
constexpr bool kAmx = true;
constexpr int kDotKeys = kAmxBlock, kDotDepth = kAmxDepth;
#else
constexpr bool kAmx = false;
constexpr int kDotKeys = kTileKeys, kDotDepth = 2;
#endif
template <Product P>
constexpr int kKeys = P == Product::fma ? kTileKeys : kDotKeys;

inline Product product_of([[maybe_unused]] const ProxyScoresParams& p) {
  // Masks and maxima of dot products come before the scale is applied: it must keep their order.
#if defined(TENFOLD_ISA_AMX)
  if (p.dtype == Dtype::bf16 && p.scale > 0.0f) return Product::dot;
  if (p.dtype == Dtype::f32) return Product::split;
#elif defined(TENFOLD_ISA_BF16)
  if (p.dtype == Dtype::bf16 && p.scale > 0.0f && p.head_dim % 2 == 0) return Product::dot;
#endif
  return Product::fma;
}

inline int64_t round_up(int64_t x, int64_t m) {
  return (x + m - 1) / m * m;
}

// Floats of the packed q^T of a row tile: [D][kTileRows] float, [D / 2][kTileRows] pairs of bf16 or
// a split panel.
inline int64_t packed_q_size(const ProxyScoresParams& p) {
#if defined(TENFOLD_ISA_AMX)
  if (product_of(p) == Product::split) return split_panel_bytes(p.head_dim) / 4;
#endif
  return round_up(p.head_dim, kDotDepth) * kTileRows;
}

// Where the keys of one key head come from.
struct KeySource {
  const void* k;
  int64_t stride, length, depth;
  float* staged;  // [kKeys][D] float or bf16: one tile of converted, gathered or padded keys
  // Product::split: panels of the key tiles of one block, from key `first` on; bits of
  // the keys that cannot be multiplied so.
  char* panels;
  uint32_t* unsplit;
  int64_t first;
  int64_t fetch, fetch_end, fetch_step;  // keys of the next block, to fetch so many at a time
};

// Floats of `staged`: also enough for bf16 rows of round_up(d, kDotDepth).
inline int64_t staged_keys_size(int64_t d) {
  constexpr int kMost = kDotKeys > kTileKeys ? kDotKeys : kTileKeys;
  return kMost * round_up(d, 16);
}

// The rows of a tile as they are multiplied.
struct PackedRows {
  float* packed;
  const void* row[kTileRows];
  float scale;       // of all but dot products, whose logits are scaled later
  uint32_t unsplit;  // Product::split: bits of the rows that cannot be multiplied so
};

inline float to_float(const float* x) {
  return *x;
}
template <class T>
inline float to_float(const T* x) {
  float lanes[kWidth];
  store(lanes, load_n(x, 1));
  return lanes[0];
}

// q^T of one tile. Pairs: two neighbouring bf16 share a lane and the depth is padded with zeros.
// Else q is scaled here, so that the logits come out in log2 units (scaling them later would round
// the scale).
template <class T, Product P>
void pack_rows(int64_t d, PackedRows* rows) {
  rows->unsplit = 0;
  for (int r = 0; r < kTileRows; ++r) {
    const T* from = static_cast<const T*>(rows->row[r]);
    if constexpr (P == Product::dot) {
      const int64_t depth = round_up(d, kDotDepth) / 2;
      auto* to = reinterpret_cast<uint32_t*>(rows->packed) + r;
      int64_t i = 0;
      for (; i < d / 2; ++i) __builtin_memcpy(to + i * kTileRows, from + 2 * i, 4);
      for (; i < depth; ++i) to[i * kTileRows] = 0;
      if (d % 2 != 0) __builtin_memcpy(to + d / 2 * kTileRows, from + d - 1, 2);
#if defined(TENFOLD_ISA_AMX)
    } else if constexpr (P == Product::split) {
      auto* panel = reinterpret_cast<char*>(rows->packed);
      rows->unsplit |= static_cast<uint32_t>(!split_right(from, d, rows->scale, r, panel)) << r;
#endif
    } else {
      for (int64_t i = 0; i < d; ++i)
        rows->packed[i * kTileRows + r] = to_float(from + i) * rows->scale;
    }
  }
}

// Elements of one cache line. The rows of the next key tile are prefetched line by line while this
// tile is multiplied (K streams from L3 or memory; the hardware does not follow 12 rows at once),
// and the products of a line are summed in a chain of their own: shorter chains round less.
constexpr int kLine = 16;

// acc[j][v] = sum_i k_j[i] * q[i][v]: the hot loop. Rows of k are `stride` elements apart; an
// element is a float (Multiply = fma) or a pair of bf16 (Multiply = dot product). Three rows share
// a base pointer (base + 0, 1, 2 strides are addressing modes): with a pointer per row, general
// registers run out, and their reloads take the load ports that the broadcasts need.
template <class Element, class Multiply>
inline void tile_product(const Element* k, int64_t stride, const float* q, int64_t d,
                         const Multiply& multiply, VF (&acc)[kTileKeys][kVecs]) {
  constexpr int kBases = (kTileKeys + 2) / 3;
  const Element* base[kBases];
  for (int b = 0; b < kBases; ++b) base[b] = k + 3 * b * stride;
  const auto step = [&](int64_t i, VF(&part)[kTileKeys][kVecs]) __attribute__((always_inline)) {
    VF rows[kVecs];
    for (int v = 0; v < kVecs; ++v) rows[v] = load(q + i * kTileRows + v * kWidth);
#pragma GCC unroll 16
    for (int j = 0; j < kTileKeys; ++j) multiply(base[j / 3][j % 3 * stride + i], rows, part[j]);
  };
  for (int64_t begin = 0; begin < d; begin += kLine) {
    VF part[kTileKeys][kVecs];
    for (auto& key : part)
      for (auto& a : key) a = set1(0.0f);
#pragma GCC unroll 16
    for (int j = 0; j < kTileKeys; ++j)
      __builtin_prefetch(base[j / 3] + (kTileKeys + j % 3) * stride, 0, 3);
    if (const int64_t n = d - begin; n >= kLine) {
#pragma GCC unroll 4
      for (int i = 0; i < kLine; ++i) step(i, part);
    } else {
      for (int64_t i = 0; i < n; ++i) step(i, part);
    }
    for (auto& b : base) b += kLine;
    q += kLine * kTileRows;
    for (int j = 0; j < kTileKeys; ++j)
      for (int v = 0; v < kVecs; ++v) acc[j][v] = begin == 0 ? part[j][v] : acc[j][v] + part[j][v];
  }
}

inline void logits_f32(const float* k, int64_t stride, const float* q, int64_t d,
                       VF (&acc)[kTileKeys][kVecs]) {
  const auto multiply = [](float key, const VF(&rows)[kVecs], VF(&sums)[kVecs]) {
    const VF b = set1(key);
    for (int v = 0; v < kVecs; ++v) sums[v] = fma(b, rows[v], sums[v]);
  };
  tile_product(k, stride, q, d, multiply, acc);
}

#if defined(TENFOLD_ISA_BF16) && !defined(TENFOLD_ISA_AMX)
// Two neighbouring bf16 in memory that holds them one by one, at any address.
typedef uint32_t bf16_pair __attribute__((may_alias, aligned(2)));

// The same for bf16; d is a multiple of kDotDepth.
inline void logits_bf16(const bf16_t* k, int64_t stride, const float* q, int64_t d,
                        VF (&acc)[kTileKeys][kVecs]) {
  const auto multiply = [](uint32_t key, const VF(&rows)[kVecs], VF(&sums)[kVecs]) {
    const VI b = seti(key);
    for (int v = 0; v < kVecs; ++v) sums[v] = dot_bf16(sums[v], bits(rows[v]), b);
  };
  tile_product(reinterpret_cast<const bf16_pair*>(k), stride / 2, q, d / 2, multiply, acc);
}
#endif

// Keys [j0, j0 + n) as float rows, zero-padded to kTileKeys rows of round_up(d, 16).
template <class T>
void stage_keys(const T* k, int64_t stride, int n, int64_t d, float* out) {
  const int64_t pitch = round_up(d, 16);
  for (int j = 0; j < kTileKeys; ++j, out += pitch) {
    int64_t i = 0;
    if (j < n) {
      for (; i + kWidth <= d; i += kWidth) store(out + i, load(k + j * stride + i));
      if (i < d) store(out + i, load_n(k + j * stride + i, static_cast<int>(d - i)));
    } else {
      for (; i < d; ++i) out[i] = 0.0f;
    }
  }
}

#if defined(TENFOLD_ISA_BF16)
// The same as bf16 rows of `pitch` elements, zero-padded.
inline bf16_t* stage_bf16(const bf16_t* k, int64_t stride, int n, int64_t d, int64_t pitch,
                          float* memory) {
  auto* out = reinterpret_cast<bf16_t*>(memory);
  for (int j = 0; j < kDotKeys; ++j)
    for (int64_t i = 0; i < pitch; ++i)
      out[j * pitch + i] = j < n && i < d ? k[j * stride + i] : bf16_t{0};
  return out;
}

// Rows of bf16 keys from j0 on, padded if need be, and how far they are apart.
inline const bf16_t* bf16_rows(const KeySource& s, int64_t j0, int64_t* pitch) {
  const int64_t left = s.length - j0, depth = round_up(s.depth, kDotDepth);
  const bf16_t* rows = static_cast<const bf16_t*>(s.k) + j0 * s.stride;
  *pitch = s.stride;
  if (left >= kDotKeys && s.depth == depth && s.stride % 2 == 0) return rows;
  *pitch = depth;
  const int n = static_cast<int>(left < kDotKeys ? left : kDotKeys);
  return stage_bf16(rows, s.stride, n, s.depth, depth, s.staged);
}
#endif

// Logits of the keys from j0 on, in log2 units (dot products: unscaled); keys past the end give
// anything.
template <class T, Product P>
inline void tile_logits(const KeySource& s, const PackedRows& rows, int64_t j0,
                        VF (&acc)[kTileKeys][kVecs]) {
  const float* q = rows.packed;
#if defined(TENFOLD_ISA_BF16) && !defined(TENFOLD_ISA_AMX)
  if constexpr (P == Product::dot) {
    int64_t pitch;
    const bf16_t* k = bf16_rows(s, j0, &pitch);
    return logits_bf16(k, pitch, q, round_up(s.depth, kDotDepth), acc);
  }
#endif
  const int64_t left = s.length - j0;
  const int n = static_cast<int>(left < kTileKeys ? left : kTileKeys);
  const T* k = static_cast<const T*>(s.k) + j0 * s.stride;
  if constexpr (sizeof(T) == 4) {
    if (n == kTileKeys) return logits_f32(k, s.stride, q, s.depth, acc);
  }
  stage_keys(k, s.stride, n, s.depth, s.staged);
  logits_f32(s.staged, round_up(s.depth, 16), q, s.depth, acc);
}

}  // namespace
TENFOLD_ISA_END
