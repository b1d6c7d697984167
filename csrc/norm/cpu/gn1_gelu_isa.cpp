// SPDX-License-Identifier: Apache-2.0
// See norm/gn1_gelu.h.
#include "core/cpu/math.h"
#include "core/cpu/pairs.h"
#include "norm/gn1_gelu.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kTwo = 2 * kWidth;
constexpr float kInverseSqrt2Pi = 0.3989422804014327f;

// f(lanes, how many of them there are, which accumulator) over n elements.
template <bool kFirst, class T, class F>
inline void over(const T* x, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 2 * kTwo <= n; i += 2 * kTwo) {
    VF v[4];
    if constexpr (kFirst) read_ahead<2 * kTwo>(x + i);
    for (int k = 0; k < 4; ++k) v[k] = load(x + i + k * kWidth);
    for (int k = 0; k < 4; ++k) f(v[k], kWidth, k);
  }
  for (; i < n; i += kWidth) {
    const int some = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    f(load_n(x + i, some), some, 0);
  }
}

inline float total(const VF (&sum)[4]) {
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Twice over the block, which stays in the first cache: its mean, then what differs from that.
template <class T>
Moments moments(const T* x, int64_t n) {
  VF sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  over<true>(x, n, [&](VF v, int, int k) { sum[k] = sum[k] + v; });
  const float pivot = total(sum) / static_cast<float>(n);
  const VF from = set1(pivot);
  VF apart[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  VF squares[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  over<false>(x, n, [&](VF v, int some, int k) {
    VF d = v - from;
    if (some < kWidth) {  // lanes that are not there differ by nothing
      alignas(64) float lanes[kWidth] = {};
      store_n(lanes, d, some);
      d = load(lanes);
    }
    apart[k] = apart[k] + d;
    squares[k] = fma(d, d, squares[k]);
  });
  const double count = static_cast<double>(n), rest = total(apart) / count;
  const double about = static_cast<double>(total(squares)) - rest * rest * count;
  return {count, pivot + rest, about > 0.0 || about != about ? about : 0.0};
}

struct Affine {
  VF center, rstd, rest, weight, bias;
  inline VF h(VF x) const { return fma(x - center, rstd, rest); }
  inline VF u(VF h) const { return fma(h, weight, bias); }
};

template <class T, bool kAdds>
void forward(const Gn1Span& s) {
  const T *const x = static_cast<const T*>(s.x), *const residual =
                                                     static_cast<const T*>(s.residual);
  T* const y = static_cast<T*>(s.y);
  const Affine a{set1(s.center), set1(s.rstd), set1(s.rest), set1(s.weight), set1(s.bias)};
  const bool past = s.past_caches && is_aligned(y);
  int64_t i = 0;
  for (; i + kTwo <= s.n; i += kTwo) {
    VF v[2], other[2];
    get_next_two<false>(x + i, v);
    if constexpr (kAdds) get_next_two<false>(residual + i, other);
    for (int k = 0; k < 2; ++k) {
      const VF u = a.u(a.h(v[k])), p = normal_below(u);
      v[k] = kAdds ? fma(u, p, other[k]) : u * p;
    }
    put_two<false>(y + i, v, past);
  }
  for (; i < s.n; i += kWidth) {
    const int n = static_cast<int>(s.n - i < kWidth ? s.n - i : kWidth);
    const VF u = a.u(a.h(load_n(x + i, n)));
    const VF p = normal_below(u);
    if constexpr (kAdds) {
      store_n(y + i, fma(u, p, load_n(residual + i, n)), n);
    } else {
      store_n(y + i, u * p, n);
    }
  }
  if (past) stream_fence();
}

// For sums: what gelu_slope is off by, 1e-7, would add up to more than their rounding.
inline VF exact_slope(VF u) {
  const Normal p = normal(u);
  return fma(u * set1(kInverseSqrt2Pi), p.bell, p.below);
}

// Of few elements, so that sums of float32 stay short.
template <class T>
Gn1Sums short_sums(const Affine& a, const T* x, const T* dy, int64_t count) {
  VF sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};  // g, g, gh, gh
  int64_t i = 0;
  for (; i + kTwo <= count; i += kTwo) {
    VF v[2], d[2];
    get_next_two<false>(x + i, v);
    get_next_two<false>(dy + i, d);
    for (int k = 0; k < 2; ++k) {
      const VF h = a.h(v[k]), g = d[k] * exact_slope(a.u(h));
      sum[k] = sum[k] + g;
      sum[k + 2] = fma(g, h, sum[k + 2]);
    }
  }
  for (; i < count; i += kWidth) {
    const int n = static_cast<int>(count - i < kWidth ? count - i : kWidth);
    // Lanes that are not there: dy is 0, and h a number, which that of x = 0 need not be.
    const VM there = lt(iota(), seti(static_cast<uint32_t>(n)));
    const VF h = a.h(select(there, load_n(x + i, n), a.center));
    const VF g = load_n(dy + i, n) * exact_slope(a.u(h));
    sum[0] = sum[0] + g;
    sum[2] = fma(g, h, sum[2]);
  }
  return {hsum(sum[0] + sum[1]), hsum(sum[2] + sum[3])};
}

template <class T>
Gn1Sums grad_sums(const Gn1GradSpan& s) {
  constexpr int64_t kShort = 16 * kTwo;
  const T *const x = static_cast<const T*>(s.x), *const dy = static_cast<const T*>(s.dy);
  const Affine a{set1(s.center), set1(s.rstd), set1(s.rest), set1(s.weight), set1(s.bias)};
  Gn1Sums all{0.0, 0.0};
  for (int64_t i = 0; i < s.n; i += kShort) {
    const Gn1Sums some = short_sums(a, x + i, dy + i, s.n - i < kShort ? s.n - i : kShort);
    all.g += some.g, all.gh += some.gh;
  }
  return all;
}

template <class T>
void backward(const Gn1GradSpan& s) {
  const T *const x = static_cast<const T*>(s.x), *const dy = static_cast<const T*>(s.dy);
  T* const dx = static_cast<T*>(s.dx);
  const Affine a{set1(s.center), set1(s.rstd), set1(s.rest), set1(s.weight), set1(s.bias)};
  // dx = g (rstd weight) - (h (rstd mean_gh) + rstd mean_g)
  const VF by_g = set1(s.rstd * s.weight), by_h = set1(-s.rstd * s.mean_gh);
  const VF rest = set1(-s.rstd * s.mean_g);
  const bool past = s.past_caches && is_aligned(dx);
  int64_t i = 0;
  for (; i + kTwo <= s.n; i += kTwo) {
    VF v[2], d[2];
    get_next_two<false>(x + i, v);
    get_next_two<false>(dy + i, d);
    for (int k = 0; k < 2; ++k) {
      const VF h = a.h(v[k]), g = d[k] * gelu_slope(a.u(h));
      v[k] = fma(g, by_g, fma(h, by_h, rest));
    }
    put_two<false>(dx + i, v, past);
  }
  for (; i < s.n; i += kWidth) {
    const int n = static_cast<int>(s.n - i < kWidth ? s.n - i : kWidth);
    const VF h = a.h(load_n(x + i, n)), g = load_n(dy + i, n) * gelu_slope(a.u(h));
    store_n(dx + i, fma(g, by_g, fma(h, by_h, rest)), n);
  }
  if (past) stream_fence();
}

template <class F>
inline auto with_kind(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f.template operator()<float>();
  if (dtype == Dtype::bf16) return f.template operator()<bf16_t>();
  return f.template operator()<fp16_t>();
}

}  // namespace

Moments gn1_moments(Dtype dtype, const void* x, int64_t n) {
  return with_kind(dtype, [&]<class T>() { return moments(static_cast<const T*>(x), n); });
}

void gn1_gelu(const Gn1Span& s) {
  with_kind(s.dtype,
            [&]<class T>() { s.residual == nullptr ? forward<T, false>(s) : forward<T, true>(s); });
}

Gn1Sums gn1_grad_sums(const Gn1GradSpan& s) {
  return with_kind(s.dtype, [&]<class T>() { return grad_sums<T>(s); });
}

void gn1_gelu_grad(const Gn1GradSpan& s) {
  with_kind(s.dtype, [&]<class T>() { backward<T>(s); });
}

void gn1_widen(Dtype dtype, const void* from, int64_t n, float* to) {
  with_kind(dtype, [&]<class T>() {
    for (int64_t i = 0; i < n; i += kWidth) {
      const int some = static_cast<int>(n - i < kWidth ? n - i : kWidth);
      store_n(to + i, load_n(static_cast<const T*>(from) + i, some), some);
    }
  });
}

void gn1_narrow(Dtype dtype, const float* from, int64_t n, void* to) {
  with_kind(dtype, [&]<class T>() {
    for (int64_t i = 0; i < n; i += kWidth) {
      const int some = static_cast<int>(n - i < kWidth ? n - i : kWidth);
      store_n(static_cast<T*>(to) + i, load_n(from + i, some), some);
    }
  });
}

TENFOLD_ISA_END
