// SPDX-License-Identifier: Apache-2.0
#include "moe/cuda/experts_launch.cuh"
#include "moe/cuda/lora_launch.cuh"

namespace tenfold::cuda {

template void grouped_gemm<fp16_t>(const GroupedGemmCall&, const ExpertLimits&, cudaStream_t);
template void grouped_wgrad<fp16_t>(const GroupedWgradCall&, cudaStream_t);
template void experts_forward<fp16_t>(const ExpertBlock&, void*, void*, const ExpertLimits&,
                                      const Room&, cudaStream_t);
template void experts_backward<fp16_t>(const ExpertBlock&, const DeviceRows&, const void*,
                                       const ExpertGradients&, const ExpertLimits&, const Room&,
                                       cudaStream_t);
template void lora_forward<fp16_t>(const LoraBlock&, void*, void*, void*, const ExpertLimits&,
                                   const Room&, cudaStream_t);
template void lora_backward<fp16_t>(const LoraBlock&, const DeviceRows&, const void*, const void*,
                                    const LoraGradients&, const ExpertLimits&, const Room&,
                                    cudaStream_t);

}  // namespace tenfold::cuda
