// SPDX-License-Identifier: Apache-2.0
// Pairs of a source and a target as rows of an encoder and a decoder (ERNIE-Code section 3.4):
//
//   pair_pack     inputs = prefix + source + EOS, targets = target + EOS; what does not fit is cut
//                 off the end of source and target, never of prefix or EOS
//   shift_right   what a decoder reads: the labels one position later
//
// Traffic: all tokens once, the results once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"

namespace tenfold {

struct PairIds {
  int64_t eos, pad, target_pad;
};

// Tokens of a row: those that stay, and the whole of what is written with EOS.
struct PairSizes {
  int64_t prefix, source, target, inputs, targets;
  bool fits;
};
TENFOLD_HD PairSizes pair_sizes(int64_t prefix, int64_t source, int64_t target, int64_t max_inputs,
                                int64_t max_targets) {
  const int64_t room = max_inputs - 1 - prefix, target_room = max_targets - 1;
  PairSizes s{prefix, source, target, 0, 0, room >= 0};
  if (s.source > room) s.source = room;
  if (s.target > target_room) s.target = target_room;
  s.inputs = prefix + s.source + 1, s.targets = s.target + 1;
  return s;
}

// A stretch of a row's tokens.
struct TokenPart {
  const void* from;
  int64_t n, readable;
};

// The parts one after the other, EOS, padding: `width` tokens in all. Int64 if wide, else int32.
// Whether no token is below 0.
TENFOLD_ISA_DECLARE(bool pack_row(const TokenPart* parts, int count, bool wide, int64_t eos,
                                  int64_t pad, int64_t width, void* out))
TENFOLD_ISA_DECLARE(void shift_row(const void* labels, bool wide, int64_t n, int64_t start,
                                   int64_t pad, int64_t ignore, void* out))

}  // namespace tenfold
