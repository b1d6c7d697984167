// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of masked_adamw_ and masked_adamw_8bit_, for ctypes. The
// launch code is the kernels' own.
#define TENFOLD_CUDA_EMU
#include "entry.h"
#include "optim/cuda/masked_adamw_8bit_kernel.cuh"
#include "optim/cuda/masked_adamw_kernel.cuh"

namespace {

// Per tensor 10 pointers: param grad exp_avg exp_avg_sq max step prefix mask absmax1 absmax2; and 8
// numbers: numel state_numel col_trained mask_kind inner dtype state_dtype id.
Adamw8Tensor tensor_of(void* const* at, const int64_t* n) {
  Adamw8Tensor t{};
  t.param = at[0], t.grad = at[1], t.exp_avg = at[2], t.exp_avg_sq = at[3];
  t.max_exp_avg_sq = at[4], t.step = static_cast<float*>(at[5]);
  t.prefix = static_cast<const int32_t*>(at[6]);
  t.absmax1 = static_cast<float*>(at[8]), t.absmax2 = static_cast<float*>(at[9]);
  t.numel = n[0], t.state_numel = n[1], t.col_trained = n[2];
  t.mask = {static_cast<MaskKind>(n[3]), static_cast<const uint8_t*>(at[7]), n[4]};
  t.dtype = static_cast<Dtype>(n[5]), t.state_dtype = static_cast<Dtype>(n[6]);
  t.id = static_cast<uint32_t>(n[7]);
  return t;
}

struct Call {
  std::vector<Adamw8Tensor> tensors;
  AdamwOptions options;
  std::vector<AdamwScalars> scalars;
};

// numbers: lr beta1 beta2 weight_decay eps; flags: maximize amsgrad stochastic param_only seed
// lr_kind; inputs: lr (or null) grad_scale found_inf clip_coef
Call begin(int64_t count, void* const* pointers, const int64_t* sizes, const double* numbers,
           const int64_t* flags, const void* const* inputs) {
  Call call;
  std::vector<float*> steps;
  for (int64_t i = 0; i < count; ++i) {
    call.tensors.push_back(tensor_of(pointers + 10 * i, sizes + 8 * i));
    steps.push_back(call.tensors.back().step);
  }
  call.options = {
      numbers[0],    numbers[1],    numbers[2],    numbers[3],    numbers[4],
      flags[0] != 0, flags[1] != 0, flags[2] != 0, flags[3] != 0, static_cast<uint64_t>(flags[4])};
  AdamwInputs in;
  in.lr = {inputs[0], static_cast<int>(flags[5])};
  in.grad_scale = static_cast<const float*>(inputs[1]);
  in.found_inf = static_cast<const float*>(inputs[2]);
  in.clip_coef = static_cast<const float*>(inputs[3]);
  call.scalars.resize(count);
  launch_adamw_advance(steps.data(), count, call.options, in, call.scalars.data(), nullptr);
  return call;
}

}  // namespace

API void emu_masked_adamw(int64_t count, void* const* pointers, const int64_t* sizes,
                          const double* numbers, const int64_t* flags, const void* const* inputs) {
  const Call call = begin(count, pointers, sizes, numbers, flags, inputs);
  for (int dtype = 0; dtype < 3; ++dtype)
    for (int state = 0; state < 3; ++state) {
      std::vector<const AdamwTensor*> chosen;
      std::vector<int> at;
      for (int64_t i = 0; i < count; ++i) {
        const Adamw8Tensor& t = call.tensors[i];
        if (static_cast<int>(t.dtype) != dtype || static_cast<int>(t.state_dtype) != state)
          continue;
        chosen.push_back(&t);
        at.push_back(static_cast<int>(i));
      }
      if (chosen.empty()) continue;
      dispatch_adamw(static_cast<Dtype>(dtype), static_cast<Dtype>(state), [&]<class P, class S>() {
        launch_masked_adamw<P, S>(chosen.data(), at.data(), static_cast<int64_t>(at.size()),
                                  call.options, call.scalars.data(), nullptr);
      });
    }
}

API void emu_masked_adamw_8bit(int64_t count, void* const* pointers, const int64_t* sizes,
                               const double* numbers, const int64_t* flags,
                               const void* const* inputs, const float* code1, const float* code2) {
  const Call call = begin(count, pointers, sizes, numbers, flags, inputs);
  for (int dtype = 0; dtype < 3; ++dtype) {
    std::vector<const Adamw8Tensor*> chosen;
    std::vector<int> at;
    for (int64_t i = 0; i < count; ++i) {
      if (static_cast<int>(call.tensors[i].dtype) != dtype) continue;
      chosen.push_back(&call.tensors[i]);
      at.push_back(static_cast<int>(i));
    }
    with_dtype(dtype, [&]<class P>() {
      launch_masked_adamw_8bit<P>(chosen.data(), at.data(), static_cast<int64_t>(at.size()),
                                  call.options, call.scalars.data(), code1, code2, nullptr);
    });
  }
}
