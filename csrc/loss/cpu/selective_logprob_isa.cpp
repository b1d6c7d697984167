// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/math.h"
#include "core/cpu/read_ahead.h"
#include "loss/selective_logprob.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr float kLowest = -3.402823466e38f;

template <class T>
inline VF logits_at(const T* p, int64_t n) {  // beyond n: -inf, which weighs nothing
  if (n >= kWidth) return load(p);
  const VM there = lt(iota(), seti(static_cast<uint32_t>(n)));
  return select(there, load_n(p, static_cast<int>(n)), from_bits(seti(0xFF800000u)));
}

inline float scaled_max(VF top, float scale) {
  const float max = hmax(top) * scale;
  // Never -inf: differences stay numbers, and what is -inf weighs nothing.
  return max < kLowest ? kLowest : max;
}

template <class T>
float max_of(const T* p, int64_t n, float scale) {
  VF top[2] = {set1(kLowest), set1(kLowest)};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth)
    for (int k = 0; k < 2; ++k) top[k] = vmax(top[k], load(p + i + k * kWidth));
  for (; i < n; i += kWidth) top[0] = vmax(top[0], logits_at(p + i, n - i));
  return scaled_max(vmax(top[0], top[1]), scale);
}

constexpr int kSums = 4;            // at a time: short chains of additions, for exactness
constexpr double kNothing = 1e-30;  // weights of logits that are far below the shift, or -inf
constexpr double kNaturalOfBinary = 0.6931471805599453, kBinaryOfNatural = 1.4426950408889634;

struct BlockSums {
  float max;             // the true maximum
  double sum, weighted;  // relative to the shift
};

// The exponent to base 2 is split by adding a number after which no bits are left for a fraction;
// its whole part goes into the bits of the power of the rest. What is below the floor, -inf too,
// weighs 2^-125.
template <bool kScaled, class T>
BlockSums block_sums(const T* p, int64_t n, float by, float shift) {
  const VF scale = set1(by), from = set1(shift), log2e = set1(kLog2e), floor = set1(-125.0f);
  const VF whole = set1(12582912.0f);  // 1.5 * 2^23
  VF top[kSums], sum[kSums], weighted[kSums];
  for (int k = 0; k < kSums; ++k) top[k] = set1(kLowest), sum[k] = weighted[k] = set1(0.0f);
  const auto add = [&](int k, VF x) {
    top[k] = vmax(top[k], x);
    const VF t = vmax(floor, ((kScaled ? x * scale : x) - from) * log2e), moved = t + whole;
    const VF e = from_bits(bits(exp2_of_rest(t - (moved - whole))) + shl<23>(bits(moved)));
    sum[k] = sum[k] + e;
    weighted[k] = fma(t, e, weighted[k]);
  };
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
    read_ahead<kSums * kWidth>(p + i);
    for (int k = 0; k < kSums; ++k) add(k, load(p + i + k * kWidth));
  }
  for (; i < n; i += kWidth) add(0, logits_at(p + i, n - i));
  for (int step = kSums / 2; step > 0; step /= 2)
    for (int k = 0; k < step; ++k) {
      top[k] = vmax(top[k], top[k + step]), sum[k] = sum[k] + sum[k + step];
      weighted[k] = weighted[k] + weighted[k + step];
    }
  BlockSums all{scaled_max(top[0], by), hsum(sum[0]), hsum(weighted[0]) * kNaturalOfBinary};
  if (std::fabs(all.weighted) < kNothing) all.weighted = 0.0;
  // A NaN may have lost its bits in the power, but not in the product.
  if (all.weighted != all.weighted) all.sum = all.weighted;
  // log2 e is rounded to a float: exponents are too large by this share of themselves.
  constexpr double kShare = kLog2e / kBinaryOfNatural - 1.0;
  all.sum -= kShare * all.weighted;
  return all;
}

// One pass, as the maximum of earlier blocks is nearly always near enough: only a block that
// exceeds it by more is summed again, from the cache.
constexpr float kHeadroom = 8.0f;

template <bool kScaled, class T>
LogitSums sums_of(const T* p, int64_t n, float scale) {
  LogitSums all{-INFINITY, 0.0, 0.0};
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    const int64_t some = begin + kLogitBlock < n ? kLogitBlock : n - begin;
    const bool first = !(all.max > -INFINITY);
    float shift = first ? max_of(p + begin, some, scale) : static_cast<float>(all.max);
    BlockSums block = block_sums<kScaled>(p + begin, some, scale, shift);
    if (block.max > shift + kHeadroom) {
      shift = block.max;
      block = block_sums<kScaled>(p + begin, some, scale, shift);
    }
    if (block.sum < kNothing) continue;
    const LogitSums part{shift, block.sum, block.weighted};
    if (first || part.max > all.max) {
      all = join(all, part);
    } else {
      all.sum += part.sum, all.weighted += part.weighted;
    }
  }
  return all;
}

template <class T>
void grad_of(const T* p, int64_t n, float by, const LogitGrad& g, T* out) {
  const VF scale = set1(by), lse = set1(g.lse);
  const VF of_p = set1(g.of_p * g.scale), of_entropy = set1(g.of_entropy * g.scale);
  const VF entropy = set1(g.entropy), most = set1(-kLowest);
  for (int64_t i = 0; i < n; i += kWidth) {
    if (i % (64 / static_cast<int64_t>(sizeof(T))) == 0) read_ahead<kWidth>(p + i);
    const VF log_p = logits_at(p + i, n - i) * scale - lse, e = exp(log_p);
    const VF d = set1(0.0f) - (entropy + log_p);  // infinite where p is 0
    const VF y = e * fma(of_entropy, select(lt(most, d), set1(0.0f), d), of_p);
    if (n - i >= kWidth) {
      store(out + i, y);
    } else {
      store_n(out + i, y, static_cast<int>(n - i));
    }
  }
}

}  // namespace

LogitSums logit_sums(const void* logits, Dtype dtype, int64_t n, float scale) {
  const auto sums = [&]<class T>(const T* p) {
    return scale == 1.0f ? sums_of<false>(p, n, scale) : sums_of<true>(p, n, scale);
  };
  if (dtype == Dtype::f32) return sums(static_cast<const float*>(logits));
  if (dtype == Dtype::bf16) return sums(static_cast<const bf16_t*>(logits));
  return sums(static_cast<const fp16_t*>(logits));
}

void logit_grad(const void* logits, Dtype dtype, int64_t n, float scale, const LogitGrad& g,
                void* out) {
  if (dtype == Dtype::f32)
    return grad_of(static_cast<const float*>(logits), n, scale, g, static_cast<float*>(out));
  if (dtype == Dtype::bf16)
    return grad_of(static_cast<const bf16_t*>(logits), n, scale, g, static_cast<bf16_t*>(out));
  grad_of(static_cast<const fp16_t*>(logits), n, scale, g, static_cast<fp16_t*>(out));
}

void round_one(float x, Dtype dtype, void* out) {
  if (dtype == Dtype::bf16) return store_n(static_cast<bf16_t*>(out), set1(x), 1);
  store_n(static_cast<fp16_t*>(out), set1(x), 1);
}

TENFOLD_ISA_END
