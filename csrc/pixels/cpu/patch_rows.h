// SPDX-License-Identifier: Apache-2.0
// A patch at a time, in the first cache: its values brought together in their order, sums of them,
// and what becomes of them. For ISA sources only.
#pragma once

#include "core/cpu/vec.h"
#include "pixels/cpu/patch_kernels.h"

namespace tenfold::TENFOLD_ISA {
namespace {

// -- moving ------------------------------------------------------------------------------------

using V16 = uint8_t __attribute__((vector_size(16)));

inline V16 load16(const uint8_t* p) {
  V16 x;
  __builtin_memcpy(&x, p, 16);
  return x;
}
inline void store16(uint8_t* p, V16 x) {
  __builtin_memcpy(p, &x, 16);
}

// Short runs of any length: a call of memcpy would cost more than they do.
inline void copy_run(char* to, const char* from, int64_t bytes) {
  if (bytes >= 16) {
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16) __builtin_memcpy(to + i, from + i, 16);
    if (i < bytes) __builtin_memcpy(to + bytes - 16, from + bytes - 16, 16);
  } else if (bytes >= 8) {
    __builtin_memcpy(to, from, 8);
    __builtin_memcpy(to + bytes - 8, from + bytes - 8, 8);
  } else {
    for (int64_t i = 0; i < bytes; ++i) to[i] = from[i];
  }
}

// to = a0 b0 c0 a1 b1 c1 ...
template <class E>
inline void interleave3(const E* a, const E* b, const E* c, int64_t n, E* to) {
  int64_t i = 0;
  if constexpr (sizeof(E) == 1) {
    for (; i + 16 <= n; i += 16) {
      const V16 x = load16(a + i), y = load16(b + i), z = load16(c + i);
      const V16 p =
          __builtin_shuffle(x, y, V16{0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5});
      const V16 q =
          __builtin_shuffle(x, y, V16{21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26});
      const V16 r =
          __builtin_shuffle(x, y, V16{0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0});
      store16(to + 3 * i, __builtin_shuffle(
                              p, z, V16{0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15}));
      store16(
          to + 3 * i + 16,
          __builtin_shuffle(q, z, V16{0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15}));
      store16(
          to + 3 * i + 32,
          __builtin_shuffle(r, z, V16{26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31}));
    }
  }
  for (; i < n; ++i) to[3 * i] = a[i], to[3 * i + 1] = b[i], to[3 * i + 2] = c[i];
}

template <class E>
inline void deinterleave3(const E* from, int64_t n, E* a, E* b, E* c) {
  int64_t i = 0;
  if constexpr (sizeof(E) == 1) {
    for (; i + 16 <= n; i += 16) {
      const V16 x = load16(from + 3 * i), y = load16(from + 3 * i + 16),
                z = load16(from + 3 * i + 32);
      const V16 p =
          __builtin_shuffle(x, y, V16{0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0});
      const V16 q =
          __builtin_shuffle(x, y, V16{1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0});
      const V16 r =
          __builtin_shuffle(x, y, V16{2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0});
      store16(a + i,
              __builtin_shuffle(p, z, V16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29}));
      store16(b + i,
              __builtin_shuffle(q, z, V16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30}));
      store16(c + i,
              __builtin_shuffle(r, z, V16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31}));
    }
  }
  for (; i < n; ++i) a[i] = from[3 * i], b[i] = from[3 * i + 1], c[i] = from[3 * i + 2];
}

// Rows of an image are far apart, and a patch reads a line or two of each: what later ones read.
constexpr int64_t kAheadInRow = 192;  // bytes
inline void fetch_ahead(const void* row) {
  __builtin_prefetch(static_cast<const char*>(row) + kAheadInRow);
}

// How a patch's values lie in its image.
enum class Order { runs, planes, pixels, any };

inline Order order_of(const PatchBox& b) {
  if (b.stride[2] == 1) return Order::runs;
  if (b.size[2] == 3 && b.stride[1] == 1) return Order::planes;  // rcc of a planar image
  if (b.size[0] == 3 && b.stride[0] == 1 && b.stride[2] == 3) return Order::pixels;  // crc of HWC
  return Order::any;
}

