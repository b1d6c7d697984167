// SPDX-License-Identifier: Apache-2.0
// See norm/rms_norm.h. kRmsRowsAtOnce rows are summed one after another and share what waits for a
// sum: adding its lanes, root and division. Then they are scaled, while they are in the caches.
#include <type_traits>

#include "core/cpu/pairs.h"
#include "norm/rms_norm.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kRows = kRmsRowsAtOnce, kTwo = 2 * kWidth;

// Types of x, weight and y, and whether h rstd is rounded.
template <class X_, class W_, class Y_, bool kRounds_>
struct Types {
  using X = X_;
  using W = W_;
  using Y = Y_;
  static constexpr bool kRounds = kRounds_;
  static constexpr bool kOrdered = !(kSplit<X> && kSplit<W> && kSplit<Y>);
  using Exact = Types<X_, W_, Y_, false>;
};

template <class X, class F>
inline void with_weight(Dtype weight, bool rounds, const F& f) {
  if (weight == Dtype::f32) {
    if (rounds) return f.template operator()<Types<X, float, X, true>>();
    return f.template operator()<Types<X, float, X, false>>();
  }
  if (rounds) return f.template operator()<Types<X, X, X, true>>();
  f.template operator()<Types<X, X, X, false>>();
}

// Of float32 rows; W: 16 bits.
template <class W, class F>
inline void with_result(Dtype y, const F& f) {
  if (y == Dtype::f32) return f.template operator()<Types<float, W, float, false>>();
  f.template operator()<Types<float, W, W, true>>();
}

// f(types): what check_rms_norm lets through.
template <class F>
inline void with_types(Dtype x, Dtype weight, Dtype y, bool rounds, const F& f) {
  if (x == Dtype::bf16) return with_weight<bf16_t>(weight, rounds, f);
  if (x == Dtype::f16) return with_weight<fp16_t>(weight, rounds, f);
  if (weight == Dtype::bf16) return with_result<bf16_t>(y, f);
  if (weight == Dtype::f16) return with_result<fp16_t>(y, f);
  f.template operator()<Types<float, float, float, false>>();
}

template <class T>
inline T* row_at(void* rows, int64_t i, int64_t stride) {
  return static_cast<T*>(rows) + i * stride;
}
template <class T>
inline const T* row_at(const void* rows, int64_t i, int64_t stride) {
  return static_cast<const T*>(rows) + i * stride;
}

// x as T holds it. By way of memory that stays in the first cache: converting costs as much, and
// this is how store rounds.
template <bool kOrdered, class T>
inline void round_two(VF (&x)[2]) {
  if constexpr (!std::is_same_v<T, float>) {
    alignas(64) T held[kTwo];
    put_two<kOrdered>(held, x, false);
    get_two<kOrdered>(held, x);
  }
}
template <class T>
inline VF round_one(VF x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    alignas(64) T held[kWidth];
    store(held, x);
    return load(held);
  }
}

// Independent sums of squares.
struct Squares {
  VF sum[2] = {set1(0.0f), set1(0.0f)};
  inline void add(const VF (&x)[2]) {
    sum[0] = fma(x[0], x[0], sum[0]);
    sum[1] = fma(x[1], x[1], sum[1]);
  }
  inline void add(VF x) { sum[0] = fma(x, x, sum[0]); }
  inline VF all() const { return sum[0] + sum[1]; }
};

template <class T>
inline VF squares_of(const T* x, int64_t cols) {
  Squares squares[2];
  int64_t j = 0;
  for (; j + 2 * kTwo <= cols; j += 2 * kTwo) {
    VF v[2];
    for (int k = 0; k < 2; ++k) {
      get_next_two<false>(x + j + k * kTwo, v);
      squares[k].add(v);
    }
  }
  for (; j + kWidth <= cols; j += kWidth) squares[0].add(load(x + j));
  if (j < cols) squares[1].add(load_n(x + j, static_cast<int>(cols - j)));
  return squares[0].all() + squares[1].all();
}

