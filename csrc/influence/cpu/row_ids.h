// SPDX-License-Identifier: Apache-2.0
// Ids and lengths of a call on the CPU, checked once.
#pragma once

#include <vector>

#include "influence/markov_ops.h"

namespace tenfold::cpu {

// The ids of a contiguous int32 or int64 tensor, each in [least, rows); IndexError names the first
// that is not.
class RowIds {
 public:
  RowIds(const char* op, const char* arg, const Tensor& ids, int64_t least, int64_t rows);
  const int32_t* data() const { return data_; }

 private:
  std::vector<int32_t> copy_;  // of int64
  const int32_t* data_;
};

// Steps of every run, each in [0, steps]; without lengths none.
std::vector<int64_t> check_lengths(const char* op, const OptTensor& lengths, int64_t steps);

}  // namespace tenfold::cpu
