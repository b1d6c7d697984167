// SPDX-License-Identifier: Apache-2.0
#include "merge/cpu/delta_sums.h"
#include "merge/cpu/ties.h"

TENFOLD_ISA_BEGIN
namespace {

enum class Work : int { find, sum, mean };  // the cuts only, or with the merged result

// Lanes of two vectors as bits in the order of their elements: the even ones, then the odd ones, or
// one vector after the other.
inline uint64_t spread_bits(uint64_t x) {
  constexpr uint64_t kKept[] = {0x0000FFFF0000FFFFu, 0x00FF00FF00FF00FFu, 0x0F0F0F0F0F0F0F0Fu,
                                0x3333333333333333u, 0x5555555555555555u};
  for (int step = 0; step < 5; ++step) x = (x | x << (16 >> step)) & kKept[step];
  return x;
}
template <class T>
inline uint64_t bits_in_order(uint32_t first, uint32_t second) {
  if constexpr (kSplit<T>) return spread_bits(first) | spread_bits(second) << 1;
  return first | uint64_t{second} << kWidth;
}

template <class T, Work kWork>
class Pass {
 public:
  Pass(const DeltaMerge& m, const TiesLimits& limits) : m_(m), limits_(limits) {}

  int64_t run(int64_t begin, int64_t end, uint16_t* at, int64_t* above) {
    const bool past = m_.past_caches && is_aligned(static_cast<const T*>(m_.out) + begin);
    int64_t found = 0, i = begin;
    const auto note = [&](uint64_t between) {
      for (; between != 0; between &= between - 1)
        at[found++] = static_cast<uint16_t>(i - begin + __builtin_ctzll(between));
    };
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) note(two(i, past));
    for (; i < end; i += kWidth)
      note(few(i, static_cast<int>(end - i < kWidth ? end - i : kWidth)));
    for (int e = 0; e < m_.experts; ++e) above[e] += above_[e];
    return found;
  }

 private:
  static constexpr Mix kMix = kWork == Work::mean ? Mix::elected_mean : Mix::elected_sum;

  // Elements i .. i + 2 kWidth - 1. Bits of those in between.
  uint64_t two(int64_t i, bool past) {
    VF base[2], x[2];
    get_next_two<false>(static_cast<const T*>(m_.base) + i, base);
    Sums<kMix> sums[2];
    uint32_t between[2] = {0, 0};
    for (int e = 0; e < m_.experts; ++e) {
      get_next_two<false>(static_cast<const T*>(m_.expert[e]) + i, x);
      const VI below = seti(static_cast<uint32_t>(limits_.below[e]));
      const VI last = seti(static_cast<uint32_t>(limits_.last[e]));
      const VF weight = set1(m_.weight[e]), share = set1(m_.share[e]);
      uint64_t all = 0;
      for (int k = 0; k < 2; ++k) {
        const VF d = x[k] - base[k];
        const VI magnitude = bits(d) & seti(0x7FFFFFFFu);
        const VM over = lt(last, magnitude);
        all |= uint64_t{bits_of(over)} << (k * kWidth);
        between[k] |= bits_of(lt(below, magnitude)) ^ bits_of(over);
        if constexpr (kWork != Work::find) sums[k].template add<false>(over, d, weight, share);
      }
      above_[e] += static_cast<uint32_t>(__builtin_popcountll(all));
    }
    if constexpr (kWork != Work::find) {
      for (int k = 0; k < 2; ++k) x[k] = sums[k].result(base[k], set1(m_.lambda));
      put_two<false>(static_cast<T*>(m_.out) + i, x, past);
    }
    if ((between[0] | between[1]) == 0) [[likely]]
      return 0;
    return bits_in_order<T>(between[0], between[1]);
  }

  // Elements i .. i + n - 1, n <= kWidth.
  uint64_t few(int64_t i, int n) {
    const VF base = load_n(static_cast<const T*>(m_.base) + i, n);
    const uint32_t valid = n == kWidth ? bits_of(eq(seti(0), seti(0))) : (1u << n) - 1;
    Sums<kMix> sums;
    uint32_t between = 0;
    for (int e = 0; e < m_.experts; ++e) {
      const VF d = load_n(static_cast<const T*>(m_.expert[e]) + i, n) - base;
      const VI magnitude = bits(d) & seti(0x7FFFFFFFu);
      const VM over = lt(seti(static_cast<uint32_t>(limits_.last[e])), magnitude);
      const VM reached = lt(seti(static_cast<uint32_t>(limits_.below[e])), magnitude);
      above_[e] += static_cast<uint32_t>(__builtin_popcount(bits_of(over) & valid));
      between |= (bits_of(reached) ^ bits_of(over)) & valid;
      sums.template add<false>(over, d, set1(m_.weight[e]), set1(m_.share[e]));
    }
    if constexpr (kWork != Work::find)
      store_n(static_cast<T*>(m_.out) + i, sums.result(base, set1(m_.lambda)), n);
    return between;
  }

  const DeltaMerge& m_;
  const TiesLimits& limits_;
  uint32_t above_[kMaxExperts] = {};
};

}  // namespace

int64_t ties_block(const DeltaMerge& m, const TiesLimits& limits, bool merge, int64_t begin,
                   int64_t end, uint16_t* at, int64_t* above) {
  int64_t found = 0;
  with_type(m.dtype, [&]<class T>(T) {
    if (!merge) {
      found = Pass<T, Work::find>(m, limits).run(begin, end, at, above);
    } else if (m.normalize) {
      found = Pass<T, Work::mean>(m, limits).run(begin, end, at, above);
    } else {
      found = Pass<T, Work::sum>(m, limits).run(begin, end, at, above);
    }
  });
  if (merge && m.past_caches) stream_fence();
  return found;
}

TENFOLD_ISA_END