// The sum of two rows to `sum`, and the squares of what it holds. past: `sum` itself goes past the
// caches, and `kept` has the row.
template <class T>
inline VF add_rows(const T* x, const T* residual, T* sum, T* kept, bool past, int64_t cols) {
  Squares squares;
  T* const to = past ? kept : sum;
  int64_t j = 0;
  for (; j + kTwo <= cols; j += kTwo) {
    VF a[2], b[2];
    get_next_two<false>(x + j, a);
    get_next_two<false>(residual + j, b);
    for (int k = 0; k < 2; ++k) a[k] = a[k] + b[k];
    put_two<false>(to + j, a, false);
    if constexpr (!std::is_same_v<T, float>) get_two<false>(to + j, a);
    squares.add(a);
    if (!past) continue;
    constexpr int kStep = static_cast<int>(sizeof(float) / sizeof(T)) * kWidth;
    for (int k = 0; k < kTwo; k += kStep)
      stream(reinterpret_cast<float*>(sum + j + k),
             load(reinterpret_cast<const float*>(to + j + k)));
  }
  for (; j < cols; j += kWidth) {
    const int n = static_cast<int>(cols - j < kWidth ? cols - j : kWidth);
    const VF s = round_one<T>(load_n(x + j, n) + load_n(residual + j, n));
    squares.add(s);
    store_n(to + j, s, n);
    if (past) store_n(sum + j, s, n);
  }
  return squares.all();
}

template <class S>
inline void scale_row(const typename S::X* h, const typename S::W* weight, typename S::Y* y,
                      VF rstd, bool past, int64_t cols) {
  using Y = typename S::Y;
  int64_t j = 0;
  for (; j + kTwo <= cols; j += kTwo) {
    VF v[2], w[2];
    get_two<S::kOrdered>(h + j, v);
    get_two<S::kOrdered>(weight + j, w);
    for (int k = 0; k < 2; ++k) v[k] = v[k] * rstd;
    if constexpr (S::kRounds) round_two<S::kOrdered, Y>(v);
    for (int k = 0; k < 2; ++k) v[k] = v[k] * w[k];
    put_two<S::kOrdered>(y + j, v, past);
  }
  for (; j < cols; j += kWidth) {
    const int n = static_cast<int>(cols - j < kWidth ? cols - j : kWidth);
    VF v = load_n(h + j, n) * rstd;
    if constexpr (S::kRounds) v = round_one<Y>(v);
    store_n(y + j, v * load_n(weight + j, n), n);
  }
}

// Sums of the lanes of kRows vectors, as the first lanes of one.
inline VF lane_sums(const VF (&x)[kRows]) {
  float sums[kWidth] = {};
  hsum4(x[0], x[1], x[2], x[3], sums);
  return load(sums);
}

template <class S>
void norm_rows(const RmsRows& r, int64_t begin, int64_t end, void* kept) {
  using X = typename S::X;
  using Y = typename S::Y;
  const auto* const weight = static_cast<const typename S::W*>(r.weight);
  const VF cols = set1(static_cast<float>(r.cols)), eps = set1(r.eps), one = set1(1.0f);
  for (int64_t i = begin; i < end; i += kRows) {
    const int count = static_cast<int>(end - i < kRows ? end - i : kRows);
    VF squares[kRows] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    const X* h[kRows] = {};
    for (int g = 0; g < count; ++g) {
      h[g] = row_at<X>(r.x, i + g, r.x_stride);
      if (r.residual == nullptr) {
        squares[g] = squares_of(h[g], r.cols);
        continue;
      }
      X* const sum = row_at<X>(r.sum, i + g, r.sum_stride);
      X* const own = static_cast<X*>(kept) + g * r.cols;
      const bool past = r.past_caches && is_aligned(sum);
      squares[g] =
          add_rows(h[g], row_at<X>(r.residual, i + g, r.residual_stride), sum, own, past, r.cols);
      h[g] = past ? own : sum;
    }
    float rstd[kWidth];
    store(rstd, one / sqrt(lane_sums(squares) / cols + eps));
    for (int g = 0; g < count; ++g) {
      if (r.rstd != nullptr) r.rstd[i + g] = rstd[g];
      Y* const y = row_at<Y>(r.y, i + g, r.y_stride);
      scale_row<S>(h[g], weight, y, set1(rstd[g]), r.past_caches && is_aligned(y), r.cols);
    }
  }
  if (r.past_caches) stream_fence();
}

