#include <cstring>

#include "core/cpu/math.h"
#include "core/cpu/vec.h"
#include "rl/cpu/loss_kernels.h"
#include "rl/cpu/row_kernels.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kBlock = 1024;

// e^x for |x| <= 20: the error of x log2(e) is carried along.
inline VF exp_of(VF x) {
  const VF log2e = set1(kLog2e), t = x * log2e;
  const VF lost = fused(x, log2e, set1(0.0f) - t) + x * set1(1.9259629e-8f);
  const VF y = exp2(t);
  return fma(y, lost * set1(kLn2), y);
}

inline VF zero() {
  return set1(0.0f);
}

inline VF chosen(VM m, VF x) {
  return select(m, x, zero());
}

inline int64_t count_of(VM m) {
  return __builtin_popcount(bits_of(m));
}

inline VI load_ids(const int32_t* p, int n) {  // beyond n: masked
  if (n >= kWidth) return load(reinterpret_cast<const uint32_t*>(p));
  const VM there = lt(iota(), seti(static_cast<uint32_t>(n)));
  return select(there, load_n(reinterpret_cast<const uint32_t*>(p), n), seti(0xFFFFFFFFu));
}

inline VI load_mask(const uint8_t* p, int n) {
  if (n >= kWidth) return load_bytes(p);
  uint8_t bytes[kWidth] = {};
  for (int i = 0; i < n; ++i) bytes[i] = p[i];
  return load_bytes(bytes);
}

inline VF load_some(const float* p, int n) {
  return n >= kWidth ? load(p) : load_n(p, n);
}

inline void store_some(float* p, VF x, int n) {
  if (n >= kWidth) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

// Of log-ratios d and advantages a, 0 where `valid` is not: policy_term, lane by lane.
struct PolicyLanes {
  VF low, high, bound;
  VF q, loss, slope;
  VM is_high, is_low;

  explicit PolicyLanes(const PolicyRule& rule)
      : low(set1(static_cast<float>(1.0 - rule.eps_lo))),
        high(set1(static_cast<float>(1.0 + rule.eps_hi))),
        bound(set1(static_cast<float>(kLogRatioBound))) {}

  inline void step(VF d, VF a) {
    // The second operand of vmax and vmin is what survives if one is NaN.
    q = exp_of(vmin(bound, vmax(zero() - bound, d)));
    const VF plain = zero() - a * q, other = zero() - a * vmin(high, vmax(low, q));
    is_high = both(gt(a, zero()), gt(q, high)), is_low = both(lt(a, zero()), lt(q, low));
    loss = vmax(other, plain);
    slope = select(is_high, zero(), select(is_low, zero(), plain));
    slope = select(gt(vmax(d, zero() - d), bound), zero(), slope);
  }
};

// Sums of a block of terms, lane by lane.
struct PolicyLaneSums {
  VF loss = zero(), ratio = zero(), most = zero();
  int64_t terms = 0, above_high = 0, below_low = 0;

  inline void add(const PolicyLanes& t, VM valid) {
    const VF q = chosen(valid, t.q);
    ratio = ratio + q, most = vmax(q, most);
    terms += count_of(valid), above_high += count_of(t.is_high), below_low += count_of(t.is_low);
  }
  inline void flush(RowSums* all) const {
    all->loss += static_cast<double>(hsum(loss)), all->ratio += static_cast<double>(hsum(ratio));
    all->terms += static_cast<double>(terms);
    all->high += static_cast<double>(above_high), all->low += static_cast<double>(below_low);
    const double top = static_cast<double>(hmax(most));
    all->most = top > all->most ? top : all->most;
  }
};

// now - old, and their sum.
inline double log_ratios(const float* now, const float* old, int64_t n, float* out) {
  double all = 0.0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = first + kBlock < n ? first + kBlock : n;
    VF sum = zero();
    for (int64_t j = first; j < end; j += kWidth) {
      const int some = static_cast<int>(end - j < kWidth ? end - j : kWidth);
      const VF d = load_some(now + j, some) - load_some(old + j, some);
      sum = sum + d;
      store_some(out + j, d, some);
    }
    all += static_cast<double>(hsum(sum));
  }
  return all;
}

// Of macro actions, from sums over their tokens. The weighted slopes by a token's log-ratio take
// the place of those in log_ratio.
inline RowSums policy_terms(const PolicyRule& rule, float* log_ratio, const float* adv,
                            const int32_t* length, int64_t count) {
  PolicyLanes term(rule);
  const VF one = set1(1.0f);
  const bool geo_mean = rule.ratio == RatioBy::geo_mean;
  RowSums all;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = first + kBlock < count ? first + kBlock : count;
    PolicyLaneSums sums;
    VF weights = zero();
    for (int64_t j = first; j < end; j += kWidth) {
      const int n = static_cast<int>(end - j < kWidth ? end - j : kWidth);
      const VM valid = lt(iota(), seti(static_cast<uint32_t>(n)));
      const VF tokens = select(valid, to_float(load_ids(length + j, n)), one);
      const VF share = one / tokens, by = geo_mean ? share : one;
      const VF weight = rule.by_length ? tokens : one;
      term.step(load_some(log_ratio + j, n) * by, load_some(adv + j, n) * share);
      sums.loss = fma(weight, chosen(valid, term.loss), sums.loss);
      weights = weights + chosen(valid, weight);
      sums.add(term, valid);
      store_some(log_ratio + j, weight * by * term.slope, n);
    }
    sums.flush(&all);
    all.weight += static_cast<double>(hsum(weights));
  }
  return all;
}

}  // namespace

