// SPDX-License-Identifier: Apache-2.0
// CUDA registration of markov_onestep_tuples.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "influence/cuda/tuples_kernel.cuh"
#include "influence/tuples_ops.h"

namespace tenfold::cuda {
namespace {

IntArray ints_of(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type() == ScalarType::Long, 1};
}

template <class T>
TupleArgs<T> args_of(const char* op, const TupleCall& c) {
  const TupleArgs<T> a{static_cast<const T*>(c.h.data_ptr()),
                       static_cast<const T*>(c.g.data_ptr()),
                       c.h.strides()[0],
                       c.h.strides()[1],
                       c.g.strides()[0],
                       c.g.strides()[1],
                       {ints_of(c.ids), c.batch, c.rows, c.mean},
                       ints_of(c.tests),
                       c.lags,
                       c.num_tests,
                       c.dim,
                       c.count,
                       static_cast<const Real<T>*>(c.hist.data_ptr()),
                       c.hist.strides()[0],
                       c.residual};
  check_grid(op, tuple_blocks(a));
  return a;
}

Tensor markov_onestep_tuples_op(Tensor h, Tensor g, Tensor order_rows, Tensor test_rows,
                                Tensor hist, bool residual, std::string reduction) {
  constexpr auto kOp = "markov_onestep_tuples";
  const TupleCall c = check_tuples(kOp, h, g, order_rows, test_rows, hist, residual, reduction);
  const Launch launch(h);
  const Tensor out = new_output(c.h, {c.count}, real_of(c.h));
  with_factors(c.h, [&]<class T>() {
    launch_tuples(args_of<T>(kOp, c), static_cast<const Real<T>*>(nullptr), data_as<Real<T>>(out),
                  launch.stream);
  });
  launch.check();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> markov_onestep_tuples_backward_op(
    Tensor grad, Tensor h, Tensor g, Tensor order_rows, Tensor test_rows, Tensor hist, bool of_h,
    bool of_g, bool of_hist, bool residual, std::string reduction) {
  constexpr auto kOp = "markov_onestep_tuples_backward";
  const TupleCall c = check_tuples(kOp, h, g, order_rows, test_rows, hist, residual, reduction);
  const Tensor from = as_contiguous(check_real(kOp, "grad", grad, "H", h, {c.count}, "[N]"));
  const Launch launch(h);
  const ScalarType dtype = c.h.scalar_type(), real = real_of(c.h);
  const auto nothing = [&](ScalarType t) { return new_output(c.h, {0}, t); };
  const Tensor grad_h = of_h ? new_output(c.h, {c.lags + 1, c.rows, c.dim}, dtype) : nothing(dtype);
  const Tensor grad_g =
      of_g ? new_output(c.h, {c.lags + 1, c.num_tests, c.dim}, dtype) : nothing(dtype);
  const Tensor grad_hist = of_hist ? new_output(c.h, {c.count, c.lags}, real) : nothing(real);
  with_factors(c.h, [&]<class T>() {
    launch_tuples_backward(args_of<T>(kOp, c), static_cast<const Real<T>*>(from.data_ptr()),
                           of_h ? static_cast<T*>(grad_h.data_ptr()) : nullptr,
                           of_g ? static_cast<T*>(grad_g.data_ptr()) : nullptr,
                           of_hist ? data_as<Real<T>>(grad_hist) : nullptr, launch.stream);
  });
  launch.check();
  return {grad_h, grad_g, grad_hist};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("markov_onestep_tuples", TORCH_BOX(&tenfold::cuda::markov_onestep_tuples_op));
  m.impl("markov_onestep_tuples_backward",
         TORCH_BOX(&tenfold::cuda::markov_onestep_tuples_backward_op));
}
