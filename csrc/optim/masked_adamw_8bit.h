// SPDX-License-Identifier: Apache-2.0
// masked_adamw_8bit_: masked_adamw_ (the same rule, masks and scalars) on 8-bit moments.
//
// A state is stored in blocks of 256 elements along the flat tensor, the last one shorter: a uint8
// code per element, float32 absmax per block, one code book of 256 sorted float32 values per moment
// (code1 for m, signed; code2 for v, unsigned):
//
//   value = code[q] * absmax                  before the update
//   absmax = max |value|                      after it, over the trained elements of the block
//   q = the code nearest to value / absmax    ties to the lower one; absmax 0: nearest to 0
//
// A frozen element keeps p and its codes bit for bit. A block without trained elements keeps its
// absmax and is not read; in a block with some, the frozen elements' codes stay but stand for other
// values, since the block has a new absmax. NaN: absmax becomes NaN.
//
// p, g [n] as in masked_adamw_; codes uint8 [n] in the order of p; absmax [ceil(n / 256)].
// Traffic per trained element, bfloat16 parameters: 2 + 2 + 2 for p and g, 4 + 8/64 for m and v.
#pragma once

#include "optim/masked_adamw.h"

namespace tenfold {

constexpr int64_t kStateBlock = 256;
constexpr int kCodes = 256;

// q(x) = the number of cuts below x, where cut[j] is the largest float32 that is nearer to code[j]
// than to code[j + 1], or as near; of equal codes the first one.
//
// The table finds q in one look-up: a float32's upper 16 bits, as a number that grows with it, name
// a bucket; a bucket with one cut at most needs the codes below it and the cut's lower 16 bits.
struct CodeBook {
  static constexpr int kSmallest = (127 - 24) << 7;            // upper 16 bits of 2^-24
  static constexpr int kBuckets = (127 << 7) - kSmallest + 1;  // up to those of 1, either sign
  float code[kCodes];
  float cut[kCodes];  // the last one is not used
  uint8_t first[kCodes];
  uint8_t zero;  // q(0)
  bool has_table;
  // code << 16 | lower bits of the cut; 0xFFFF: none. The middle one: |x| < 2^-24.
  uint32_t table[2 * kBuckets + 1];
};

// Adds what the rule of the code book needs of a tensor.
struct Adamw8Tensor : AdamwTensor {  // exp_avg, exp_avg_sq: uint8 codes
  float *absmax1, *absmax2;
};

// The elements [begin, end) of a tensor; begin is a multiple of kAdamwGrain, end too or the numel.
TENFOLD_ISA_DECLARE_BF16(void masked_adamw_8bit_range(const Adamw8Tensor& t, const AdamwScalars& s,
                                                      const AdamwOptions& o, const CodeBook& book1,
                                                      const CodeBook& book2, int64_t begin,
                                                      int64_t end))

}  // namespace tenfold
