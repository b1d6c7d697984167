// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda/dha_decode_kernel.cuh"

namespace tenfold::cuda {

template int64_t plan_dha_decode<fp16_t, 256>(DhaDecodeOnDevice&);
template int64_t decode_blocks<fp16_t, 256>(const DhaDecodeOnDevice&);
template void launch_dha_decode<fp16_t, 256>(const DhaDecodeOnDevice&, cudaStream_t);

}  // namespace tenfold::cuda
