// SPDX-License-Identifier: Apache-2.0
// See loss/token_reward.h and loss/pair_loss.h.
#include "core/cpu/math.h"
#include "core/cpu/vec.h"
#include "loss/pair_loss.h"
#include "loss/token_reward.h"

TENFOLD_ISA_BEGIN
namespace {

template <class F>
inline void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::f32) return f.template operator()<float>();
  if (dtype == Dtype::bf16) return f.template operator()<bf16_t>();
  f.template operator()<fp16_t>();
}

template <class T>
inline VF load_some(const T* p, int n) {
  return n >= kWidth ? load(p) : load_n(p, n);
}

template <class T>
inline void store_some(T* p, VF x, int n) {
  if (n >= kWidth) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

// f(i, how many lanes)
template <class F>
inline void by_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(i, kWidth);
  if (i < n) f(i, static_cast<int>(n - i));
}

// Rows that are added to the sums in one pass over them.
template <class T, int kRows>
void add_rows(const T* const* rows, int64_t n, bool first, float* out) {
  by_vectors(n, [&](int64_t i, int lanes) {
    VF sum = first ? set1(0.0f) : load_some(out + i, lanes);
    for (int r = 0; r < kRows; ++r) sum = sum + load_some(rows[r] + i, lanes);
    store_some(out + i, sum, lanes);
  });
}

// e^x for x <= 0: of the product with log2(e) what a float cannot hold is added.
inline VF exp_below_zero(VF x) {
  const VF log2e = set1(kLog2e);
  x = vmax(set1(kExpFloor), x);  // the NaN operand is the second, so it survives
  const VF n = rint(x * log2e), near = fused(x, log2e, set1(0.0f) - n);
  return exp2_of_parts(n, fma(x, set1(1.9259630e-8f), near));
}

// log(1 + e) for e in [0, 1].
inline VF log_of_one_plus(VF e) {
  const VF one = set1(1.0f), u = one + e;
  // The logarithm of u, which is rounded, corrected by what the rounding lost.
  return select(eq(u, one), e, det_log_normal(u) * (e / (u - one)));
}

struct PairLanes {
  VF x, e, sum;

  PairLanes(const float* pos, const float* neg, const float* margin, float center, int64_t i,
            int lanes) {
    const VF zero = set1(0.0f), a = load_some(pos + i, lanes), b = load_some(neg + i, lanes);
    x = a - b, sum = center != 0.0f ? a + b : zero;
    if (margin != nullptr) x = x - load_some(margin + i, lanes);
    e = exp_below_zero(vmin(zero - x, x));
  }
};

// Gradients of the mean of the terms.
struct PairSlopes {
  VF share, level;

  PairSlopes(float share, float center) : share(set1(share)), level(set1(2.0f * center * share)) {}

  inline void write(const PairLanes& t, int64_t i, int lanes, float* of_pos, float* of_neg) const {
    const VF one = set1(1.0f), sigmoid = select(lt(t.x, set1(0.0f)), one, t.e) / (one + t.e);
    const VF slope = share * sigmoid, both = level * t.sum;
    store_some(of_pos + i, both - slope, lanes);
    store_some(of_neg + i, both + slope, lanes);
  }
};

}  // namespace

void mean_of_rows(const void* const* rows, int64_t count, int64_t n, Dtype dtype, float* out) {
  with_dtype(dtype, [&]<class T>() {
    const auto* const from = reinterpret_cast<const T* const*>(rows);
    int64_t r = 0;
    for (; r + 8 <= count; r += 8) add_rows<T, 8>(from + r, n, r == 0, out);
    for (; r < count; ++r) add_rows<T, 1>(from + r, n, r == 0, out);
  });
  if (count == 1) return;
  const VF by = set1(static_cast<float>(count));
  by_vectors(
      n, [&](int64_t i, int lanes) { store_some(out + i, load_some(out + i, lanes) / by, lanes); });
}

float dot_floats(const float* x, const float* y, int64_t n) {
  VF sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k)
      sums[k] = fma(load(x + i + k * kWidth), load(y + i + k * kWidth), sums[k]);
  by_vectors(n - i, [&](int64_t j, int lanes) {
    sums[0] = fma(load_some(x + i + j, lanes), load_some(y + i + j, lanes), sums[0]);
  });
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void floats_of(const void* x, int64_t n, Dtype dtype, float* out) {
  with_dtype(dtype, [&]<class T>() {
    by_vectors(n, [&](int64_t i, int lanes) {
      store_some(out + i, load_some(static_cast<const T*>(x) + i, lanes), lanes);
    });
  });
}

void combine_rows(const float* x, int64_t stride, const float* by, int64_t by_stride, int64_t count,
                  int64_t n, Dtype dtype, void* out) {
  with_dtype(dtype, [&]<class T>() {
    by_vectors(n, [&](int64_t i, int lanes) {
      VF sum = set1(0.0f);
      for (int64_t c = 0; c < count; ++c)
        sum = fma(set1(by[c * by_stride]), load_some(x + c * stride + i, lanes), sum);
      store_some(static_cast<T*>(out) + i, sum, lanes);
    });
  });
}

double pair_losses(const float* pos, const float* neg, const float* margin, float center, int64_t n,
                   float* delta, float* of_pos, float* of_neg) {
  constexpr int64_t kBlock = 128;  // summed in float32
  double total = 0.0;
  const VF zero = set1(0.0f), by = set1(center);
  const PairSlopes slopes(1.0f / static_cast<float>(n), center);
  for (int64_t first = 0; first < n; first += kBlock) {
    VF sum = zero;
    by_vectors(n - first < kBlock ? n - first : kBlock, [&](int64_t j, int lanes) {
      const int64_t i = first + j;
      const PairLanes t(pos, neg, margin, center, i, lanes);
      const VF loss = vmax(zero, zero - t.x) + log_of_one_plus(t.e) + by * (t.sum * t.sum);
      const VM there = lt(iota(), seti(static_cast<uint32_t>(lanes)));
      sum = sum + select(there, loss, zero);
      store_some(delta + i, load_some(pos + i, lanes) - load_some(neg + i, lanes), lanes);
      if (of_pos != nullptr) slopes.write(t, i, lanes, of_pos, of_neg);
    });
    total += static_cast<double>(hsum(sum));
  }
  return total;
}

TENFOLD_ISA_END
