// SPDX-License-Identifier: Apache-2.0
// CUDA registration of masked_adamw_8bit_.
#include <torch/csrc/stable/library.h>

#include "optim/cuda/adamw_host.h"
#include "optim/cuda/masked_adamw_8bit_kernel.cuh"

namespace tenfold::cuda {
namespace {

// Lists by reference: boxing copies what is taken by value, tensor by tensor.
void masked_adamw_8bit_op(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                          const Tensors& exp_avg_sqs, const Tensors& steps, const OptTensors& masks,
                          const Tensors& absmax1, const Tensors& absmax2, const Tensor& code1,
                          const Tensor& code2, const std::string& mask_kind, const Tensor& lr,
                          double beta1, double beta2, double weight_decay, double eps,
                          bool maximize, const OptTensor& grad_scale, const OptTensor& found_inf,
                          const OptTensor& clip_coef, bool stochastic_round, int64_t seed,
                          int64_t block_size, const std::vector<int64_t>& tensor_ids) {
  const MaskedAdamw8bitArgs args{{params,
                                  grads,
                                  exp_avgs,
                                  exp_avg_sqs,
                                  steps,
                                  masks,
                                  mask_kind,
                                  lr,
                                  beta1,
                                  beta2,
                                  weight_decay,
                                  eps,
                                  maximize,
                                  grad_scale,
                                  found_inf,
                                  clip_coef,
                                  stochastic_round,
                                  seed,
                                  block_size,
                                  tensor_ids},
                                 absmax1,
                                 absmax2,
                                 code1,
                                 code2};
  const Adamw8bitCall call = check_masked_adamw_8bit(args);
  if (params.empty()) return;
  const Launch launch(params[0]);
  const Tensor scalars = advance_on_device(args, call.tensors, call.options, launch.stream);
  const auto run = [&]<class P>(Dtype dtype) {
    const Chosen<Adamw8Tensor> chosen(call.tensors,
                                      [&](const Adamw8Tensor& t) { return t.dtype == dtype; });
    launch_masked_adamw_8bit<P>(chosen.tensors.data(), chosen.at.data(), chosen.size(),
                                call.options, data_as<const AdamwScalars>(scalars),
                                data_as<const float>(code1), data_as<const float>(code2),
                                launch.stream);
  };
  run.template operator()<float>(Dtype::f32);
  run.template operator()<bf16_t>(Dtype::bf16);
  run.template operator()<fp16_t>(Dtype::f16);
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("masked_adamw_8bit_", TORCH_BOX(&tenfold::cuda::masked_adamw_8bit_op));
}
