// SPDX-License-Identifier: Apache-2.0
// The vector side of the AdamW rule, for ISA sources: its operations, and stochastic rounding.
#pragma once

#include "core/cpu/vec.h"
#include "core/philox.h"
#include "optim/masked_adamw.h"

namespace tenfold::TENFOLD_ISA {
namespace {

struct VecOps {
  using F = VF;
  using Flag = VM;
  static inline VM flag(bool x) { return lanes_of(x ? ~0u : 0u); }
  static inline VF choose(VM which, VF a, VF b) { return select(which, a, b); }
  static inline VF set1(float x) { return TENFOLD_ISA::set1(x); }
  static inline VF add(VF a, VF b) { return a + b; }
  static inline VF sub(VF a, VF b) { return a - b; }
  static inline VF mul(VF a, VF b) { return a * b; }
  static inline VF div(VF a, VF b) { return a / b; }
  static inline VF sqrt(VF a) { return TENFOLD_ISA::sqrt(a); }
  static inline VF fma(VF a, VF b, VF c) { return fused(a, b, c); }
  static inline VF fma_from(VF c, VF a, VF b) { return fused_from(c, a, b); }
  static inline VF finite(VF q, VF otherwise) {
    return select(lt(q, from_bits(seti(0x7F800000u))), otherwise, q);
  }
};

// Uniform random 16 bits of every element, for 8 kWidth elements at a time.
class Noise {
 public:
  static constexpr int64_t kElements = 8 * kWidth;

  Noise(uint64_t seed, uint32_t id, uint32_t step)
      : key0_(static_cast<uint32_t>(seed)),
        key1_(static_cast<uint32_t>(seed >> 32)),
        id_(id),
        step_(step) {}

  // Those of element i, a multiple of kWidth, and of the kWidth - 1 after it.
  inline VI at(int64_t i) { return load_halves(reinterpret_cast<const uint16_t*>(words(i))); }

  // Those of 2 kWidth elements, i a multiple of that: the even ones' in the lower halves.
  inline VI pair_at(int64_t i) { return load(words(i)); }

 private:
  inline const uint32_t* words(int64_t i) {
    const int64_t first = i / kElements * kElements;
    if (first != first_) draw(first_ = first);
    return words_ + (i - first) / 2;
  }

  void draw(int64_t first) {
    const uint64_t counter = static_cast<uint64_t>(first) >> 3;  // its low bits are zero: no carry
    alignas(64) uint32_t dealt[kWidth];
    for (int l = 0; l < kWidth; ++l)
      dealt[l] = static_cast<uint32_t>(counter) + (l % 4) * (kWidth / 4) + l / 4;
    VI c0 = load(dealt), c1 = seti(static_cast<uint32_t>(counter >> 32)), c2 = seti(id_),
       c3 = seti(step_);
    uint32_t k0 = key0_, k1 = key1_;
    for (int round = 0; round < 10; ++round) {
      VI hi0, lo0, hi1, lo1;
      mulhilo(c0, kPhiloxMul0, &hi0, &lo0);
      mulhilo(c2, kPhiloxMul1, &hi1, &lo1);
      c0 = hi1 ^ c1 ^ seti(k0);
      c1 = lo1;
      c2 = hi0 ^ c3 ^ seti(k1);
      c3 = lo0;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    store_by_four(words_, c0, c1, c2, c3);
  }

  const uint32_t key0_, key1_, id_, step_;
  int64_t first_ = -1;
  alignas(64) uint32_t words_[4 * kWidth];
};

// x rounded to bf16 up or down with the chance of its distance; Inf and NaN stay. noise: 16 bits.
inline VF round_stochastic(VF x, VI noise) {
  const VI b = bits(x), exponent = seti(0x7F800000u);
  const VI rounded = (b + noise) & seti(0xFFFF0000u);
  return from_bits(select(eq(b & exponent, exponent), b, rounded));
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
