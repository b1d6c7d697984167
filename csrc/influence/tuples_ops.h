// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of markov_onestep_tuples share: checks.
#pragma once

#include "influence/markov_ops.h"

namespace tenfold {

struct TupleCall {
  Tensor h, g;        // contiguous rows
  Tensor ids, tests;  // contiguous
  Tensor hist;        // contiguous rows
  int64_t lags, rows, num_tests, dim, count, batch;
  bool residual, mean;
};
TupleCall check_tuples(const char* op, const Tensor& h, const Tensor& g, const Tensor& order_rows,
                       const Tensor& test_rows, const Tensor& hist, bool residual,
                       const std::string& reduction);

}  // namespace tenfold
