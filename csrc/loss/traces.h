// SPDX-License-Identifier: Apache-2.0
// Traces of a reward model that calls tools (Themis, sections 2, 4 and 11), a row of tokens each:
//
//   trace_token_class   what a token is as a target, from the special tokens before it
//   lm_weight           what a class counts in the language model's loss
//   first_stop          where the first of some tokens is
//
// What lies where the mask is 0, or beyond the length, changes nothing.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"

namespace tenfold {

constexpr uint8_t kIgnore = 0, kAnswer = 1, kTool = 2, kObservation = 3, kRationale = 4,
                  kEndOfSequence = 5;
constexpr int kTraceClasses = 6;

// Of the special tokens; below 0: there is none.
struct TraceIds {
  int64_t tool, obs, work, eos;
};

constexpr uint8_t kOrdinary = 255;

// The class of the tokens after a special one; kOrdinary if it is none.
TENFOLD_HD uint8_t class_after(const TraceIds& special, int64_t id) {
  return id < 0               ? kOrdinary
         : id == special.tool ? kTool
         : id == special.obs  ? kObservation
         : id == special.work ? kRationale
         : id == special.eos  ? kIgnore
                              : kOrdinary;
}

// Of a token of a trace, where `before` is the class that the special tokens before it give, and
// `after` is class_after of itself. A special token is what the model must write, so it counts as
// TOOL even before text that does not count.
TENFOLD_HD uint8_t class_of(uint8_t before, uint8_t after) {
  if (before == kIgnore || after == kOrdinary) return before;
  return after == kIgnore ? kEndOfSequence : kTool;
}

// Of a class in a row whose answer counts (`answer`) or not; 0 of what is no class.
TENFOLD_HD float class_weight(uint8_t cls, float beta, float omega, bool answer) {
  return cls == kTool || cls == kEndOfSequence ? 1.0f
         : cls == kObservation                 ? beta
         : cls == kRationale                   ? omega
         : cls == kAnswer && answer            ? 1.0f
                                               : 0.0f;
}

// Int is int64_t if `wide`, else int32_t. Classes of n tokens of a trace from its first one on.
TENFOLD_ISA_DECLARE(void trace_classes(const void* ids, bool wide, const uint8_t* mask, int64_t n,
                                       const TraceIds& special, uint8_t* out))
// out[i] = value where mask[i] is not 0, else 0.
TENFOLD_ISA_DECLARE(void masked_bytes(const uint8_t* mask, int64_t n, uint8_t value, uint8_t* out))
// Whether all classes are there.
TENFOLD_ISA_DECLARE(bool weights_of_classes(const uint8_t* cls, int64_t n, float beta, float omega,
                                            bool answer, float* out))
// Where the first token is that is one of stops[count]; n if there is none.
TENFOLD_ISA_DECLARE(int64_t find_stop(const void* ids, bool wide, int64_t n, const int64_t* stops,
                                      int64_t count))

}  // namespace tenfold
