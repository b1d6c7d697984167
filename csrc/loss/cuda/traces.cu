// SPDX-License-Identifier: Apache-2.0
// CUDA registration of trace_token_class, lm_weight and first_stop. Values are not checked: starts
// beyond the row leave nothing of it, classes that there are not have weight 0, lengths are brought
// into the row.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "loss/cuda/traces_kernel.cuh"
#include "loss/traces_ops.h"

namespace tenfold::cuda {
namespace {

// With contiguous rows, read at offsets.
IntArray ints_of(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type() == ScalarType::Long, 1};
}

const uint8_t* bytes_of(const Tensor& t) {
  return static_cast<const uint8_t*>(t.data_ptr());
}

Tensor trace_token_class_op(Tensor ids, Tensor mask, Tensor asst_start, Tensor answer_start,
                            int64_t id_tool, int64_t id_obs, int64_t id_work, int64_t id_eos) {
  constexpr auto kOp = "trace_token_class";
  const TraceCall c =
      check_trace(kOp, ids, mask, asst_start, answer_start, {id_tool, id_obs, id_work, id_eos});
  check_grid(kOp, c.rows);
  const Launch launch(ids);
  const Tensor out = new_output(ids, {c.rows, c.length}, ScalarType::Char);
  launch_trace_classes(
      {ints_of(c.ids), bytes_of(c.mask), ints_of(c.trace_start), ints_of(c.answer_start), c.rows,
       c.length, c.ids_stride, c.mask_stride, c.special, static_cast<uint8_t*>(out.data_ptr())},
      launch.stream);
  launch.check();
  return out;
}

Tensor lm_weight_op(Tensor cls, Tensor is_pos, double beta, double omega, bool lm_on_positive) {
  constexpr auto kOp = "lm_weight";
  const WeightCall c = check_lm_weight(kOp, cls, is_pos, beta, omega, lm_on_positive);
  check_grid(kOp, c.rows * weight_parts(c.length));
  const Launch launch(cls);
  const Tensor out = new_output(cls, {c.rows, c.length}, ScalarType::Float);
  ClassWeightArgs a{};
  a.cls = bytes_of(c.cls), a.positive = bytes_of(c.is_pos);
  a.rows = c.rows, a.length = c.length, a.stride = c.stride;
  a.beta = c.beta, a.omega = c.omega, a.on_positive = c.on_positive;
  a.out = data_as<float>(out);
  launch_class_weights(a, launch.stream);
  launch.check();
  return out;
}

std::tuple<Tensor, Tensor> first_stop_op(Tensor ids, Tensor lens, Tensor stop_ids) {
  constexpr auto kOp = "first_stop";
  const StopCall c = check_first_stop(kOp, ids, lens, stop_ids);
  check_grid(kOp, c.rows);
  const Launch launch(ids);
  const Tensor pos = new_output(ids, {c.rows}, ScalarType::Long);
  const Tensor which = new_output(ids, {c.rows}, ScalarType::Long);
  launch_first_stop({ints_of(c.ids), ints_of(c.lens), ints_of(c.stop_ids), c.rows, c.length,
                     c.stride, c.stops, data_as<int64_t>(pos), data_as<int64_t>(which)},
                    launch.stream);
  launch.check();
  return {pos, which};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("trace_token_class", TORCH_BOX(&tenfold::cuda::trace_token_class_op));
  m.impl("lm_weight", TORCH_BOX(&tenfold::cuda::lm_weight_op));
  m.impl("first_stop", TORCH_BOX(&tenfold::cuda::first_stop_op));
}
