// SPDX-License-Identifier: Apache-2.0
// Neighbouring lanes as a few vectors, for ISA sources: of floats, or of doubles, which are for
// tests and plain loops.
#pragma once

#include "core/cpu/vec.h"
#include "influence/markov.h"

TENFOLD_ISA_BEGIN
namespace {

struct VD {
  double v[kWidth];
};

#define TENFOLD_LANES for (int i = 0; i < kWidth; ++i)
inline VD load(const double* p) {
  VD r;
  TENFOLD_LANES r.v[i] = p[i];
  return r;
}
inline VD load_n(const double* p, int n) {
  VD r;
  TENFOLD_LANES r.v[i] = i < n ? p[i] : 0.0;
  return r;
}
inline void store(double* p, VD a) {
  TENFOLD_LANES p[i] = a.v[i];
}
inline void store_n(double* p, VD a, int n) {
  TENFOLD_LANES if (i < n) p[i] = a.v[i];
}
inline VD operator+(VD a, VD b) {
  TENFOLD_LANES a.v[i] += b.v[i];
  return a;
}
inline VD operator*(VD a, VD b) {
  TENFOLD_LANES a.v[i] *= b.v[i];
  return a;
}
inline VD fma(VD a, VD b, VD c) {
  TENFOLD_LANES c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline double hsum(VD a) {
  double sum = 0.0;
  TENFOLD_LANES sum += a.v[i];
  return sum;
}
#undef TENFOLD_LANES

template <class T>
struct VectorOf {
  using type = VF;
  static VF of(float x) { return set1(x); }
};
template <>
struct VectorOf<double> {
  using type = VD;
  static VD of(double x) {
    VD r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = x;
    return r;
  }
};

// kCount vectors, of the last of which `tail` lanes exist; the others are 0 and stay unstored.
template <class T, int kCount>
struct Lanes {
  using Vec = typename VectorOf<T>::type;
  Vec x[kCount];

  static constexpr int kLanes = kCount * kWidth;
  static int count(int tail) { return kLanes - kWidth + tail; }

  [[gnu::always_inline]] static Lanes all(Real<T> value) {
    Lanes r;
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) r.x[v] = VectorOf<T>::of(value);
    return r;
  }
  template <class From>
  [[gnu::always_inline]] static Lanes read(const From* p, int tail) {
    Lanes r;
#pragma GCC unroll 8
    for (int v = 0; v + 1 < kCount; ++v) r.x[v] = load(p + v * kWidth);
    const From* const last = p + (kCount - 1) * kWidth;
    r.x[kCount - 1] = tail == kWidth ? load(last) : load_n(last, tail);
    return r;
  }
  template <class To>
  [[gnu::always_inline]] void write(To* p, int tail) const {
#pragma GCC unroll 8
    for (int v = 0; v + 1 < kCount; ++v) store(p + v * kWidth, x[v]);
    To* const last = p + (kCount - 1) * kWidth;
    if (tail == kWidth) return store(last, x[kCount - 1]);
    store_n(last, x[kCount - 1], tail);
  }
  [[gnu::always_inline]] Lanes operator+(const Lanes& other) const {
    Lanes r;
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) r.x[v] = x[v] + other.x[v];
    return r;
  }
  [[gnu::always_inline]] Lanes operator*(const Lanes& other) const {
    Lanes r;
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) r.x[v] = x[v] * other.x[v];
    return r;
  }
};

// a b + c
template <class T, int kCount>
[[gnu::always_inline]] inline Lanes<T, kCount> fma(const Lanes<T, kCount>& a,
                                                   const Lanes<T, kCount>& b,
                                                   const Lanes<T, kCount>& c) {
  Lanes<T, kCount> r;
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) r.x[v] = fma(a.x[v], b.x[v], c.x[v]);
  return r;
}

// Adds to what lies at `to`.
template <class T, int kCount>
[[gnu::always_inline]] inline void add_to(Real<T>* to, const Lanes<T, kCount>& x, int tail) {
  (Lanes<T, kCount>::read(to, tail) + x).write(to, tail);
}

// f<vectors>(first lane, lanes of the last vector) for all of `lanes`, four vectors at a time.
template <class F>
inline void over_lanes(int64_t lanes, const F& f) {
  for (int64_t at = 0; at < lanes;) {
    const int64_t left = lanes - at;
    const int count = left > 3 * kWidth ? 4 : left > kWidth ? 2 : 1;
    const int64_t after = left - (count - 1) * kWidth;
    const int tail = static_cast<int>(after < kWidth ? after : kWidth);
    if (count == 4) {
      f.template operator()<4>(at, tail);
    } else if (count == 2) {
      f.template operator()<2>(at, tail);
    } else {
      f.template operator()<1>(at, tail);
    }
    at += count * kWidth;
  }
}

// How many of n ids are there.
inline int64_t count_ids(const int32_t* ids, int64_t n) {
  int64_t count = 0;
  for (int64_t b = 0; b < n; ++b) count += ids[b] >= 0 ? 1 : 0;
  return count;
}

// 1, or what makes a mean of the sum over the ids.
template <class T>
inline Real<T> batch_weight(const int32_t* ids, int64_t n, bool mean) {
  if (!mean) return Real<T>{1};
  const int64_t count = count_ids(ids, n);
  return Real<T>{1} / static_cast<Real<T>>(count > 0 ? count : 1);
}

// Sum of the rows of n ids; -1 is none.
template <class T, int kCount>
[[gnu::always_inline]] inline Lanes<T, kCount> sum_rows(const T* from, int64_t stride,
                                                        const int32_t* ids, int64_t n, int tail) {
  auto sum = Lanes<T, kCount>::all(Real<T>{0});
  for (int64_t b = 0; b < n; ++b)
    if (ids[b] >= 0) sum = sum + Lanes<T, kCount>::read(from + ids[b] * stride, tail);
  return sum;
}

}  // namespace
TENFOLD_ISA_END
