// Loops over one row of a batch, for each instruction set. Everything between the tensors is
// double.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "rl/returns.h"

namespace tenfold {

// Of a row of segments: how many tokens are valid (0 <= seg < limit), and whether they come first.
struct ValidCount {
  int64_t count;
  bool first;
};
TENFOLD_ISA_DECLARE(ValidCount count_valid(const int32_t* seg, int64_t width, int64_t limit))

// out = scale * kl_term(now - old), and the sum of these terms. k1 with scale 1: differences.
TENFOLD_ISA_DECLARE(double kl_terms(const float* now, const float* old, int64_t n, KlBy by,
                                    double scale, double* out))
TENFOLD_ISA_DECLARE(double kl_terms(const double* now, const double* old, int64_t n, KlBy by,
                                    double scale, double* out))
TENFOLD_ISA_DECLARE(void widen(const float* x, int64_t n, double* out))
TENFOLD_ISA_DECLARE(void widen(const double* x, int64_t n, double* out))

// Of tokens whose segments follow one another: sums of a and b, and lengths, at the segments'
// places. A null b is left out.
TENFOLD_ISA_DECLARE(void segment_sums(const int32_t* seg, int64_t n, const double* a,
                                      const double* b, double* sum_a, double* sum_b,
                                      int32_t* length))

// Generalised advantages of n steps (gae of rl/returns.h). g, null: rule.gamma for all of them.
// `work`: n + 1 numbers.
TENFOLD_ISA_DECLARE(void gae_steps(const double* value, const double* reward, int64_t n,
                                   const GaeRule& rule, const double* g, double bootstrap,
                                   double* work, float* adv, float* ret))
TENFOLD_ISA_DECLARE(void gae_steps(const double* value, const double* reward, int64_t n,
                                   const GaeRule& rule, const double* g, double bootstrap,
                                   double* work, double* adv, double* ret))
TENFOLD_ISA_DECLARE(void gae_steps(const float* value, const float* reward, int64_t n,
                                   const GaeRule& rule, const double* g, double bootstrap,
                                   double* work, float* adv, float* ret))

// to_a[j] = a[seg[j]], likewise b.
TENFOLD_ISA_DECLARE(void spread(const int32_t* seg, int64_t n, const float* a, const float* b,
                                float* to_a, float* to_b))
TENFOLD_ISA_DECLARE(void spread(const int32_t* seg, int64_t n, const double* a, const double* b,
                                double* to_a, double* to_b))

// Whether seg is 0, 1, ... in order without gaps at its first n tokens.
TENFOLD_ISA_DECLARE(bool is_consecutive(const int32_t* seg, int64_t n))

}  // namespace tenfold
