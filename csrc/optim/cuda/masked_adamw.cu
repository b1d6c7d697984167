// SPDX-License-Identifier: Apache-2.0
// CUDA registration of masked_adamw_.
#include <torch/csrc/stable/library.h>

#include "optim/cuda/adamw_host.h"
#include "optim/cuda/masked_adamw_kernel.cuh"

namespace tenfold::cuda {
namespace {

// Lists by reference: boxing copies what is taken by value, tensor by tensor.
void masked_adamw_op(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                     const Tensors& exp_avg_sqs, const Tensors& steps, const OptTensors& masks,
                     const std::optional<Tensors>& max_exp_avg_sqs,
                     const std::optional<OptTensors>& prefixes, const std::string& mask_kind,
                     const Tensor& lr, double beta1, double beta2, double weight_decay, double eps,
                     bool maximize, bool amsgrad, const OptTensor& grad_scale,
                     const OptTensor& found_inf, const OptTensor& clip_coef, bool stochastic_round,
                     int64_t seed, const std::string& mask_scope, int64_t block_size,
                     const std::vector<int64_t>& tensor_ids) {
  const Tensors maxima = max_exp_avg_sqs.value_or(Tensors());
  const OptTensors starts = prefixes.value_or(OptTensors());
  const MaskedAdamwArgs args{{params,
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
                             maxima,
                             starts,
                             amsgrad,
                             mask_scope};
  AdamwCall call = check_masked_adamw(args);
  if (params.empty()) return;
  const Launch launch(params[0]);
  for (AdamwTensor& t : call.tensors)
    if (t.prefix != nullptr && t.mask.kind == MaskKind::col && t.numel > 0)
      t.col_trained = t.state_numel / (t.numel / t.mask.inner);
  const Tensor scalars = advance_on_device(args, call.tensors, call.options, launch.stream);
  constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  for (const Dtype dtype : kDtypes)
    for (const Dtype state : kDtypes) {
      const Chosen<AdamwTensor> chosen(call.tensors, [&](const AdamwTensor& t) {
        return t.dtype == dtype && t.state_dtype == state;
      });
      if (chosen.size() == 0) continue;
      dispatch_adamw(dtype, state, [&]<class P, class S>() {
        launch_masked_adamw<P, S>(chosen.tensors.data(), chosen.at.data(), chosen.size(),
                                  call.options, data_as<const AdamwScalars>(scalars),
                                  launch.stream);
      });
    }
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("masked_adamw_", TORCH_BOX(&tenfold::cuda::masked_adamw_op));
}
