// SPDX-License-Identifier: Apache-2.0
// Loops over one row of a batch, for each instruction set. Everything between the tensors is
// double, but where float is named.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "rl/returns.h"

namespace tenfold {

// Tokens with 0 <= seg < limit.
TENFOLD_ISA_DECLARE(int64_t count_valid(const int32_t* seg, int64_t width, int64_t limit))

TENFOLD_ISA_DECLARE(int64_t count_equal(const int32_t* seg, int64_t width, int32_t value))

// Bytes that are not 0.
TENFOLD_ISA_DECLARE(int64_t count_marked(const uint8_t* mask, int64_t width))

// out = scale * kl_term(now - old), and the sum of these terms. k1 with scale 1: differences.
TENFOLD_ISA_DECLARE(double kl_terms(const float* now, const float* old, int64_t n, KlBy by,
                                    double scale, double* out))
TENFOLD_ISA_DECLARE(double kl_terms(const double* now, const double* old, int64_t n, KlBy by,
                                    double scale, double* out))
TENFOLD_ISA_DECLARE(void widen(const float* x, int64_t n, double* out))
TENFOLD_ISA_DECLARE(void widen(const double* x, int64_t n, double* out))

// Sums of a and b (null: left out) over segments, and their lengths. Tokens of a segment follow one
// another, else its last run of them counts.
TENFOLD_ISA_DECLARE(void segment_sums(const int32_t* seg, int64_t n, const double* a,
                                      const double* b, double* sum_a, double* sum_b,
                                      int32_t* length))

// The same where is_consecutive(seg, n). What it gets in a and b is lost. Back: how many
// segments there are, and their ends; those have memory for n + 16.
TENFOLD_ISA_DECLARE(int64_t consecutive_sums(const int32_t* seg, int64_t n, double* a, double* b,
                                             uint32_t* ends, double* sum_a, double* sum_b,
                                             int32_t* length))
// The same from the ends that are known; in float up to 8 tokens, and beyond in double.
TENFOLD_ISA_DECLARE(void run_sums(const int32_t* seg, const uint32_t* ends, int64_t segments,
                                  float* a, float* b, float* sum_a, float* sum_b, int32_t* length))

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

// to_a[j] = a[seg[j]], likewise b (null: left out). With the `ends` of `segments` consecutive
// segments: faster.
TENFOLD_ISA_DECLARE(void spread_runs(const uint32_t* ends, int64_t segments, const float* a,
                                     const float* b, float* to_a, float* to_b))
TENFOLD_ISA_DECLARE(void spread_runs(const uint32_t* ends, int64_t segments, const double* a,
                                     const double* b, double* to_a, double* to_b))
TENFOLD_ISA_DECLARE(void spread(const int32_t* seg, int64_t n, const float* a, const float* b,
                                float* to_a, float* to_b))
TENFOLD_ISA_DECLARE(void spread(const int32_t* seg, int64_t n, const double* a, const double* b,
                                double* to_a, double* to_b))

// x /= max(length, 1).
TENFOLD_ISA_DECLARE(void divide(const int32_t* length, int64_t n, double* x))

// Whether seg is 0, 1, ... in order without gaps at its first n tokens.
TENFOLD_ISA_DECLARE(bool is_consecutive(const int32_t* seg, int64_t n))

}  // namespace tenfold
