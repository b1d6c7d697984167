// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `loss` for traces and their rewards, for ctypes. The
// launch code is the kernels' own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "loss/cuda/reward_kernel.cuh"
#include "loss/cuda/segment_mean_kernel.cuh"
#include "loss/cuda/traces_kernel.cuh"

// n: rows length ids_stride mask_stride ids_wide trace_wide answer_wide tool obs work eos
API void emu_trace_classes(const void* ids, const uint8_t* mask, const void* trace,
                           const void* answer, uint8_t* out, const int64_t* n) {
  launch_trace_classes({ints(ids, n[4]), mask, ints(trace, n[5]), ints(answer, n[6]), n[0], n[1],
                        n[2], n[3], TraceIds{n[7], n[8], n[9], n[10]}, out},
                       nullptr);
}

// n: rows length stride on_positive
API void emu_class_weights(const uint8_t* cls, const uint8_t* positive, float* out,
                           const int64_t* n, const double* x) {
  ClassWeightArgs a{};
  a.cls = cls, a.positive = positive, a.rows = n[0], a.length = n[1], a.stride = n[2];
  a.beta = static_cast<float>(x[0]), a.omega = static_cast<float>(x[1]);
  a.on_positive = n[3] != 0, a.out = out;
  launch_class_weights(a, nullptr);
}

// n: rows length stride stops ids_wide lens_wide stops_wide
API void emu_first_stop(const void* ids, const void* lens, const void* stops, int64_t* pos,
                        int64_t* which, const int64_t* n) {
  launch_first_stop(
      {ints(ids, n[4]), ints(lens, n[5]), ints(stops, n[6]), n[0], n[1], n[2], n[3], pos, which},
      nullptr);
}

// n: rows length segments seg_wide backward
API void emu_segment_mean(const float* x, const void* seg, float* out, const int64_t* n) {
  Memory memory;
  auto* const spare = static_cast<int*>(memory.room()(4 * segment_spare(n[0], n[2])));
  launch_segment_mean({x, ints(seg, n[3]), n[0], n[1], n[2], spare, out}, n[4] != 0, nullptr);
}

namespace {

const Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

}  // namespace

// n: dtype head_dtype rows length dim classes row_stride token_stride mask_stride mean
API void emu_reward(const void* hidden, const uint8_t* mask, const void* weight, float* reward,
                    float* pooled, const int64_t* n) {
  Memory memory;
  RewardArgs a{};
  a.hidden = hidden, a.mask = mask, a.weight = {weight, kDtypes[n[1]]};
  a.rows = n[2], a.length = n[3], a.dim = n[4], a.classes = n[5];
  a.row_stride = n[6], a.token_stride = n[7], a.mask_stride = n[8];
  a.pool = n[9] != 0 ? PoolTokens::mean : PoolTokens::last;
  a.pooled = pooled, a.reward = reward;
  a.parts = static_cast<float*>(memory.room()(4 * a.rows * reward_blocks(a.dim) * a.classes));
  with_dtype(n[0], [&]<class T>() { launch_reward<T>(a, nullptr); });
}

// of_hidden, of_weight: or null. n: as above, without the strides of hidden
API void emu_reward_backward(const float* grad, const float* pooled, const uint8_t* mask,
                             const void* weight, void* of_hidden, void* of_weight,
                             const int64_t* n) {
  RewardGradArgs a{};
  a.grad = grad, a.pooled = pooled, a.mask = mask, a.weight = {weight, kDtypes[n[1]]};
  a.rows = n[2], a.length = n[3], a.dim = n[4], a.classes = n[5], a.mask_stride = n[6];
  a.pool = n[7] != 0 ? PoolTokens::mean : PoolTokens::last;
  if (of_hidden != nullptr) {
    a.out = of_hidden;
    with_dtype(n[0], [&]<class T>() { launch_reward_hidden<T>(a, nullptr); });
  }
  if (of_weight != nullptr) {
    a.out = of_weight;
    with_dtype(n[1], [&]<class T>() { launch_reward_weight<T>(a, nullptr); });
  }
}

// out: loss delta of_pos of_neg, the last two or null. n: dtype pairs
API void emu_pairs(const void* pos, const void* neg, const float* margin, float* const* out,
                   const int64_t* n, const double* x) {
  PairArgs a{};
  a.pos = pos, a.neg = neg, a.margin = margin;
  a.pairs = n[1], a.center = static_cast<float>(x[0]);
  a.loss = out[0], a.delta = out[1], a.of_pos = out[2], a.of_neg = out[3];
  with_dtype(n[0], [&]<class T>() { launch_pair_loss<T>(a, nullptr); });
}
