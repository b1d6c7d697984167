// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda/dha_attention_backward_kernel.cuh"

namespace tenfold::cuda {

template int64_t sums_of_head<float, 128>(const BackwardArgs&);
template int sums_pitch<float, 128>(int);
template void launch_dha_backward<float, 128, Grad::q, true>(const BackwardArgs&, cudaStream_t);
template void launch_dha_backward<float, 128, Grad::k, true>(const BackwardArgs&, cudaStream_t);
template void launch_dha_backward<float, 128, Grad::v, true>(const BackwardArgs&, cudaStream_t);

}  // namespace tenfold::cuda