// The sum of dy w h over a row.
template <class S>
inline VF dot_row(const typename S::Y* dy, const typename S::W* weight, const typename S::X* h,
                  int64_t cols) {
  VF sum[2] = {set1(0.0f), set1(0.0f)};
  int64_t j = 0;
  for (; j + kTwo <= cols; j += kTwo) {
    VF g[2], w[2], x[2];
    get_next_two<S::kOrdered>(dy + j, g);
    get_two<S::kOrdered>(weight + j, w);
    get_next_two<S::kOrdered>(h + j, x);
    for (int k = 0; k < 2; ++k) sum[k] = fma(g[k] * w[k], x[k], sum[k]);
  }
  for (; j < cols; j += kWidth) {
    const int n = static_cast<int>(cols - j < kWidth ? cols - j : kWidth);
    sum[0] = fma(load_n(dy + j, n) * load_n(weight + j, n), load_n(h + j, n), sum[0]);
  }
  return sum[0] + sum[1];
}

// Gradients of kCount rows from i on. dw: of kTwo columns in the order of get_two.
template <class S, int kCount>
struct GradRows {
  using X = typename S::X;
  using Y = typename S::Y;
  const Y* dy[kCount];
  const X *h[kCount], *dsum[kCount];
  X* dx[kCount];
  VF rstd[kCount], pull[kCount];  // pull: - rstd^3 mean(dy w h)
  bool past;

  GradRows(const RmsGradRows& r, int64_t i) : past(r.past_caches) {
    VF dots[kRows] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    const auto* const weight = static_cast<const typename S::W*>(r.weight);
    for (int g = 0; g < kCount; ++g) {
      dy[g] = row_at<Y>(r.dy, i + g, r.dy_stride);
      h[g] = row_at<X>(r.h, i + g, r.h_stride);
      dsum[g] = r.dsum != nullptr ? row_at<X>(r.dsum, i + g, r.dsum_stride) : nullptr;
      dx[g] = r.dx != nullptr ? row_at<X>(r.dx, i + g, r.cols) : nullptr;
      rstd[g] = set1(r.rstd[i + g]);
      past = past && is_aligned(dx[g]);
      if (r.dx != nullptr) dots[g] = dot_row<S>(dy[g], weight, h[g], r.cols);
    }
    float mean[kWidth];
    store(mean, lane_sums(dots) / set1(static_cast<float>(r.cols)));
    for (int g = 0; g < kCount; ++g)
      pull[g] = set1(0.0f) - rstd[g] * rstd[g] * rstd[g] * set1(mean[g]);
  }

  // kDx, kDw: what is asked for.
  template <bool kDx, bool kDw>
  inline void two(const typename S::W* weight, int64_t j, float* dw) const {
    VF w[2], sum[2] = {set1(0.0f), set1(0.0f)};
    if constexpr (kDx) get_two<S::kOrdered>(weight + j, w);
    for (int g = 0; g < kCount; ++g) {
      VF d[2], x[2];
      get_two<S::kOrdered>(dy[g] + j, d);
      get_two<S::kOrdered>(h[g] + j, x);
      if constexpr (kDw)
        for (int k = 0; k < 2; ++k) sum[k] = fma(d[k] * x[k], rstd[g], sum[k]);
      if constexpr (kDx) {
        for (int k = 0; k < 2; ++k) d[k] = fma(x[k], pull[g], d[k] * w[k] * rstd[g]);
        if (dsum[g] != nullptr) {
          VF more[2];
          get_two<S::kOrdered>(dsum[g] + j, more);
          for (int k = 0; k < 2; ++k) d[k] = d[k] + more[k];
        }
        put_two<S::kOrdered>(dx[g] + j, d, past);
      }
    }
    if constexpr (kDw)
      for (int k = 0; k < 2; ++k) {
        float* const to = dw + j + k * kWidth;
        store(to, load(to) + sum[k]);
      }
  }

