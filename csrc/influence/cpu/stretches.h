// SPDX-License-Identifier: Apache-2.0
// How the backward pass of runs is cut into stretches of steps, and which of these each training
// example was in.
#pragma once

#include <vector>

#include "influence/markov.h"
#include "influence/markov_ops.h"

namespace tenfold::cpu {

class Stretches {
 public:
  // ids: of c.order. lengths: of the runs; empty: all are whole.
  Stretches(const MarkovCall& c, const int32_t* ids, const std::vector<int64_t>& lengths);

  int64_t count() const { return static_cast<int64_t>(parts_.size()); }
  int64_t longest() const { return longest_; }  // steps
  MarkovStretch operator[](int64_t i) const;

 private:
  // Where a stretch's rows, with their ends, and places begin.
  struct Part {
    int64_t begin, end, row, place;
  };
  int64_t longest_;
  std::vector<Part> parts_;
  std::vector<int32_t> rows_, ends_, places_;
};

}  // namespace tenfold::cpu
