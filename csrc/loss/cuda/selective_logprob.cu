// SPDX-License-Identifier: Apache-2.0
// CUDA registration of selective_logprob and its backward.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "loss/cuda/selective_logprob_kernel.cuh"
#include "loss/linear_ops.h"
#include "loss/logprob_ops.h"

namespace tenfold::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> selective_logprob_op(Tensor logits, Tensor ids,
                                                        double temperature) {
  constexpr auto kOp = "selective_logprob";
  const LogprobCall c = check_logprob(kOp, logits, ids, temperature);
  const Launch launch(c.logits);
  const Tensor logp = new_output(c.logits, {c.rows}, ScalarType::Float);
  const Tensor lse = new_output(c.logits, {c.rows}, ScalarType::Float);
  const Tensor entropy = new_output(c.logits, {c.rows}, ScalarType::Float);
  if (c.rows == 0) return {logp, lse, entropy};
  dispatch_dtype(c.logits.scalar_type(), kOp, [&]<class T>() {
    LogprobArgs a{};
    a.logits = c.logits.data_ptr(), a.ids = int_array(c.ids);
    a.rows = c.rows, a.vocab = c.vocab, a.row_stride = c.row_stride;
    a.scale = 1.0 / temperature;
    a.logp = data_as<float>(logp), a.lse = data_as<float>(lse);
    a.entropy = data_as<float>(entropy);
    a = with_chunks<T>(a);
    check_grid(kOp, a.rows * a.chunks);
    const int64_t parts = a.chunks > 1 ? a.rows * a.chunks : 0;
    const Tensor room = new_output(c.logits, {3 * parts}, ScalarType::Double);
    a.parts = data_as<LogitSums>(room);
    launch_selective_logprob<T>(a, launch.stream);
  });
  launch.check();
  return {logp, lse, entropy};
}

OptTensor check_floats(const char* op, const char* arg, const OptTensor& t, const LogprobCall& c) {
  return check_row_floats(op, arg, t, c.logits, false, "logits");
}

Tensor selective_logprob_backward_op(OptTensor grad_logp, OptTensor grad_lse,
                                     OptTensor grad_entropy, Tensor logits, Tensor ids, Tensor lse,
                                     Tensor entropy, double temperature) {
  constexpr auto kOp = "selective_logprob_backward";
  const LogprobCall c = check_logprob(kOp, logits, ids, temperature);
  const OptTensor of_logp = check_floats(kOp, "grad_logp", grad_logp, c);
  const OptTensor of_lse = check_floats(kOp, "grad_lse", grad_lse, c);
  const OptTensor of_entropy = check_floats(kOp, "grad_entropy", grad_entropy, c);
  const OptTensor lses = check_floats(kOp, "lse", lse, c);
  const OptTensor entropies = check_floats(kOp, "entropy", entropy, c);
  const Launch launch(c.logits);
  const Tensor out = new_output(c.logits, {c.rows, c.vocab}, c.logits.scalar_type());
  if (c.rows == 0) return out;
  dispatch_dtype(c.logits.scalar_type(), kOp, [&]<class T>() {
    LogprobGradArgs a{};
    a.logits = c.logits.data_ptr(), a.ids = int_array(c.ids);
    a.rows = c.rows, a.vocab = c.vocab, a.row_stride = c.row_stride;
    a.grad_logp = floats(of_logp), a.grad_lse = floats(of_lse);
    a.grad_entropy = floats(of_entropy);
    a.lse = floats(lses), a.entropy = floats(entropies);
    a.scale = 1.0 / temperature;
    a.out = out.data_ptr();
    a = with_blocks<T>(a);
    check_grid(kOp, a.rows * a.blocks);
    launch_selective_logprob_backward<T>(a, launch.stream);
  });
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("selective_logprob", TORCH_BOX(&tenfold::cuda::selective_logprob_op));
  m.impl("selective_logprob_backward", TORCH_BOX(&tenfold::cuda::selective_logprob_backward_op));
}
