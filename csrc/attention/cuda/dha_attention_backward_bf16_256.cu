// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda/dha_attention_backward_kernel.cuh"

namespace tenfold::cuda {

template int64_t backward_blocks<bf16_t, 256, Grad::q>(const BackwardArgs&);
template void launch_dha_backward<bf16_t, 256, Grad::q>(const BackwardArgs&, cudaStream_t);
template int64_t backward_blocks<bf16_t, 256, Grad::k>(const BackwardArgs&);
template void launch_dha_backward<bf16_t, 256, Grad::k>(const BackwardArgs&, cudaStream_t);
template int64_t backward_blocks<bf16_t, 256, Grad::v>(const BackwardArgs&);
template void launch_dha_backward<bf16_t, 256, Grad::v>(const BackwardArgs&, cudaStream_t);

}  // namespace tenfold::cuda
