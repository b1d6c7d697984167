// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda/dha_attention_kernel.cuh"

namespace tenfold::cuda {

template int64_t forward_blocks<fp16_t, 128>(const ForwardArgs&);
template void launch_dha_attention<fp16_t, 128>(const ForwardArgs&, cudaStream_t);

}  // namespace tenfold::cuda
