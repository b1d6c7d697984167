// SPDX-License-Identifier: Apache-2.0
// CUDA registration of markov_scan and markov_onestep.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "influence/cuda/markov_kernel.cuh"
#include "influence/markov_ops.h"

namespace tenfold::cuda {
namespace {

template <class T>
MarkovArgs<T> args_of(const char* op, const MarkovCall& c, const Past& past) {
  MarkovArgs<T> a{};
  a.factors = static_cast<const T*>(c.factors.data_ptr());
  a.plane = c.factors.strides()[0], a.row = c.factors.strides()[1];
  a.order = {
      {c.order.data_ptr(), c.order.scalar_type() == ScalarType::Long, 1}, c.batch, c.rows, c.mean};
  a.lengths = int_array(c.lengths);
  a.lags = c.lags, a.tests = c.tests, a.runs = c.runs, a.steps = c.steps;
  a.residual = c.residual;
  a.y = pointer_or_null<Real<T>>(past.y);
  a.y_run = stride_of(past.y, 0), a.y_step = stride_of(past.y, 1);
  a.y0 = pointer_or_null<Real<T>>(past.y0);
  a.y0_run = stride_of(past.y0, 0), a.y0_lag = stride_of(past.y0, 1);
  a.mask = pointer_or_null<uint8_t>(past.mask);
  a.mask_run = stride_of(past.mask, 0), a.mask_step = stride_of(past.mask, 1);
  check_grid(op, markov_blocks(a));
  return a;
}

template <class T>
Upstream<Real<T>> upstream(const Tensor& grad) {
  return {static_cast<const Real<T>*>(grad.data_ptr()), grad.strides()[0], grad.strides()[1]};
}

Tensor markov_scan_op(Tensor factors, Tensor order, Tensor y0, bool residual, OptTensor lengths,
                      std::string reduction) {
  constexpr auto kOp = "markov_scan";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_scan_past(kOp, c, y0, std::nullopt);
  const Launch launch(factors);
  DeviceMemory memory(factors);
  const Tensor out = new_states(c);
  with_factors(factors, [&]<class T>() {
    launch_scan(args_of<T>(kOp, c, past), data_as<Real<T>>(out), memory.room(), launch.stream);
  });
  launch.check();
  return out;
}

std::tuple<Tensor, Tensor> markov_scan_backward_op(Tensor grad, Tensor factors, Tensor order,
                                                   Tensor y0, Tensor pred, bool residual,
                                                   OptTensor lengths, std::string reduction) {
  constexpr auto kOp = "markov_scan_backward";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_scan_past(kOp, c, y0, pred);
  const Tensor from = check_grad(kOp, c, grad);
  const Launch launch(factors);
  DeviceMemory memory(factors);
  const Tensor of_factors = like_factors(c), of_y0 = new_history(c);
  with_factors(factors, [&]<class T>() {
    launch_scan_backward(args_of<T>(kOp, c, past), upstream<T>(from),
                         static_cast<T*>(of_factors.data_ptr()), data_as<Real<T>>(of_y0),
                         memory.room(), launch.stream);
  });
  launch.check();
  return {of_factors, of_y0};
}

Tensor markov_onestep_op(Tensor factors, Tensor order, Tensor y, bool residual, OptTensor y0,
                         OptTensor mask, OptTensor lengths, std::string reduction) {
  constexpr auto kOp = "markov_onestep";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_recorded(kOp, c, y, y0, mask);
  const Launch launch(factors);
  const Tensor out = new_states(c);
  with_factors(factors, [&]<class T>() {
    launch_onestep(args_of<T>(kOp, c, past), data_as<Real<T>>(out), launch.stream);
  });
  launch.check();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> markov_onestep_backward_op(Tensor grad, Tensor factors,
                                                              Tensor order, Tensor y, bool residual,
                                                              OptTensor y0, bool of_past,
                                                              OptTensor mask, OptTensor lengths,
                                                              std::string reduction) {
  constexpr auto kOp = "markov_onestep_backward";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_recorded(kOp, c, y, y0, mask);
  const Tensor from = check_grad(kOp, c, grad);
  const Launch launch(factors);
  const Tensor of_factors = like_factors(c);
  const Tensor of_y = of_past ? new_states(c) : nothing(c);
  const Tensor of_y0 = of_past && y0 ? new_history(c) : nothing(c);
  with_factors(factors, [&]<class T>() {
    const MarkovArgs<T> a = args_of<T>(kOp, c, past);
    const Upstream<Real<T>> up = upstream<T>(from);
    if (of_past)
      launch_past(a, up, data_as<Real<T>>(of_y), y0 ? data_as<Real<T>>(of_y0) : nullptr,
                  launch.stream);
    launch_factor_gradient(a, up, static_cast<T*>(of_factors.data_ptr()), launch.stream);
  });
  launch.check();
  return {of_factors, of_y, of_y0};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("markov_scan", TORCH_BOX(&tenfold::cuda::markov_scan_op));
  m.impl("markov_scan_backward", TORCH_BOX(&tenfold::cuda::markov_scan_backward_op));
  m.impl("markov_onestep", TORCH_BOX(&tenfold::cuda::markov_onestep_op));
  m.impl("markov_onestep_backward", TORCH_BOX(&tenfold::cuda::markov_onestep_backward_op));
}