// kGather: patch = what the image holds at `at`; else back.
template <bool kGather, class E, class Image>
inline void move_patch(Image* at, const PatchBox& b, E* patch) {
  const auto [n0, n1, n2] = b.size;
  const auto [s0, s1, s2] = b.stride;
  constexpr int64_t kSize = sizeof(E);
  const auto run = [](auto* image, E* mine, int64_t n) {
    if constexpr (kGather) {
      fetch_ahead(image);
      copy_run(reinterpret_cast<char*>(mine), reinterpret_cast<const char*>(image), n * kSize);
    } else {
      copy_run(reinterpret_cast<char*>(image), reinterpret_cast<const char*>(mine), n * kSize);
    }
  };
  switch (order_of(b)) {
    case Order::runs:
      if (s1 == n2) {
        for (int64_t i = 0; i < n0; ++i) run(at + i * s0, patch + i * n1 * n2, n1 * n2);
        return;
      }
      for (int64_t i = 0; i < n0; ++i)
        for (int64_t j = 0; j < n1; ++j) run(at + i * s0 + j * s1, patch + (i * n1 + j) * n2, n2);
      return;
    case Order::planes:
      for (int64_t i = 0; i < n0; ++i) {
        auto *const x = at + i * s0, *const y = x + s2, *const z = y + s2;
        E* const mine = patch + i * n1 * 3;
        if constexpr (kGather) {
          fetch_ahead(x), fetch_ahead(y), fetch_ahead(z);
          interleave3<E>(x, y, z, n1, mine);
        } else {
          deinterleave3<E>(mine, n1, x, y, z);
        }
      }
      return;
    case Order::pixels:
      for (int64_t j = 0; j < n1; ++j) {
        E *const x = patch + j * n2, *const y = x + n1 * n2, *const z = y + n1 * n2;
        if constexpr (kGather) {
          deinterleave3<E>(at + j * s1, n2, x, y, z);
        } else {
          interleave3<E>(x, y, z, n2, at + j * s1);
        }
      }
      return;
    case Order::any:
      for (int64_t i = 0; i < n0; ++i)
        for (int64_t j = 0; j < n1; ++j)
          for (int64_t k = 0; k < n2; ++k) {
            auto* const image = at + i * s0 + j * s1 + k * s2;
            E* const mine = patch + (i * n1 + j) * n2 + k;
            if constexpr (kGather) {
              *mine = *image;
            } else {
              *image = *mine;
            }
          }
  }
}

// -- values ------------------------------------------------------------------------------------

// Where values come from, kWidth of them from k on; both may be read up to a vector past their end.
struct Bytes {
  const uint8_t* x;
  inline VF operator()(int64_t k) const { return to_float(load_bytes(x + k)); }
};
struct Floats {
  const float* x;
  inline VF operator()(int64_t k) const { return load(x + k); }
};

// And what becomes of them. See level_of; the scalar ISA has no fused product, and divides.
struct Level {
  inline VF operator()(VF u) const {
    if constexpr (kWidth == 4) return u / set1(255.0f);
    return fma(u, set1(kLevelHigh), u * set1(kLevelLow));
  }
};
struct Affine {
  VF center, scale, offset;
  explicit Affine(const PatchNorm& n)
      : center(set1(static_cast<float>(n.center))),
        scale(set1(static_cast<float>(n.scale))),
        offset(set1(static_cast<float>(n.offset))) {}
  inline VF operator()(VF x) const { return fma(x - center, scale, offset); }
};

inline VM lanes_below(int64_t n) {
  return lt(iota(), seti(static_cast<uint32_t>(n)));
}

// Sums of bytes, on their way to floats. Lanes hold whole numbers below 2^24 exactly: up to 256
// squares of a byte each, so at most kMost vectors between two flushes.
struct ByteSums {
  static constexpr int64_t kMost = 2 * 255;
  VF sum[2], squares[2];
  uint64_t all = 0, all_squares = 0;

