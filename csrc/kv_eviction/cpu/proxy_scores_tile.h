// Logits of one tile of proxy_scores: kTileRows proxy rows (lanes) x kKeys keys. For ISA sources.
#pragma once

#include "core/cpu/amx.h"
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
// bf16 dot products: AMX keeps its sums in four tile registers, 2 x 16 keys
// of 2 x 16 rows (fewer chains would wait for each other), the others as above.
#if defined(TENFOLD_ISA_AMX)
constexpr int kDotKeys = 2 * kAmxRows, kDotDepth = kAmxDepth;
#else
constexpr int kDotKeys = kTileKeys, kDotDepth = 2;
#endif
constexpr int kMaxKeys = kDotKeys > kTileKeys ? kDotKeys : kTileKeys;
template <bool kDot>
constexpr int kKeys = kDot ? kDotKeys : kTileKeys;

// Packed operands of a tile.
struct TileScratch {
  float* q;     // q^T: [D][kTileRows] float, or [D / 2][kTileRows] pairs of bf16
  float* keys;  // [kKeys][D] float or bf16: converted, gathered or padded keys
};

inline int64_t round_up(int64_t x, int64_t m) {
  return (x + m - 1) / m * m;
}

// Floats of the two arrays of TileScratch.
inline int64_t packed_q_size(int64_t d) {
  return round_up(d, kDotDepth) * kTileRows;
}
inline int64_t staged_keys_size(int64_t d) {
  return kMaxKeys * round_up(d, 16);  // as bf16 also enough for rows of round_up(d, kDotDepth)
}

inline bool use_dot(const ProxyScoresParams& p) {
  // Masks and maxima come before the scale is applied: it must keep their order.
#if defined(TENFOLD_ISA_AMX)
  return p.dtype == Dtype::bf16 && p.scale > 0.0f;
#elif defined(TENFOLD_ISA_BF16)
  return p.dtype == Dtype::bf16 && p.scale > 0.0f && p.head_dim % 2 == 0;
#else
  (void)p;
  return false;
#endif
}

inline float to_float(const float* x) {
  return *x;
}
template <class T>
inline float to_float(const T* x) {
  float lanes[kWidth];
  store(lanes, load_n(x, 1));
  return lanes[0];
}

