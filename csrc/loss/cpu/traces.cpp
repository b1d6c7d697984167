// SPDX-License-Identifier: Apache-2.0
// CPU registration of trace_token_class, lm_weight and first_stop: a row a task.
#include "loss/traces.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "loss/traces_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerClass = 3e-4, kMicrosPerWeight = 1.5e-4, kMicrosPerStop = 1e-4;
constexpr int64_t kRowTokens = 64;  // what a row costs beside its tokens

Tensor trace_token_class_op(Tensor ids, Tensor mask, Tensor asst_start, Tensor answer_start,
                            int64_t id_tool, int64_t id_obs, int64_t id_work, int64_t id_eos) {
  const TraceCall c = check_trace("trace_token_class", ids, mask, asst_start, answer_start,
                                  {id_tool, id_obs, id_work, id_eos});
  const Tensor out = new_output(ids, {c.rows, c.length}, ScalarType::Char);
  const RowInts tokens(c.ids), answers(c.answer_start), traces(c.trace_start);
  const auto* const real = static_cast<const uint8_t*>(c.mask.data_ptr());
  auto* const classes = static_cast<uint8_t*>(out.data_ptr());
  parallel_for(
      c.rows, kMicrosPerClass * static_cast<double>(c.length + kRowTokens),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t answer = answers[i], trace = traces[i];
          const uint8_t* const mask = real + i * c.mask_stride;
          uint8_t* const to = classes + i * c.length;
          std::memset(to, kIgnore, answer);
          TENFOLD_ISA_CALL(masked_bytes, mask + answer, trace - answer, kAnswer, to + answer);
          TENFOLD_ISA_CALL(trace_classes, tokens.at(i * c.ids_stride + trace), tokens.wide(),
                           mask + trace, c.length - trace, c.special, to + trace);
        }
      });
  return out;
}

Tensor lm_weight_op(Tensor cls, Tensor is_pos, double beta, double omega, bool lm_on_positive) {
  constexpr auto kOp = "lm_weight";
  const WeightCall c = check_lm_weight(kOp, cls, is_pos, beta, omega, lm_on_positive);
  const Tensor out = new_output(cls, {c.rows, c.length}, ScalarType::Float);
  const auto* const classes = static_cast<const uint8_t*>(c.cls.data_ptr());
  const auto* const positive = static_cast<const uint8_t*>(c.is_pos.data_ptr());
  auto* const to = data_as<float>(out);
  std::atomic<bool> wrong{false};
  parallel_for(c.rows, kMicrosPerWeight * static_cast<double>(c.length),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const bool answer = c.on_positive && positive[i] != 0;
                   if (!TENFOLD_ISA_CALL(weights_of_classes, classes + i * c.stride, c.length,
                                         c.beta, c.omega, answer, to + i * c.length))
                     wrong = true;
                 }
               });
  for (int64_t i = 0; wrong && i < c.rows * c.length; ++i) {
    const int64_t row = i / c.length, j = i % c.length;
    const int value = static_cast<int8_t>(classes[row * c.stride + j]);
    TENFOLD_CHECK_INDEX(value >= 0 && value < kTraceClasses, "tenfold::", kOp, ": cls[", row, ", ",
                        j, "] = ", value, " is no class; classes are 0 to ", kTraceClasses - 1);
  }
  return out;
}

std::tuple<Tensor, Tensor> first_stop_op(Tensor ids, Tensor lens, Tensor stop_ids) {
  const StopCall c = check_first_stop("first_stop", ids, lens, stop_ids);
  const Tensor pos = new_output(ids, {c.rows}, ScalarType::Long);
  const Tensor which = new_output(ids, {c.rows}, ScalarType::Long);
  const std::vector<int64_t> stops = read_ints<int64_t>(c.stop_ids);
  const RowInts tokens(c.ids), lengths(c.lens);
  auto *const to_pos = data_as<int64_t>(pos), *const to_which = data_as<int64_t>(which);
  parallel_for(
      c.rows, kMicrosPerStop * static_cast<double>((c.length + kRowTokens) * (c.stops + 1)),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = lengths[i], row = i * c.stride;
          const int64_t at =
              TENFOLD_ISA_CALL(find_stop, tokens.at(row), tokens.wide(), n, stops.data(), c.stops);
          to_pos[i] = at, to_which[i] = -1;
          if (at == n) continue;
          to_which[i] = std::find(stops.begin(), stops.end(), tokens[row + at]) - stops.begin();
        }
      });
  return {pos, which};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("trace_token_class", TORCH_BOX(&tenfold::cpu::trace_token_class_op));
  m.impl("lm_weight", TORCH_BOX(&tenfold::cpu::lm_weight_op));
  m.impl("first_stop", TORCH_BOX(&tenfold::cpu::first_stop_op));
}
