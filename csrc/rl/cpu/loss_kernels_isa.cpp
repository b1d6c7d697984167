// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "core/cpu/math.h"
#include "core/cpu/vec.h"
#include "rl/cpu/loss_kernels.h"
#include "rl/cpu/row_kernels.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kBlock = 1024;

// e^x for |x| <= 20: what log2(e) has beyond its float is added to the exponent's rest.
inline VF exp_of(VF x) {
  const VF log2e = set1(kLog2e), n = rint(x * log2e);
  const VF rest = fused(x, log2e, set1(0.0f) - n);
  return exp2_of_parts(n, fma(x, set1(1.9259629e-8f), rest));
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

struct RunTokens {
  int64_t count, segments;  // valid ones; -1: not as policy_runs wants them
  double log_ratio;
};

// All that a row of macro actions reads, in one pass: four streams from memory at a time, where one
// after the other would each wait for its own. d = now - old, and a copy of adv.
inline RunTokens read_runs(const PolicyParams<float>& p, const int32_t* seg, int64_t limit,
                           const Span& row, float* d, float* a, uint32_t* ends) {
  const float *now = p.now + row.begin, *old = p.old + row.begin, *adv = p.adv + row.begin;
  const float* const slope = p.slope != nullptr ? p.slope + row.begin : nullptr;
  const VI most = seti(static_cast<uint32_t>(limit)), one = seti(1);
  RunTokens all{0, 0, 0.0};
  uint32_t wrong = row.width > 0 && static_cast<uint32_t>(seg[0]) < limit && seg[0] != 0 ? 1u : 0u;
  for (int64_t first = 0; first < row.width; first += kBlock) {
    const int64_t end = first + kBlock < row.width ? first + kBlock : row.width;
    VF sum = zero();
    for (int64_t j = first; j < end; j += kWidth) {
      const int n = static_cast<int>(end - j < kWidth ? end - j : kWidth);
      const int64_t later = row.width - j - 1;
      const VI s = load_ids(seg + j, n);
      const VI next = load_ids(seg + j + 1, static_cast<int>(later < kWidth ? later : kWidth));
      const VM valid = above(most, s), goes_on = above(most, next);
      const VM step = above(next, s);
      // After each of these tokens: another valid one, of this segment or the next.
      const uint32_t is = bits_of(valid), then = bits_of(goes_on), steps = bits_of(step);
      wrong |= then & (~is | bits_of(above(next - s, one)));
      all.count += __builtin_popcount(is);
      all.segments += store_chosen(ends + all.segments, lanes_of(is & (steps | ~then)),
                                   iota() + seti(static_cast<uint32_t>(j + 1)));
      const VF diff = chosen(valid, load_some(now + j, n) - load_some(old + j, n));
      sum = sum + diff;
      store(d + j, diff);
      store(a + j, chosen(valid, load_some(adv + j, n)));
      if (slope != nullptr) __builtin_prefetch(slope + j, 1);
    }
    all.log_ratio += static_cast<double>(hsum(sum));
  }
  if (wrong != 0) all.count = -1;
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
      if (!any(valid)) {  // padding, of which nothing else is read
        if (slope != nullptr) store_some(slope + j, zero(), n);
        continue;
      }
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

bool policy_runs(const PolicyParams<float>& p, const int32_t* seg, int64_t limit, const Span& row,
                 const PolicyRunMemory& memory, RowSums* sums) {
  const int64_t room = row.width + 16;
  float *const d = memory.work, *const a = d + room, *const sum_d = a + room,
               *const sum_a = sum_d + room;
  const RunTokens tokens = read_runs(p, seg, limit, row, d, a, memory.ends);
  if (tokens.count < 0) return false;
  run_sums(seg, memory.ends, tokens.segments, d, a, sum_d, sum_a, memory.length);
  *sums = policy_terms(p.rule, sum_d, sum_a, memory.length, tokens.segments);
  sums->tokens = static_cast<double>(tokens.count), sums->log_ratio = tokens.log_ratio;
  if (p.slope != nullptr)
    spread_runs(memory.ends, tokens.segments, sum_d, nullptr, p.slope + row.begin, nullptr);
  return true;
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
      if (!any(valid)) {  // padding, of which nothing else is read
        if (slope != nullptr) store_some(slope + j, zero(), n);
        continue;
      }
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