  template <bool kDx, bool kDw>
  inline void few(const typename S::W* weight, int64_t j, int n, float* dw) const {
    const VF w = load_n(weight + j, n);
    VF sum = set1(0.0f);
    for (int g = 0; g < kCount; ++g) {
      const VF d = load_n(dy[g] + j, n), x = load_n(h[g] + j, n);
      sum = fma(d * x, rstd[g], sum);
      if constexpr (kDx) {
        VF out = fma(x, pull[g], d * w * rstd[g]);
        if (dsum[g] != nullptr) out = out + load_n(dsum[g] + j, n);
        store_n(dx[g] + j, out, n);
      }
    }
    if constexpr (kDw) store_n(dw + j, load_n(dw + j, n) + sum, n);
  }

  template <bool kDx, bool kDw>
  void run(const RmsGradRows& r, float* dw) const {
    const auto* const weight = static_cast<const typename S::W*>(r.weight);
    int64_t j = 0;
    for (; j + kTwo <= r.cols; j += kTwo) two<kDx, kDw>(weight, j, dw);
    for (; j < r.cols; j += kWidth)
      few<kDx, kDw>(weight, j, static_cast<int>(r.cols - j < kWidth ? r.cols - j : kWidth), dw);
  }
};

template <class S, int kCount>
inline void grad_some(const RmsGradRows& r, int64_t i, float* dw) {
  const GradRows<S, kCount> rows(r, i);
  if (dw == nullptr) return rows.template run<true, false>(r, dw);
  if (r.dx == nullptr) return rows.template run<false, true>(r, dw);
  rows.template run<true, true>(r, dw);
}

// Where sums of columns were kept as the even and the odd ones: in order.
inline void put_in_order(float* dw, int64_t cols) {
  for (int64_t j = 0; j + kTwo <= cols; j += kTwo) {
    float even[kWidth], odd[kWidth];
    store(even, load(dw + j));
    store(odd, load(dw + j + kWidth));
    for (int k = 0; k < kWidth; ++k) dw[j + 2 * k] = even[k], dw[j + 2 * k + 1] = odd[k];
  }
}

template <class S>
void grad_rows(const RmsGradRows& r, int64_t begin, int64_t end, float* dw) {
  if (dw != nullptr) __builtin_memset(dw, 0, sizeof(float) * static_cast<size_t>(r.cols));
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) grad_some<S, kRows>(r, i, dw);
  for (; i < end; ++i) grad_some<S, 1>(r, i, dw);
  if (!S::kOrdered && dw != nullptr) put_in_order(dw, r.cols);
  if (r.past_caches) stream_fence();
}

template <class T>
void add_blocks(const float* blocks, int64_t count, int64_t cols, T* dw, int64_t begin,
                int64_t end) {
  for (int64_t j = begin; j < end; j += kWidth) {
    const int n = static_cast<int>(end - j < kWidth ? end - j : kWidth);
    VF sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t b = 0; b < count; ++b) {
      const float* const from = blocks + b * cols + j;
      sum[b % 4] = sum[b % 4] + (n == kWidth ? load(from) : load_n(from, n));
    }
    store_n(dw + j, (sum[0] + sum[1]) + (sum[2] + sum[3]), n);
  }
}

}  // namespace

void rms_norm_rows(const RmsRows& r, int64_t begin, int64_t end, void* kept) {
  with_types(r.x_dtype, r.weight_dtype, r.y_dtype, r.rounds,
             [&]<class S>() { norm_rows<S>(r, begin, end, kept); });
}

void rms_norm_grad_rows(const RmsGradRows& r, int64_t begin, int64_t end, float* dw) {
  // Roundings have no gradient: one program for both ways.
  with_types(r.x_dtype, r.weight_dtype, r.y_dtype, false,
             [&]<class S>() { grad_rows<typename S::Exact>(r, begin, end, dw); });
}

void rms_norm_add_blocks(const float* blocks, int64_t count, int64_t cols, void* dw, Dtype dtype,
                         int64_t begin, int64_t end) {
  if (dtype == Dtype::f32)
    return add_blocks(blocks, count, cols, static_cast<float*>(dw), begin, end);
  if (dtype == Dtype::bf16)
    return add_blocks(blocks, count, cols, static_cast<bf16_t*>(dw), begin, end);
  add_blocks(blocks, count, cols, static_cast<fp16_t*>(dw), begin, end);
}

TENFOLD_ISA_END
