// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda/dha_attention_backward_kernel.cuh"

namespace tenfold::cuda {

template int64_t sums_of_head<bf16_t, 128>(const BackwardArgs&);
template int sums_pitch<bf16_t, 128>(int);
template void launch_dha_backward<bf16_t, 128, Grad::q, true>(const BackwardArgs&, cudaStream_t);
template void launch_dha_backward<bf16_t, 128, Grad::k, true>(const BackwardArgs&, cudaStream_t);
template void launch_dha_backward<bf16_t, 128, Grad::v, true>(const BackwardArgs&, cudaStream_t);

}  // namespace tenfold::cuda
