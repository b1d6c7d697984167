// SPDX-License-Identifier: Apache-2.0
// Walks the trained elements of a range of a tensor under its mask. For ISA sources.
#pragma once

#include "core/cpu/vec.h"
#include "optim/mask.h"

TENFOLD_ISA_BEGIN
namespace {

// The elements [begin, end) of a tensor in storage order: dense(first, last) for runs that train
// completely, masked(first, last, bit) for runs of elements of which each has its own bit, the
// first of them number `bit` of mask.bits. What is frozen by whole rows or blocks is not visited.
template <class Dense, class Masked>
inline void visit_trained(const Mask& mask, int64_t begin, int64_t end, Dense dense,
                          Masked masked) {
  if (mask.kind == MaskKind::none) return dense(begin, end);
  if (mask.kind == MaskKind::element) return masked(begin, end, begin);
  if (mask.kind == MaskKind::col) {
    for (int64_t at = begin; at < end;) {
      const int64_t col = at % mask.inner, left = mask.inner - col;
      const int64_t stop = end - at < left ? end : at + left;
      masked(at, stop, col);
      at = stop;
    }
    return;
  }
  int64_t first = begin;  // of the run that is open; a frozen unit closes it
  bool open = false;
  for (int64_t unit = begin / mask.inner, at = begin; at < end; ++unit) {
    const bool trains = mask_bit(mask.bits, unit);
    if (trains && !open) first = at;
    if (!trains && open) dense(first, at);
    open = trains;
    at = (unit + 1) * mask.inner;
  }
  if (open) dense(first, end);
}

// Bits [bit, bit + count) of a mask, count <= 8, without a byte that holds none of them.
inline uint32_t few_bits(const uint8_t* bits, int64_t bit, int count) {
  const uint8_t* at = bits + (bit >> 3);
  const int shift = static_cast<int>(bit & 7);
  uint32_t word = at[0];
  if (shift + count > 8) word |= static_cast<uint32_t>(at[1]) << 8;
  return (word >> shift) & ((1u << count) - 1u);
}

// N bits from a whole byte on.
template <int N>
inline uint64_t whole_bits(const uint8_t* at) {
  uint64_t word = 0;
  __builtin_memcpy(&word, at, N / 8);
  return word;
}

// Cuts a masked run into single(i, bits of up to 8 elements, count) at its ends and group(i, bits)
// for N elements whose bits are whole bytes.
template <int N, class Group, class Few>
inline void cut_masked(const uint8_t* bits, int64_t first, int64_t last, int64_t bit, Group group,
                       Few few) {
  int64_t i = first;
  const auto some = [&](int64_t most) {
    const int64_t left = last - i, n = left < most ? left : most;
    few(i, few_bits(bits, bit + (i - first), static_cast<int>(n)), static_cast<int>(n));
    i += n;
  };
  if ((bit & 7) != 0) some(8 - (bit & 7));
  for (; i + N <= last; i += N) group(i, whole_bits<N>(bits + ((bit + i - first) >> 3)));
  while (i < last) some(8);
}

}  // namespace
TENFOLD_ISA_END
