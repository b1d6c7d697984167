// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/panels.h"
#include "moe/gate_linear.h"

TENFOLD_ISA_BEGIN
namespace {

// Sums in registers, beside the vectors of x and one of w.
constexpr int kTokens = 3;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kExperts = 8, kOuterRows = 6;
#else
constexpr int kExperts = 4, kOuterRows = 3;
#endif
constexpr int kOuterVecs = 4;
constexpr int64_t kPackFrom = 12;  // tokens that make up for a copy of the router's rows

// What of a row is multiplied at once: floats, or where there are dot products, pairs of bf16.
template <class X, class W>
struct Step {
  static constexpr bool kDot =
#if defined(TENFOLD_ISA_BF16)
      __is_same(X, bf16_t) && __is_same(W, bf16_t);
#else
      false;
#endif
  static constexpr int kElements = kDot ? 2 * kWidth : kWidth;

  template <class T>
  static VF read(const T* p) {
    if constexpr (kDot) {
      return load(reinterpret_cast<const float*>(p));
    } else {
      return load(p);
    }
  }
  // The last ones of a row, and zeros.
  template <class T>
  static VF read_n(const T* p, int n) {
    if constexpr (kDot) {
      bf16_t some[kElements] = {};
      __builtin_memcpy(some, p, static_cast<uint64_t>(n) * 2);
      return load(reinterpret_cast<const float*>(some));
    } else {
      return load_n(p, n);
    }
  }
  static VF add(VF sum, VF a, VF b) {
#if defined(TENFOLD_ISA_BF16)
    if constexpr (kDot) return dot_bf16(sum, bits(a), bits(b));
#endif
    return fma(a, b, sum);
  }
};

// out[r][e] (+)= <x_r, w_e> over n elements, for R tokens and E experts.
template <int R, int E, class X, class W>
inline void dots(const X* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t n, float* out,
                 int64_t pitch, bool add) {
  using S = Step<X, W>;
  VF sum[R][E];
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e)
    for (int r = 0; r < R; ++r) sum[r][e] = set1(0.0f);
  int64_t i = 0;
  for (; i + S::kElements <= n; i += S::kElements) {
    VF a[R];
    for (int r = 0; r < R; ++r) a[r] = S::read(x + r * x_stride + i);
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      const VF b = S::read(w + e * w_stride + i);
      for (int r = 0; r < R; ++r) sum[r][e] = S::add(sum[r][e], a[r], b);
    }
  }
  if (i < n) {
    const int left = static_cast<int>(n - i);
    VF a[R];
    for (int r = 0; r < R; ++r) a[r] = S::read_n(x + r * x_stride + i, left);
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      const VF b = S::read_n(w + e * w_stride + i, left);
      for (int r = 0; r < R; ++r) sum[r][e] = S::add(sum[r][e], a[r], b);
    }
  }
  // All lanes are added in one order, whatever the block: a logit is the same in every batch.
  constexpr int kOnes = E < 4 ? E : 4;
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int e = 0; e < E; e += 4) {
      const VF none = set1(0.0f);
      float total[4];
      if constexpr (E < 4) {
        hsum4(sum[r][0], none, none, none, total);
      } else {
        hsum4(sum[r][e], sum[r][e + 1], sum[r][e + 2], sum[r][e + 3], total);
      }
      float* const to = out + r * pitch + e;
      for (int j = 0; j < kOnes; ++j) to[j] = add ? to[j] + total[j] : total[j];
    }
}

// Rows of E experts, n elements each, beside each other: those of w often lie a power of two apart,
// and share a few sets of the first cache.
template <int E, class W>
class ExpertRows {
 public:
  static constexpr auto kPart = static_cast<int64_t>(kRouterPart / sizeof(W));
  static constexpr auto kStride = kPart + static_cast<int64_t>(64 / sizeof(W));

  ExpertRows(const W* w, int64_t stride, int64_t n) {
    for (int e = 0; e < E; ++e)
      __builtin_memcpy(rows_ + e * kStride, w + e * stride, static_cast<uint64_t>(n) * sizeof(W));
  }
  const W* data() const { return rows_; }

 private:
  alignas(64) W rows_[E * kStride];
};

template <int E, class X, class W>
void dots_of_tokens(const RouterParams& p, const X* x, const W* w, int64_t w_stride, int64_t tokens,
                    int64_t n, float* out, bool add) {
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    dots<kTokens, E>(x + t * p.x_stride, p.x_stride, w, w_stride, n, out + t * p.experts, p.experts,
                     add);
  for (; t < tokens; ++t)
    dots<1, E>(x + t * p.x_stride, p.x_stride, w, w_stride, n, out + t * p.experts, p.experts, add);
}

template <int E, class X, class W>
void dots_of_experts(const RouterParams& p, const X* x, const W* w, int64_t tokens, int64_t n,
                     float* out, bool add) {
  if (tokens < kPackFrom) return dots_of_tokens<E>(p, x, w, p.w_stride, tokens, n, out, add);
  const ExpertRows<E, W> rows(w, p.w_stride, n);
  dots_of_tokens<E>(p, x, rows.data(), rows.kStride, tokens, n, out, add);
}

