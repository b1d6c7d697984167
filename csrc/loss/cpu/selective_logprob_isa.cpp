#include "core/cpu/math.h"
#include "core/cpu/vec.h"
#include "loss/selective_logprob.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr float kLowest = -3.402823466e38f;

template <class T>
inline VF scaled(const T* p, int64_t n, VF scale) {  // beyond n: lowest, which weighs nothing
  if (n >= kWidth) return load(p) * scale;
  const VM there = lt(iota(), seti(static_cast<uint32_t>(n)));
  return select(there, load_n(p, static_cast<int>(n)) * scale, from_bits(seti(0xFF800000u)));
}

template <class T>
LogitSums sums_of(const T* p, int64_t n, float by) {
  const VF scale = set1(by), lowest = set1(kLowest);
  LogitSums all{-INFINITY, 0.0, 0.0};
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    const int64_t end = begin + kLogitBlock < n ? begin + kLogitBlock : n;
    VF top[2] = {lowest, lowest};
    int64_t i = begin;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      top[0] = vmax(top[0], load(p + i) * scale);
      top[1] = vmax(top[1], load(p + i + kWidth) * scale);
    }
    for (; i < end; i += kWidth) top[0] = vmax(top[0], scaled(p + i, end - i, scale));
    // Never -inf: differences stay numbers, and what is -inf weighs nothing.
    const float max = hmax(vmax(top[0], top[1]));
    const VF shift = set1(max);
    VF sum[2] = {set1(0.0f), set1(0.0f)}, weighted[2] = {set1(0.0f), set1(0.0f)};
    const auto add = [&](int lane, VF x) {
      const VF d = x - shift, e = exp(d);
      sum[lane] = sum[lane] + e;
      // Not -inf times 0.
      weighted[lane] = fma(select(lt(d, lowest), set1(0.0f), d), e, weighted[lane]);
    };
    for (i = begin; i + 2 * kWidth <= end; i += 2 * kWidth) {
      add(0, load(p + i) * scale);
      add(1, load(p + i + kWidth) * scale);
    }
    for (; i < end; i += kWidth) add(0, scaled(p + i, end - i, scale));
    const float total = hsum(sum[0] + sum[1]);
    if (total == 0.0f) continue;  // all of them -inf
    const LogitSums block{max, total, hsum(weighted[0] + weighted[1])};
    all = join(all, block);
  }
  return all;
}

template <class T>
void grad_of(const T* p, int64_t n, float by, const LogitGrad& g, T* out) {
  const VF scale = set1(by), lse = set1(g.lse);
  const VF of_p = set1(g.of_p * g.scale), of_entropy = set1(g.of_entropy * g.scale);
  const VF entropy = set1(g.entropy), most = set1(-kLowest);
  for (int64_t i = 0; i < n; i += kWidth) {
    const VF log_p = scaled(p + i, n - i, scale) - lse, e = exp(log_p);
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
  if (dtype == Dtype::f32) return sums_of(static_cast<const float*>(logits), n, scale);
  if (dtype == Dtype::bf16) return sums_of(static_cast<const bf16_t*>(logits), n, scale);
  return sums_of(static_cast<const fp16_t*>(logits), n, scale);
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
