// SPDX-License-Identifier: Apache-2.0
// Masks as CPU kernels walk over them: 64 elements at a time, whatever the kind. Internal linkage.
#pragma once

#include <cstring>

#include "optim/mask.h"

namespace tenfold {
namespace {

inline uint64_t low_bits(int n) {
  return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

// Bits [at, at + count) of `bits`, which holds `total`; count <= 64.
inline uint64_t mask_bits(const uint8_t* bits, int64_t total, int64_t at, int count) {
  const int64_t first = at >> 3, bytes = (total + 7) >> 3;
  const int shift = static_cast<int>(at & 7);
  uint64_t low = 0;
  memcpy(&low, bits + first, static_cast<size_t>(bytes - first < 8 ? bytes - first : 8));
  low >>= shift;
  if (shift != 0 && first + 8 < bytes)
    low |= static_cast<uint64_t>(bits[first + 8]) << (64 - shift);
  return low & low_bits(count);
}

// Words of consecutive elements, from `begin` on; the tensor has `numel`.
class MaskWords {
 public:
  MaskWords(const Mask& mask, int64_t numel, int64_t begin)
      : mask_(mask), numel_(numel), at_(begin) {
    if (mask.kind == MaskKind::row || mask.kind == MaskKind::block) {
      unit_ = begin / mask.inner;
      left_ = mask.inner - begin % mask.inner;
    }
    if (mask.kind == MaskKind::col) {
      unit_ = begin % mask.inner;
      if (mask.inner < 64) {
        period_ = mask_bits(mask.bits, mask.inner, 0, static_cast<int>(mask.inner));
        for (int64_t n = mask.inner; n < 64; n *= 2) period_ |= period_ << n;
      }
    }
  }

  uint64_t next() {
    const int count = static_cast<int>(numel_ - at_ < 64 ? numel_ - at_ : 64);
    uint64_t word = 0;
    switch (mask_.kind) {
      case MaskKind::element: word = mask_bits(mask_.bits, numel_, at_, count); break;
      case MaskKind::col: word = mask_.inner < 64 ? short_rows() : long_rows(); break;
      case MaskKind::none: word = ~uint64_t{0}; break;
      default: word = units(count);
    }
    at_ += 64;
    return word & low_bits(count);
  }

 private:
  uint64_t units(int count) {
    uint64_t word = 0;
    for (int at = 0; at < count;) {
      const int run = static_cast<int>(left_ < count - at ? left_ : count - at);
      if (mask_bit(mask_.bits, unit_)) word |= low_bits(run) << at;
      at += run;
      left_ -= run;
      if (left_ == 0) ++unit_, left_ = mask_.inner;
    }
    return word;
  }

  uint64_t long_rows() {
    const int64_t row_left = mask_.inner - unit_;
    const int run = static_cast<int>(row_left < 64 ? row_left : 64);
    uint64_t word = mask_bits(mask_.bits, mask_.inner, unit_, run);
    unit_ += 64;
    if (run < 64) {
      word |= mask_bits(mask_.bits, mask_.inner, 0, 64 - run) << run;
      unit_ = 64 - run;
    }
    if (unit_ >= mask_.inner) unit_ -= mask_.inner;
    return word;
  }

  uint64_t short_rows() {  // unit_: the column of the first element
    const int shift = static_cast<int>(64 / mask_.inner * mask_.inner - unit_);
    const uint64_t word = (period_ >> unit_) | (shift < 64 ? period_ << shift : 0);
    unit_ = (unit_ + 64) % mask_.inner;
    return word;
  }

  const Mask mask_;
  const int64_t numel_;
  int64_t at_, unit_ = 0, left_ = 0;
  uint64_t period_ = 0;
};

}  // namespace
}  // namespace tenfold
