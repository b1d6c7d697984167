// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of trace_token_class, lm_weight and first_stop share: checks.
// Values of starts, classes and lengths are checked on the CPU only.
#pragma once

#include "core/row_ints.h"
#include "loss/traces.h"

namespace tenfold {

struct TraceCall {
  Tensor ids, mask;                  // [N, S] with contiguous rows
  Tensor trace_start, answer_start;  // [N], contiguous
  int64_t rows, length, ids_stride, mask_stride;
  TraceIds special;
};
TraceCall check_trace(const char* op, const Tensor& ids, const Tensor& mask,
                      const Tensor& asst_start, const Tensor& answer_start,
                      const TraceIds& special);

struct WeightCall {
  Tensor cls, is_pos;  // [N, S] with contiguous rows; [N], contiguous
  int64_t rows, length, stride;
  float beta, omega;
  bool on_positive;
};
WeightCall check_lm_weight(const char* op, const Tensor& cls, const Tensor& is_pos, double beta,
                           double omega, bool lm_on_positive);

struct StopCall {
  Tensor ids, lens, stop_ids;  // [N, S] with contiguous rows; [N] and [K], contiguous
  int64_t rows, length, stride, stops;
};
StopCall check_first_stop(const char* op, const Tensor& ids, const Tensor& lens,
                          const Tensor& stop_ids);

}  // namespace tenfold