  inline ByteSums() { clear(); }
  inline void clear() { sum[0] = sum[1] = squares[0] = squares[1] = set1(0.0f); }
  inline void add(const uint8_t* x, int at, float* to) {
    const VF u = to_float(load_bytes(x));
    store(to, u);
    sum[at] = sum[at] + u, squares[at] = fma(u, u, squares[at]);
  }
  // n bytes, a whole number of vectors.
  inline void run(const uint8_t* x, int64_t n, float* to) {
    int64_t k = 0;
    for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
      add(x + k, 0, to + k);
      add(x + k + kWidth, 1, to + k + kWidth);
    }
    if (k < n) add(x + k, 0, to + k);
  }
  inline void flush() {
    float q[2][kWidth];
    store(q[0], squares[0]), store(q[1], squares[1]);
    int32_t all_lanes = 0;  // below 32 x 2^24
    for (int i = 0; i < kWidth; ++i)
      all_lanes += static_cast<int32_t>(q[0][i]) + static_cast<int32_t>(q[1][i]);
    all_squares += static_cast<uint64_t>(all_lanes);
    all += static_cast<uint64_t>(hsum(sum[0] + sum[1]));  // below 2^22: exact
    clear();
  }
};

// The bytes as floats, and their norm; what lies behind them, up to a vector, is 0.
inline PatchNorm norm_of(const uint8_t* x, int64_t n, double eps, float* floats) {
  constexpr int64_t kStep = ByteSums::kMost * kWidth;
  ByteSums sums;
  for (int64_t k = 0; k < n; k += kStep) {
    const int64_t left = (n - k + kWidth - 1) / kWidth * kWidth;
    sums.run(x + k, left < kStep ? left : kStep, floats + k);
    sums.flush();
  }
  return norm_of_bytes(sums.all, sums.all_squares, n, eps);
}

// Likewise of a patch in runs of whole vectors, and not too many of them, straight from its image.
inline bool fits_runs(const PatchBox& b) {
  const int64_t values = b.size[0] * b.size[1] * b.size[2];
  return order_of(b) == Order::runs && b.run() % kWidth == 0 &&
         values <= ByteSums::kMost / 2 * kWidth;
}
inline PatchNorm norm_of_runs(const uint8_t* at, const PatchBox& b, double eps, float* floats) {
  const int64_t n1 = b.size[1], n2 = b.size[2];
  const bool joined = b.stride[1] == n2;
  const int64_t runs = joined ? 1 : n1, length = joined ? n1 * n2 : n2;
  ByteSums sums;
  for (int64_t i = 0; i < b.size[0]; ++i)
    for (int64_t j = 0; j < runs; ++j, floats += length) {
      const uint8_t* const row = at + i * b.stride[0] + j * b.stride[1];
      fetch_ahead(row);
      sums.run(row, length, floats);
    }
  sums.flush();
  return norm_of_bytes(sums.all, sums.all_squares, b.size[0] * n1 * n2, eps);
}

// First their mean, by differences to the first value, so that equal ones give 0; then differences
// to that mean. Sums of a few vectors are added in double: their rounding would be the variance's.
inline PatchNorm norm_of(const float* x, int64_t n, double eps) {
  constexpr int64_t kStep = 16 * kWidth;
  const auto sums = [&](float from, double* sum, double* squares) {
    const VF center = set1(from), zero = set1(0.0f);
    *sum = *squares = 0.0;
    for (int64_t first = 0; first < n; first += kStep) {
      const int64_t end = first + kStep < n ? first + kStep : n;
      VF s = zero, q = zero;
      for (int64_t k = first; k < end; k += kWidth) {
        const VF d = select(lanes_below(end - k), load(x + k) - center, zero);
        s = s + d, q = fma(d, d, q);
      }
      *sum += static_cast<double>(hsum(s)), *squares += static_cast<double>(hsum(q));
    }
  };
  double sum, squares;
  sums(x[0], &sum, &squares);
  const float center = x[0] + static_cast<float>(sum / static_cast<double>(n));
  sums(center, &sum, &squares);
  return norm_of_floats(center, sum, squares, n, eps);
}

template <class E>
inline void widen(const E* x, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += kWidth) store(to + k, load(x + k));
}

