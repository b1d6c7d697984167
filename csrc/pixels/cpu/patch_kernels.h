// SPDX-License-Identifier: Apache-2.0
// What the CPU registrations call: patches [begin, end) of a batch, one after the other.
#pragma once

#include "core/cpu/isa.h"
#include "pixels/patches.h"

namespace tenfold {

// Bytes of one of a patch's buffers, and of all of them.
constexpr int64_t patch_room(int64_t values) {
  return (4 * values + 64 + 63) / 64 * 64;
}
constexpr int64_t patch_work(int64_t values) {
  return 3 * patch_room(values);
}

// One result of patchify, rows [images * L, P] of contiguous memory.
struct PatchOut {
  void* data;
  Dtype dtype;
  PatchBox box;  // the order of its values
  bool normalize;
  double eps;
  bool past_caches;
};

// Of unpatchify; mean and deviation [images * L] float32, or null.
struct PatchIn {
  PatchRows rows;
  Dtype dtype;
  const float *mean, *deviation;
};

// work: patch_work(values) bytes, aligned to 64.
TENFOLD_ISA_DECLARE_BF16(void patchify_some(const PatchGrid& grid, const PatchOut* outs, int count,
                                            int64_t begin, int64_t end, void* work))
// Writes into grid.data.
TENFOLD_ISA_DECLARE_BF16(void unpatchify_some(const PatchGrid& grid, const PatchIn& in,
                                              int64_t begin, int64_t end, void* work))
// Whether no value is outside [0, 1], or NaN.
TENFOLD_ISA_DECLARE_BF16(bool patches_in_unit_range(const PatchGrid& grid, int64_t begin,
                                                    int64_t end, void* work))
// The weighted sum of the errors; what else PatchMse asks for is written. slope: see error_slope.
TENFOLD_ISA_DECLARE_BF16(double patch_errors(const PatchMse& m, Dtype pred, double slope,
                                             bool past_caches, int64_t begin, int64_t end,
                                             void* work))

}  // namespace tenfold
