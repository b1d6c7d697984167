// SPDX-License-Identifier: Apache-2.0
// Grouped products and expert blocks on the device: what lora_mlp.cpp and swiglu_mlp.cpp of cpu/
// do, kernel by kernel. Nothing waits for the host. Slots of indices outside [0, experts) belong to
// nobody.
#pragma once

#include "core/convert.cuh"
#include "core/room.h"

namespace tenfold::cuda {

struct DeviceRows {
  const void* data;
  int64_t stride;
};
struct DeviceMatrices {  // a row of one: `stride` elements
  const void* data;
  int64_t group_stride, stride;
};

// How much is done at a time. No result depends on it.
struct ExpertLimits {
  int64_t round_bytes = int64_t{256} << 20;  // of float rows that wait for their sum
  int64_t few_rows = 32;                     // of a group on average: small tiles
};

struct GroupedGemmCall {
  DeviceRows a;
  DeviceMatrices w;
  bool trans_w;
  IntArray offsets, gather;
  int64_t slots, a_rows, groups, cols, depth;
  void* out;  // [slots, cols]
};
template <class T>
void grouped_gemm(const GroupedGemmCall& c, const ExpertLimits& limits, cudaStream_t stream);

struct GroupedWgradCall {
  DeviceRows dy, a;
  IntArray offsets, gather;  // gather: of rows of a
  int64_t slots, a_rows, groups, cols, depth;
  void* out;  // [groups, cols, depth]
};
template <class T>
void grouped_wgrad(const GroupedWgradCall& c, cudaStream_t stream);

struct RoutedTokens {
  DeviceRows x;         // [tokens, dim]
  IntArray index;       // [tokens, k]
  const float* weight;  // [tokens, k]
  int64_t tokens, dim, k, experts, ffn;
  int64_t slots() const { return tokens * k; }
};

struct ExpertBlock : RoutedTokens {
  DeviceMatrices gate_up, down;
};
struct ExpertGradients {
  void *x, *gate_up, *down;  // null: not wanted
  float* weight;
};
// hidden [S, 2 f] is stored unless null.
template <class T>
void experts_forward(const ExpertBlock& b, void* hidden, void* out, const ExpertLimits& limits,
                     const Room& room, cudaStream_t stream);
template <class T>
void experts_backward(const ExpertBlock& b, const DeviceRows& grad, const void* hidden,
                      const ExpertGradients& out, const ExpertLimits& limits, const Room& room,
                      cudaStream_t stream);

struct LoraBlock : RoutedTokens {  // of gate, up, down
  DeviceRows base[3];
  DeviceMatrices a[3], b[3];
  int64_t rank;
  float scale;
};
struct LoraGradients {
  void* x;
  void *base[3], *a[3], *b[3];
  float* weight;
};
// low [S, 2 r] is always stored.
template <class T>
void lora_forward(const LoraBlock& b, void* hidden, void* low, void* out,
                  const ExpertLimits& limits, const Room& room, cudaStream_t stream);
template <class T>
void lora_backward(const LoraBlock& b, const DeviceRows& grad, const void* hidden, const void* low,
                   const LoraGradients& out, const ExpertLimits& limits, const Room& room,
                   cudaStream_t stream);

}  // namespace tenfold::cuda
