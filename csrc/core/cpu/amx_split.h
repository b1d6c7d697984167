// SPDX-License-Identifier: Apache-2.0
// Products of float32 by AMX. Every float is exactly the sum of three bf16 (8 bits of its
// significand each): x = h + m + l with |m| <= 2^-8 |x|, |l| <= 2^-16 |x|. Of the nine products of
// two such sums six are multiplied, the smallest first:
//   x y = l h + m h + m m + h m + h l + h h
// and three, at most 2^-23 of it together and of random sign, are left out: that is below the
// rounding of a float32 chain of products, at 6 / 16 of the price of an FMA.
// Sums that need more than this (inf, NaN, values that round to inf) are reported, not computed.
// Only for ISA sources of the avx512_amx build.
#pragma once

#include "core/cpu/amx.h"

#if defined(TENFOLD_ISA_AMX)
#include "core/cpu/vec.h"

namespace tenfold::TENFOLD_ISA {
namespace {

// A panel holds kAmxBlock rows of floats: for each step of kAmxDepth along the depth the parts h,
// m, l, each as two tiles of 16 rows. Pair p of a step holds its elements p and p + 16.
constexpr int kSplitParts = 3;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepBytes = kSplitParts * 2 * kTileBytes;

inline int64_t split_steps(int64_t d) {
  return (d + kAmxDepth - 1) / kAmxDepth;
}
inline int64_t split_panel_bytes(int64_t d) {
  return split_steps(d) * kStepBytes;
}

// Splits 16 + 16 floats. `rest` stays finite only if all of them can be split.
inline void split_step(VF low, VF high, VI (&parts)[kSplitParts], VF* rest) {
  const auto pair = [](VI lo, VI hi) {
    return VI{_mm512_mask_blend_epi16(0xAAAAAAAAu, shr<16>(lo).v, hi.v)};
  };
  const VI half = seti(0x8000u), upper = seti(0xFFFF0000u);
  for (int i = 0; i < kSplitParts - 1; ++i) {
    const VI lo = (bits(low) + half) & upper, hi = (bits(high) + half) & upper;
    parts[i] = pair(lo, hi);
    low = low - from_bits(lo);
    high = high - from_bits(hi);
  }
  parts[kSplitParts - 1] = pair(bits(low), bits(high));
  *rest = *rest + (low + high);
}

// Calls put(step, part, pairs) for every step of one row of d floats times `scale`; whether all of
// them could be split.
template <class Put>
inline bool split_row(const float* row, int64_t d, float scale, const Put& put) {
  VF rest = set1(0.0f);
  const VF by = set1(scale);
  const auto one = [&](int64_t step, VF low, VF high) {
    VI parts[kSplitParts];
    split_step(low * by, high * by, parts, &rest);
    for (int part = 0; part < kSplitParts; ++part) put(step, part, parts[part]);
  };
  const int64_t full = d / kAmxDepth;
  for (int64_t step = 0; step < full; ++step, row += kAmxDepth)
    one(step, load(row), load(row + kWidth));
  if (const int left = static_cast<int>(d % kAmxDepth); left > 0)
    one(full, load_n(row, left), load_n(row + kWidth, left > kWidth ? left - kWidth : 0));
  return !any(unordered(rest - rest));
}

// One row of a left operand.
inline bool split_left(const float* row, int64_t d, int r, char* panel) {
  char* const to = panel + r / kAmxRows * kTileBytes + r % kAmxRows * 64;
  return split_row(row, d, 1.0f, [&](int64_t step, int part, VI pairs) {
    _mm512_store_si512(to + step * kStepBytes + part * 2 * kTileBytes, pairs.v);
  });
}

// One column of a right operand, scaled first: its pairs lie one below the other.
inline bool split_right(const float* row, int64_t d, float scale, int r, char* panel) {
  char* const to = panel + r / kAmxRows * kTileBytes + r % kAmxRows * 4;
  const __m512i down = _mm512_slli_epi32(iota().v, 6);
  return split_row(row, d, scale, [&](int64_t step, int part, VI pairs) {
    _mm512_i32scatter_epi32(to + step * kStepBytes + part * 2 * kTileBytes, down, pairs.v, 1);
  });
}

constexpr int kSplitProducts = 6;  // calls of amx_multiply() a step

// Tiles 0..3 = left panel * right panel. between() is called after each of the kSplitProducts *
// steps of them, for work that runs beside them. The large products come last, after all small
// ones: sums of small numbers round less.
template <class Between>
inline void split_product(const char* left, const char* right, int64_t steps,
                          const Between& between) {
  amx_zero();
  const auto load_left = [&](const char* at) __attribute__((always_inline)) {
    _tile_loadd(4, at, 64);
    _tile_loadd(5, at + kTileBytes, 64);
  };
  const auto load_right = [&](const char* at) __attribute__((always_inline)) {
    _tile_loadd(6, at, 64);
    _tile_loadd(7, at + kTileBytes, 64);
  };
  constexpr int64_t kPart = 2 * kTileBytes;
  for (int64_t step = 0; step < steps; ++step) {
    const char *a = left + step * kStepBytes, *b = right + step * kStepBytes;
    load_left(a + 2 * kPart);
    load_right(b);
    amx_multiply();  // l h
    between();
    load_left(a + kPart);
    amx_multiply();  // m h
    between();
    load_right(b + kPart);
    amx_multiply();  // m m
    between();
    load_left(a);
    amx_multiply();  // h m
    between();
    load_right(b + 2 * kPart);
    amx_multiply();  // h l
    between();
  }
  for (int64_t step = 0; step < steps; ++step) {
    load_left(left + step * kStepBytes);
    load_right(right + step * kStepBytes);
    amx_multiply();  // h h
    between();
  }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
#endif
