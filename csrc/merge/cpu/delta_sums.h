// SPDX-License-Identifier: Apache-2.0
// What the kernels that merge task vectors share: magnitudes as keys, and the sums over the
// experts. For ISA sources.
#pragma once

#include "core/cpu/pairs.h"
#include "merge/delta_merge.h"

TENFOLD_ISA_BEGIN
namespace {

inline VI magnitude_key(VF d) {
  const VI key = (bits(d) & seti(0x7FFFFFFFu)) + seti(1);
  return select(unordered(d), seti(0x80000000u), key);
}

enum class Mix : int { plain, elected_sum, elected_mean };

// The sums of one vector of elements over the experts.
template <Mix kMix>
struct Sums {
  VF sum = set1(-0.0f), negative = set1(-0.0f);  // plain: only the first
  VF shares = set1(0.0f), negative_shares = set1(0.0f);

  template <bool kAll>
  inline void add(VM kept, VF d, VF weight, VF share) {
    const VF zero = set1(0.0f);
    if constexpr (kMix == Mix::plain) {
      const VF added = fused(weight, d, sum);
      sum = kAll ? added : select(kept, added, sum);
      return;
    }
    const VF v = kAll ? weight * d : select(kept, weight * d, zero);
    sum = sum + vmax(zero, v);  // NaN is the second operand, so it reaches both sums
    negative = negative + vmin(zero, v);
    if constexpr (kMix == Mix::elected_mean) {
      shares = select(gt(v, zero), shares + share, shares);
      negative_shares = select(lt(v, zero), negative_shares + share, negative_shares);
    }
  }

  inline VF result(VF base, VF lambda) const {
    if constexpr (kMix == Mix::plain) return base + sum;
    const VF zero = set1(0.0f);
    const VM positive = ge(sum + negative, zero);
    VF mass = select(positive, sum, negative);
    if constexpr (kMix == Mix::elected_mean) {
      const VF share = select(positive, shares, negative_shares);
      mass = mass / select(eq(share, zero), set1(1.0f), share);
    }
    return fused(mass, lambda, base);
  }
};

template <class F>
inline void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f(float{});
  if (dtype == Dtype::bf16) return f(bf16_t{});
  f(fp16_t{});
}

}  // namespace
TENFOLD_ISA_END
