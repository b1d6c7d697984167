// SPDX-License-Identifier: Apache-2.0
// Noisy keys of nacl_select, exact and bounded from above. For ISA sources.
#pragma once

#include "core/cpu/math.h"
#include "kv_eviction/nacl_select.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr float kInf = __builtin_inff();

inline VF nan_to_lowest(VF x) {
  return vmax(x, set1(-kInf));  // the second operand if either is NaN
}

// Key of a draw:  logit(score) + gumbel(word),  two or three logarithms. Its bound replaces them by
// their largest value over all words (mantissas) with the same upper five bits, from tables. The
// tables hold computed logarithms, which are within kSlack of the true, monotonic ones (they are
// good to 2 ulp and below 128 in size: 2e-5), so a bound is never below the key:
//   computed g(word) <= g(word) + s <= g(last of the bin) + s <= table,  same for the logit;
// sums and quotients of larger numbers round to numbers at least as large.
template <bool kLog, bool kScale>
class Noise {
 public:
  explicit Noise(float tau) : tau_(set1(tau)) {
    for (int i = 0; i < kTable; i += kWidth) {
      const VI bin = seti(static_cast<uint32_t>(i)) + iota();
      const VF end =
          (to_float(bin) + set1(1.0f)) * set1(1.0f / kTable);  // of u, and of mantissa - 1
      store(log_ + i, det_log_normal(end + set1(1.0f)) + set1(kSlack));
      uint32_t words[kWidth];
      for (int lane = 0; lane < kWidth; ++lane)
        words[lane] = (static_cast<uint32_t>(i + lane + 1) << kWordShift) - 1;
      store(gumbel_ + i, gumbel(load(words)) + set1(kSlack));
    }
  }

  VF key(VF score, VI word) const {
    return nan_to_lowest(scaled(kLog ? det_log(score) : score) + gumbel(word));
  }

  VF bound(VF score, VI word) const {
    VF logit = score;
    if constexpr (kLog) {
      // Subnormals count as 2^-127 (1 + m) instead of 2^-126 m, which is less for m < 1.
      const VI exponent = shr<23>(bits(score)) - seti(127);
      const VF mantissa = lookup32(log_, shr<18>(bits(score)) & seti(kTable - 1));
      logit = to_float(exponent) * set1(kLn2) + mantissa;
      logit = select(eq(score, set1(kInf)), score, logit);
    }
    return nan_to_lowest(scaled(logit) + lookup32(gumbel_, shr<kWordShift>(word)));
  }

 private:
  static constexpr int kTable = 32, kWordShift = 27;
  static constexpr float kSlack = 1e-3f;

  VF scaled(VF x) const { return kScale ? x / tau_ : x; }

  VF tau_;
  float gumbel_[kTable], log_[kTable];
};

}  // namespace
TENFOLD_ISA_END