// Memory of a patch: raw values, floats and results, each with a vector to spare.
struct PatchMemory {
  char *raw, *made;
  float* floats;

  PatchMemory(void* work, int64_t values)
      : raw(static_cast<char*>(work)),
        made(raw + patch_room(values)),
        floats(reinterpret_cast<float*>(made + patch_room(values))) {}
};

// The values of one patch, ready to be used: calls `use` with where they come from and what they
// become, of which there are two kinds.
template <class Use>
inline void with_patch(const PatchGrid& g, const PatchBox& box, int64_t offset, bool normalize,
                       double eps, const PatchMemory& memory, const Use& use) {
  const int64_t n = g.values();
  const auto gathered = [&]<class E>(const E*) {
    auto* const raw = reinterpret_cast<E*>(memory.raw);
    move_patch<true, E>(static_cast<const E*>(g.data) + offset, box, raw);
    return raw;
  };
  if (g.pixel == Pixel::u8) {
    if (normalize && fits_runs(box)) {
      const auto* const at = static_cast<const uint8_t*>(g.data) + offset;
      return use(Floats{memory.floats}, Affine(norm_of_runs(at, box, eps, memory.floats)));
    }
    const uint8_t* const raw = gathered(static_cast<const uint8_t*>(nullptr));
    if (!normalize) return use(Bytes{raw}, Level{});
    for (int k = 0; k < kWidth; ++k) memory.raw[n + k] = 0;
    return use(Floats{memory.floats}, Affine(norm_of(raw, n, eps, memory.floats)));
  }
  const float* x = memory.floats;
  if (g.pixel == Pixel::f32) x = gathered(static_cast<const float*>(nullptr));
  if (g.pixel == Pixel::bf16)
    widen(gathered(static_cast<const bf16_t*>(nullptr)), n, memory.floats);
  if (g.pixel == Pixel::f16) widen(gathered(static_cast<const fp16_t*>(nullptr)), n, memory.floats);
  use(Floats{x}, Affine(normalize ? norm_of(x, n, eps) : PatchNorm{0.0, 1.0, 0.0}));
}

// -- results -----------------------------------------------------------------------------------

// Whole lines past the caches. Not all addresses can be written so.
inline bool can_stream(const void* to, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0;
}
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  auto* const out = static_cast<float*>(to);
  const auto* const in = static_cast<const float*>(from);
  for (int64_t i = 0; i < bytes / 4; i += kWidth) stream(out + i, load(in + i));
}

// 2 kWidth neighbours. Rounding to bf16 looks for subnormal lanes once; a whole line of it may go
// past the caches, as floats may.
template <class T>
constexpr bool kStreams = false;
template <>
constexpr bool kStreams<float> = true;

template <bool kStream, class T>
inline void store_two(T* to, VF a, VF b) {
  store_quick(to, a);
  store_quick(to + kWidth, b);
}
template <bool kStream>
inline void store_two(float* to, VF a, VF b) {
  if constexpr (kStream) {
    stream(to, a);
    stream(to + kWidth, b);
  } else {
    store(to, a);
    store(to + kWidth, b);
  }
}
#if defined(TENFOLD_ISA_BF16)
template <>
constexpr bool kStreams<bf16_t> = true;

template <bool kStream>
inline void store_two(bf16_t* to, VF a, VF b) {
  const __mmask16 small =
      _mm512_fpclass_ps_mask(a.v, kSubnormal) | _mm512_fpclass_ps_mask(b.v, kSubnormal);
  if (small != 0) [[unlikely]] {
    store(to, a);
    store(to + kWidth, b);
    return;
  }
  const auto both = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  } else {
    _mm512_storeu_si512(to, both);
  }
}
#endif

template <bool kStream, class T, class Source, class Target>
inline void write_values(Source x, Target y, int64_t n, T* to) {
  int64_t k = 0;
  for (; k + 2 * kWidth <= n; k += 2 * kWidth)
    store_two<kStream>(to + k, y(x(k)), y(x(k + kWidth)));
  for (; k < n; k += kWidth) {
    const int left = static_cast<int>(n - k < kWidth ? n - k : kWidth);
    store_n(to + k, y(x(k)), left);
  }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