template <class X, class W>
void logits_of(const RouterParams& p, const X* x, const W* w, int64_t begin, int64_t end) {
  constexpr int64_t kPart = ExpertRows<1, W>::kPart;
  x += begin * p.x_stride;
  float* const out = p.logits + begin * p.experts;
  for (int64_t at = 0; at < p.dim; at += kPart) {
    const int64_t n = p.dim - at < kPart ? p.dim - at : kPart;
    const auto block = [&]<int E>(int64_t e) {
      dots_of_experts<E>(p, x + at, w + e * p.w_stride + at, end - begin, n, out + e, at > 0);
    };
    int64_t e = 0;
    for (; e + kExperts <= p.experts; e += kExperts) block.template operator()<kExperts>(e);
    if constexpr (kExperts > 4)
      for (; e + 4 <= p.experts; e += 4) block.template operator()<4>(e);
    for (; e < p.experts; ++e) block.template operator()<1>(e);
  }
}

template <class X>
void logits_of(const RouterParams& p, int64_t begin, int64_t end) {
  const auto* const x = static_cast<const X*>(p.x);
  if (p.x_dtype == p.w_dtype) return logits_of(p, x, static_cast<const X*>(p.w), begin, end);
  logits_of(p, x, static_cast<const float*>(p.w), begin, end);
}

// Rows of b of one strip of the depth.
template <class T>
struct Strip {
  const T* b;
  int64_t stride, depth;
};

// R rows times V vectors of columns; the last vector may have fewer.
template <int R, int V, class T>
inline void outer_block(const OuterParams& p, const float* a, Strip<T> s, float* out, int64_t cols,
                        bool add) {
  VF sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = set1(0.0f);
  for (int64_t i = 0; i < s.depth; ++i, a += p.a_step, s.b += s.stride) {
    VF y[V];
    for (int v = 0; v < V; ++v) y[v] = V > 1 ? load(s.b + v * kWidth) : load_some(s.b, cols);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VF x = set1(a[r * p.a_row]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(x, y[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* const to = out + r * p.pitch + v * kWidth;
      const int left = static_cast<int>(V > 1 || cols > kWidth ? kWidth : cols);
      const VF y = sum[r][v];
      store_n(to, add ? load_n(to, left) + y : y, left);
    }
}

template <int V, class T>
void outer_rows(const OuterParams& p, int64_t first, const Strip<T>& s, float* out, int64_t cols) {
  const float* const a = p.a + first * p.a_step;
  int64_t r = 0;
  for (; r + kOuterRows <= p.rows; r += kOuterRows)
    outer_block<kOuterRows, V>(p, a + r * p.a_row, s, out + r * p.pitch, cols, first > 0);
  for (; r < p.rows; ++r)
    outer_block<1, V>(p, a + r * p.a_row, s, out + r * p.pitch, cols, first > 0);
}

template <class T>
void outer_of(const OuterParams& p, const T* b, int64_t col, int64_t cols) {
  constexpr int kMany = kOuterVecs * kWidth;
  alignas(64) float packed[kOuterStrip * kMany];  // as ExpertRows, and widened once
  for (int64_t i = 0; i < p.depth; i += kOuterStrip, b += kOuterStrip * p.b_stride) {
    const int64_t depth = p.depth - i < kOuterStrip ? p.depth - i : kOuterStrip;
    int64_t c = col;
    for (; c + kMany <= col + cols; c += kMany) {
      for (int64_t j = 0; j < depth; ++j)
        for (int v = 0; v < kMany; v += kWidth)
          store(packed + j * kMany + v, load(b + j * p.b_stride + c + v));
      outer_rows<kOuterVecs>(p, i, Strip<float>{packed, kMany, depth}, p.out + c - col, kMany);
    }
    for (; c < col + cols; c += kWidth)
      outer_rows<1>(p, i, Strip<T>{b + c, p.b_stride, depth}, p.out + c - col, col + cols - c);
  }
}

}  // namespace

void router_logits(const RouterParams& p, int64_t begin, int64_t end) {
  if (p.x_dtype == Dtype::f32) return logits_of<float>(p, begin, end);
  if (p.x_dtype == Dtype::bf16) return logits_of<bf16_t>(p, begin, end);
  logits_of<fp16_t>(p, begin, end);
}

void router_outer(const OuterParams& p, int64_t col, int64_t cols) {
  if (p.dtype == Dtype::f32) return outer_of(p, static_cast<const float*>(p.b), col, cols);
  if (p.dtype == Dtype::bf16) return outer_of(p, static_cast<const bf16_t*>(p.b), col, cols);
  outer_of(p, static_cast<const fp16_t*>(p.b), col, cols);
}

void router_round(const float* from, int64_t n, Dtype dtype, void* to) {
  const auto all = [&](auto* out) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(out + i, load(from + i));
    const int left = static_cast<int>(n - i);
    if (left > 0) store_n(out + i, load_n(from + i, left), left);
  };
  if (dtype == Dtype::f32) return all(static_cast<float*>(to));
  if (dtype == Dtype::bf16) return all(static_cast<bf16_t*>(to));
  all(static_cast<fp16_t*>(to));
}

TENFOLD_ISA_END
