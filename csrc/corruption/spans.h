// SPDX-License-Identifier: Apache-2.0
// Span corruption (ERNIE-Code sections 3.3 and 6; T5): random spans of a row are taken out, inputs
// hold a sentinel for each of them, targets the sentinels with what they stand for.
//
// A row of n >= 2 tokens has noise = round(density n) masked ones, 1 .. n - 1, in
// spans = round(noise / mean_span), 1 .. n - noise, in float32 and half to even; shorter rows have
// none. The masked tokens are cut at spans - 1 of their noise - 1 gaps, the others at as many of
// their n - noise - 1; kept and masked parts take turns, a kept one first.
//
// Gaps are drawn without replacement (Floyd): number i of k of m gaps is t = draw below
// m - k + i + 1, or m - k + i if t is there already. A draw is the high half of word * bound, where
// the word is number i % 4 of Philox4x32-10 at counter (i / 4, part + 4 attempt, stream low, stream
// high) with key seed; the first attempt whose low half is at least 2^32 mod bound counts. So all
// masks are equally likely, exactly, and row i, with stream offset + i, has the same one anywhere.
//
// Rows are described by edges: masked spans are [e[0], e[1]), [e[2], e[3]), ..., ascending and
// apart. Traffic: the tokens once, inputs and targets once; the mask is not in memory unless it is
// asked for.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/det_math.h"
#include "core/macros.h"
#include "core/philox.h"

namespace tenfold {

struct SpanRule {
  float density, mean_span;
  bool none;  // a density of 0
};

struct SpanCounts {
  int64_t noise, spans;
};

// Each operation is rounded by itself: a product that is added without being rounded first would be
// another count of masked tokens.
TENFOLD_HD float round_to_even(float x) {  // x >= 0
  constexpr float kWhole = 8388608.0f;     // from 2^23 on there are no fractions
  return x < kWhole ? DetScalarOps::add(DetScalarOps::add(x, kWhole), -kWhole) : x;
}

TENFOLD_HD SpanCounts span_counts(const SpanRule& rule, int64_t n) {
  if (rule.none || n < 2) return {0, 0};
  auto noise =
      static_cast<int64_t>(round_to_even(DetScalarOps::mul(static_cast<float>(n), rule.density)));
  noise = noise < 1 ? 1 : noise > n - 1 ? n - 1 : noise;
  auto spans = static_cast<int64_t>(round_to_even(static_cast<float>(noise) / rule.mean_span));
  spans = spans < 1 ? 1 : spans > n - noise ? n - noise : spans;
  return {noise, spans};
}

struct SpanStream {
  uint32_t seed_lo, seed_hi, lo, hi;
};

TENFOLD_HD SpanStream span_stream(int64_t seed, uint64_t stream) {
  const auto key = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32),
          static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
}

constexpr uint32_t kNoiseGaps = 0, kKeptGaps = 1, kRollShift = 2;  // what a draw is for

TENFOLD_HD Philox4 span_words(const SpanStream& s, uint32_t block, uint32_t part) {
  return philox4x32_10(block, part, s.lo, s.hi, s.seed_lo, s.seed_hi);
}

// Number i of a part, given the word of its first attempt.
TENFOLD_HD uint32_t draw_below(const SpanStream& s, uint32_t i, uint32_t part, uint32_t bound,
                               uint32_t word) {
  uint64_t product = static_cast<uint64_t>(word) * bound;
  // 2^32 mod bound is below bound: the division is seldom asked for.
  for (uint32_t attempt = 1;; ++attempt) {
    const auto low = static_cast<uint32_t>(product);
    if (low >= bound || low >= (0u - bound) % bound) return static_cast<uint32_t>(product >> 32);
    const Philox4 w = span_words(s, i / 4, part + 4 * attempt);
    const uint32_t j = i % 4;
    word = j == 0 ? w.word[0] : j == 1 ? w.word[1] : j == 2 ? w.word[2] : w.word[3];
    product = static_cast<uint64_t>(word) * bound;
  }
}

// By how many tokens a row of n > 0 is rotated to the right.
TENFOLD_HD int64_t draw_roll(const SpanStream& s, int64_t n) {
  return draw_below(s, 0, kRollShift, static_cast<uint32_t>(n),
                    span_words(s, 0, kRollShift).word[0]);
}

// What is written; sentinel j = 1, 2, ... is the token first_sentinel + 1 - j.
struct SpanIds {
  int64_t first_sentinel, num_sentinels, eos, pad, target_pad;
  bool aligned, final_sentinel;
};

// Tokens of both sides and sentinels needed, of a row of n tokens: `kept_runs` is the number of
// runs of tokens that are not masked.
struct SpanSizes {
  int64_t inputs, targets, sentinels;
};
TENFOLD_HD SpanSizes span_sizes(const SpanIds& ids, int64_t n, int64_t noise, int64_t spans,
                                int64_t kept_runs) {
  const int64_t marks = (ids.aligned ? spans : kept_runs) + (ids.final_sentinel ? 1 : 0);
  return {n - noise + spans + 1, noise + marks + 1, marks > spans ? marks : spans};
}

// Of masked spans that are apart.
TENFOLD_HD int64_t kept_runs_of(int64_t n, int64_t spans, bool begins_masked, bool ends_masked) {
  return n == 0 ? 0 : spans + 1 - (begins_masked ? 1 : 0) - (ends_masked ? 1 : 0);
}

// Working memory of a row of up to n tokens.
struct SpanBuffers {
  uint32_t* words;
  uint8_t* marks;
  int32_t *noise_cuts, *kept_cuts, *edges, *spare;
};

struct CorruptRow {
  const void* tokens;  // int64 if wide, else int32
  bool wide;
  int64_t n, readable;  // tokens of the row, and how many may be read
  const int32_t* edges;
  int64_t spans;
  int32_t* spare;  // room for 2 (spans + 1)
  void *inputs, *targets;
  int64_t max_inputs, max_targets;
  SpanIds ids;
};

// Edges of the mask that is drawn for a row; returns its spans.
TENFOLD_ISA_DECLARE(int64_t draw_spans(const SpanRule& rule, const SpanStream& stream, bool roll,
                                       int64_t n, const SpanBuffers& buf))
// Edges of a given one, to buf.edges.
TENFOLD_ISA_DECLARE(int64_t find_spans(const uint8_t* mask, int64_t n, int32_t* edges))
// `width` bytes of a mask.
TENFOLD_ISA_DECLARE(void write_mask(const int32_t* edges, int64_t spans, int64_t width,
                                    uint8_t* mask))
// The caller has made sure that all fits.
TENFOLD_ISA_DECLARE(void corrupt_row(const CorruptRow& row))
// No token is below 0 or, if there are any, a sentinel.
TENFOLD_ISA_DECLARE(bool raw_tokens(const void* tokens, bool wide, int64_t n, int64_t lowest,
                                    int64_t sentinels))

struct RestoreRow {
  const void *inputs, *targets;  // int64 if wide, else int32
  bool wide;
  int64_t in_len, tgt_len, in_readable, tgt_readable;
  int64_t first_sentinel, num_sentinels, eos, pad;
  int32_t* spans;  // room for 2 num_sentinels, all -1; left so
  void* tokens;
  int64_t width;
};
// Returns the length of the row.
TENFOLD_ISA_DECLARE(int64_t restore_row(const RestoreRow& row))

}  // namespace tenfold