// q^T of one tile. With `pairs`, two neighbouring bf16 share a lane and the depth is padded with
// zeros, else q is scaled here, so that the logits come out in log2 units (scaling them later would
// round the scale).
template <class T>
void pack_q(const T* const* rows, int64_t d, bool pairs, float scale, float* out) {
  for (int r = 0; r < kTileRows; ++r) {
    if (pairs) {
      auto* to = reinterpret_cast<uint16_t*>(out) + 2 * r;
      const auto* from = reinterpret_cast<const uint16_t*>(rows[r]);
      const int64_t depth = round_up(d, kDotDepth);
      int64_t i = 0;
      for (; i + 2 <= d; i += 2, to += 2 * kTileRows) to[0] = from[i], to[1] = from[i + 1];
      for (; i < depth; i += 2, to += 2 * kTileRows) to[0] = i < d ? from[i] : 0, to[1] = 0;
    } else {
      for (int64_t i = 0; i < d; ++i) out[i * kTileRows + r] = to_float(rows[r] + i) * scale;
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

// The same for bf16; d is a multiple of kDotDepth.
#if defined(TENFOLD_ISA_AMX)
inline void logits_bf16(const bf16_t* k, int64_t stride, const float* q, int64_t d,
                        VF (&acc)[kDotKeys][kVecs]) {
  static_assert(kVecs == 2 && kWidth == kAmxRows && kDotKeys == 2 * kAmxRows);
  constexpr int64_t kPitch = kTileRows * 4, kRow = sizeof acc[0];  // bytes: row of pairs, of sums
  const auto* pairs = reinterpret_cast<const char*>(q);
  const bf16_t* k1 = k + kAmxRows * stride;
  amx_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < d; i += kAmxDepth, pairs += kAmxRows * kPitch) {
    _tile_loadd(4, k + i, stride * 2);
    _tile_loadd(6, pairs, kPitch);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, pairs + 64, kPitch);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, k1 + i, stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, &acc[0][0], kRow);
  _tile_stored(1, &acc[0][1], kRow);
  _tile_stored(2, &acc[kAmxRows][0], kRow);
  _tile_stored(3, &acc[kAmxRows][1], kRow);
}
#elif defined(TENFOLD_ISA_BF16)
// Two neighbouring bf16 in memory that holds them one by one, at any address.
typedef uint32_t bf16_pair __attribute__((may_alias, aligned(2)));

inline void logits_bf16(const bf16_t* k, int64_t stride, const float* q, int64_t d,
                        VF (&acc)[kDotKeys][kVecs]) {
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
#endif

// Logits of the keys from j0 on, in log2 units (kDot: unscaled); keys past the end give anything.
template <class T, bool kDot>
inline void tile_logits(const ProxyScoresParams& p, const T* k, int64_t j0, const TileScratch& s,
                        VF (&acc)[kKeys<kDot>][kVecs]) {
  const int64_t stride = p.k_stride[2], d = p.head_dim;
  const int64_t left = p.length - j0;
  const int n = static_cast<int>(left < kKeys<kDot> ? left : kKeys<kDot>);
  const T* rows = k + j0 * stride;
  if constexpr (kDot) {
#if defined(TENFOLD_ISA_BF16)
    const int64_t depth = round_up(d, kDotDepth);
    if (n == kDotKeys && d == depth && stride % 2 == 0) {
      logits_bf16(rows, stride, s.q, d, acc);
    } else {
      logits_bf16(stage_bf16(rows, stride, n, d, depth, s.keys), depth, s.q, depth, acc);
    }
#endif
  } else {
    if constexpr (sizeof(T) == 4) {
      if (n == kTileKeys) return logits_f32(rows, stride, s.q, d, acc);
    }
    stage_keys(rows, stride, n, d, s.keys);
    logits_f32(s.keys, round_up(d, 16), s.q, d, acc);
  }
}

#if defined(TENFOLD_ISA_AMX)
inline void fetch_keys(const ProxyScoresParams& p, const bf16_t* k, int64_t j0) {
  if (j0 + kDotKeys > p.length) return;
  for (int j = 0; j < kDotKeys; ++j)
    for (int64_t i = 0; i < p.head_dim; i += 2 * kLine)
      __builtin_prefetch(k + (j0 + j) * p.k_stride[2] + i, 0, 3);
}
#endif

// use(j0, logits) for every key tile of [first, last). AMX sums come through memory: the next tile
// is multiplied before this one is used, so that no load waits for a store.
template <class T, bool kDot, class Use>
inline void for_tiles(const ProxyScoresParams& p, const T* k, int64_t first, int64_t last,
                      const TileScratch& s, const Use& use) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (kDot) {
    if (first >= last) return;
    alignas(64) VF acc[2][kDotKeys][kVecs];
    int now = 0;
    tile_logits<T, kDot>(p, k, first, s, acc[0]);
    for (int64_t j0 = first; j0 < last; j0 += kDotKeys, now ^= 1) {
      fetch_keys(p, k, j0 + 2 * kDotKeys);
      if (j0 + kDotKeys < last) tile_logits<T, kDot>(p, k, j0 + kDotKeys, s, acc[now ^ 1]);
      use(j0, acc[now]);
    }
    return;
  }
#endif
  for (int64_t j0 = first; j0 < last; j0 += kKeys<kDot>) {
    VF acc[kKeys<kDot>][kVecs];
    tile_logits<T, kDot>(p, k, j0, s, acc);
    use(j0, acc);
  }
}

}  // namespace
TENFOLD_ISA_END
