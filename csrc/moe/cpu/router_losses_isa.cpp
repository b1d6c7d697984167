// SPDX-License-Identifier: Apache-2.0
#include "moe/cpu/token_tile.h"
#include "moe/router_losses.h"

TENFOLD_ISA_BEGIN
namespace {

// s_t and the softmax of a tile.
struct BalanceTile {
  float *tile, *staged;
  TileSoftmax softmax;

  BalanceTile(float* scratch, int64_t n) : tile(scratch) {
    staged = tile + round_up(n, 8) * kGateTokens;
    float* const rest = staged + round_up(n, 8) * 8;
    softmax = {rest, rest + kGateTokens, rest + 2 * kGateTokens};
  }

  template <class T>
  void read(const BalanceParams& p, const T* x, int64_t rows) const {
    load_tile(x, p.stride, rows, p.experts, staged, tile);
    tile_softmax(tile, p.experts, p.share, softmax);
  }
};

inline bool counts(const BalanceParams& p, int64_t token) {
  return p.mask == nullptr || p.mask[token] != 0;
}

template <class T>
void balance_grad_row(const BalanceParams& p, const T* x, float largest, float factor, float mean,
                      T* out) {
  const int64_t n = p.experts;
  for (int64_t e = 0; e < n; e += kWidth) {
    const int left = static_cast<int>(n - e < kWidth ? n - e : kWidth);
    const VF y = exp(load_some(x + e, left) - set1(largest)) * set1(factor);
    store_n(out + e, y * (load_n(p.share + e, left) - set1(mean)), left);
  }
}

template <class T>
void dots_of(const void* const* rows, int64_t count, int64_t d, const float* r, float* z) {
  VF sum[kSeedGroup];
  for (auto& s : sum) s = set1(0.0f);
  if (count == kSeedGroup) {
    int64_t c = 0;
    for (; c + kWidth <= d; c += kWidth) {
      const VF y = load(r + c);
#pragma GCC unroll 8
      for (int i = 0; i < kSeedGroup; ++i)
        sum[i] = fma(load(static_cast<const T*>(rows[i]) + c), y, sum[i]);
    }
    if (c < d) {
      const VF y = load_some(r + c, d - c);
#pragma GCC unroll 8
      for (int i = 0; i < kSeedGroup; ++i)
        sum[i] = fma(load_some(static_cast<const T*>(rows[i]) + c, d - c), y, sum[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < d; c += kWidth)
        sum[i] = fma(load_some(static_cast<const T*>(rows[i]) + c, d - c), load_some(r + c, d - c),
                     sum[i]);
  }
  hsum4(sum[0], sum[1], sum[2], sum[3], z);
  hsum4(sum[4], sum[5], sum[6], sum[7], z + 4);
}

template <class T>
void add_of(const void* const* rows, int64_t count, int64_t d, const float* slope, float* part) {
  int64_t c = 0;
  if (count == kSeedGroup) {
    for (; c + kWidth <= d; c += kWidth) {
      VF sum = load(part + c);
#pragma GCC unroll 8
      for (int i = 0; i < kSeedGroup; ++i)
        sum = fma(set1(slope[i]), load(static_cast<const T*>(rows[i]) + c), sum);
      store(part + c, sum);
    }
  }
  for (; c < d; c += kWidth) {
    const int left = static_cast<int>(d - c < kWidth ? d - c : kWidth);
    VF sum = load_n(part + c, left);
    for (int64_t i = 0; i < count; ++i)
      sum = fma(set1(slope[i]), load_some(static_cast<const T*>(rows[i]) + c, left), sum);
    store_n(part + c, sum, left);
  }
}

template <class T>
void scale_of(const float* r, float by, int64_t d, T* out) {
  const VF w = set1(by);
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) store_quick(out + c, w * load(r + c));
  const int left = static_cast<int>(d - c);
  if (left > 0) store_n(out + c, w * load_n(r + c, left), left);
}

}  // namespace

double balance_sum(const BalanceParams& p, int64_t begin, int64_t end, float* scratch) {
  const BalanceTile tile(scratch, p.experts);
  double sum = 0.0;
  for (; begin < end; begin += kGateTokens) {
    const int64_t rows = end - begin < kGateTokens ? end - begin : kGateTokens;
    with_rows(p.logits, p.dtype, p.stride, begin, [&](const auto* x) { tile.read(p, x, rows); });
    for (int64_t t = 0; t < rows; ++t)
      if (counts(p, begin + t)) sum += static_cast<double>(tile.softmax.mean[t]);
  }
  return sum;
}

void balance_grad(const BalanceParams& p, float by, int64_t begin, int64_t end, void* out,
                  float* scratch) {
  const BalanceTile tile(scratch, p.experts);
  const int64_t n = p.experts;
  for (; begin < end; begin += kGateTokens) {
    const int64_t rows = end - begin < kGateTokens ? end - begin : kGateTokens;
    with_rows(p.logits, p.dtype, p.stride, begin, [&]<class T>(const T* x) {
      tile.read(p, x, rows);
      for (int64_t t = 0; t < rows; ++t) {
        T* const row = static_cast<T*>(out) + (begin + t) * n;
        if (counts(p, begin + t)) {
          balance_grad_row(p, x + t * p.stride, tile.softmax.largest[t],
                           tile.softmax.factor[t] * by, tile.softmax.mean[t], row);
        } else {
          __builtin_memset(row, 0, static_cast<uint64_t>(n) * sizeof(T));
        }
      }
    });
  }
}

void seed_dots(const void* const* rows, int64_t count, Dtype dtype, int64_t d, const float* r,
               float* z) {
  if (dtype == Dtype::f32) return dots_of<float>(rows, count, d, r, z);
  if (dtype == Dtype::bf16) return dots_of<bf16_t>(rows, count, d, r, z);
  dots_of<fp16_t>(rows, count, d, r, z);
}

void seed_add(const void* const* rows, int64_t count, Dtype dtype, int64_t d, const float* slope,
              float* part) {
  if (dtype == Dtype::f32) return add_of<float>(rows, count, d, slope, part);
  if (dtype == Dtype::bf16) return add_of<bf16_t>(rows, count, d, slope, part);
  add_of<fp16_t>(rows, count, d, slope, part);
}

void seed_scale(const float* r, float by, int64_t d, Dtype dtype, void* out) {
  if (dtype == Dtype::f32) return scale_of(r, by, d, static_cast<float*>(out));
  if (dtype == Dtype::bf16) return scale_of(r, by, d, static_cast<bf16_t*>(out));
  scale_of(r, by, d, static_cast<fp16_t*>(out));
}

void seed_widen(const void* r, Dtype dtype, int64_t d, float* out) {
  const auto all = [&](const auto* from) {
    for (int64_t c = 0; c < d; c += kWidth)
      store_n(out + c, load_some(from + c, d - c),
              static_cast<int>(d - c < kWidth ? d - c : kWidth));
  };
  with_rows(r, dtype, 0, 0, all);
}

TENFOLD_ISA_END