RowSums policy_tokens(const PolicyParams<float>& p, const int32_t* seg, int64_t width,
                      int64_t begin) {
  const float *now = p.now + begin, *old = p.old + begin, *adv = p.adv + begin;
  float* const slope = p.slope != nullptr ? p.slope + begin : nullptr;
  PolicyLanes term(p.rule);
  const VI limit = seti(static_cast<uint32_t>(width));
  RowSums all;
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t end = first + kBlock < width ? first + kBlock : width;
    PolicyLaneSums sums;
    VF log_ratio = zero();
    for (int64_t j = first; j < end; j += kWidth) {
      const int n = static_cast<int>(end - j < kWidth ? end - j : kWidth);
      const VM valid = above(limit, load_ids(seg + j, n));
      const VF d = chosen(valid, load_some(now + j, n) - load_some(old + j, n));
      const VF a = chosen(valid, load_some(adv + j, n));
      term.step(d, a);
      sums.loss = sums.loss + term.loss, log_ratio = log_ratio + d;
      sums.add(term, valid);
      if (slope != nullptr) store_some(slope + j, chosen(valid, term.slope), n);
    }
    sums.flush(&all);
    all.log_ratio += static_cast<double>(hsum(log_ratio));
  }
  all.weight = all.tokens = all.terms;
  return all;
}

RowSums policy_runs(const PolicyRule& rule, const int32_t* seg, int64_t n, const float* now,
                    const float* old, const float* adv, float* work, uint32_t* ends,
                    int32_t* length, float* slope) {
  const int64_t room = n + 16;
  float *const d = work, *const a = d + room, *const sum_d = a + room, *const sum_a = sum_d + room;
  const double log_ratio = log_ratios(now, old, n, d);
  memcpy(a, adv, static_cast<size_t>(n) * sizeof(float));
  const int64_t count = consecutive_sums(seg, n, d, a, ends, sum_d, sum_a, length);
  RowSums all = policy_terms(rule, sum_d, sum_a, length, count);
  all.tokens = static_cast<double>(n), all.log_ratio = log_ratio;
  if (slope != nullptr) spread_runs(ends, count, sum_d, nullptr, slope, nullptr);
  return all;
}

RowSums value_tokens(const ValueParams<float>& p, int64_t width, int64_t begin) {
  const float *now = p.now + begin, *old = p.old + begin, *ret = p.ret + begin;
  const uint8_t* mask = p.mask + begin;
  float* const slope = p.slope != nullptr ? p.slope + begin : nullptr;
  const VF clip = set1(static_cast<float>(p.clip));
  RowSums all;
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t end = first + kBlock < width ? first + kBlock : width;
    VF loss = zero(), error = zero();
    int64_t tokens = 0, count = 0;
    for (int64_t j = first; j < end; j += kWidth) {
      const int n = static_cast<int>(end - j < kWidth ? end - j : kWidth);
      const VM valid = above(load_mask(mask + j, n), seti(0));
      const VF v = chosen(valid, load_some(now + j, n)), o = chosen(valid, load_some(old + j, n));
      const VF r = chosen(valid, load_some(ret + j, n));
      const VF bounded = vmin(o + clip, vmax(o - clip, v));
      const VF a = v - r, b = bounded - r, aa = a * a, bb = b * b;
      const VM clipped = gt(bb, aa);
      loss = loss + select(clipped, bb, aa), error = error + aa;
      tokens += count_of(valid), count += count_of(clipped);
      if (slope == nullptr) continue;
      // Where the bound holds, the worse term does not depend on the value.
      const VF s = select(clipped, select(eq(bounded, v), b, zero()), a);
      store_some(slope + j, chosen(valid, s), n);
    }
    all.loss += 0.5 * static_cast<double>(hsum(loss));
    all.ratio += static_cast<double>(hsum(error));
    all.weight += static_cast<double>(tokens), all.high += static_cast<double>(count);
  }
  return all;
}

void scale_slopes(const float* slope, int64_t n, double by, float* out) {
  const VF scale = set1(static_cast<float>(by));
  for (int64_t j = 0; j < n; j += kWidth) {
    const int some = static_cast<int>(n - j < kWidth ? n - j : kWidth);
    const VF x = load_some(slope + j, some);
    store_some(out + j, select(eq(x, zero()), zero(), x * scale), some);
  }
}

void scale_slopes(const double* slope, int64_t n, double by, double* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = slope[j] == 0.0 ? 0.0 : slope[j] * by;
}

TENFOLD_ISA_END
