// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of expert blocks, for ctypes. The launch code is the
// kernels' own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "moe/cuda/experts_launch.cuh"
#include "moe/cuda/lora_launch.cuh"

namespace {

ExpertLimits limits_of(const int64_t* n) {
  return {n[0], n[1]};
}

DeviceMatrices matrices(const void* data, const int64_t* strides) {
  return {data, strides[0], strides[1]};
}

}  // namespace

// n: dtype trans_w offsets_wide gather_wide slots a_rows groups cols depth a_stride
//    w_group_stride w_stride, and of limits
API void emu_grouped_gemm(const void* a, const void* w, const void* offsets, const void* gather,
                          void* out, const int64_t* n) {
  const GroupedGemmCall c{{a, n[9]},
                          matrices(w, n + 10),
                          n[1] != 0,
                          ints(offsets, n[2]),
                          ints(gather, n[3]),
                          n[4],
                          n[5],
                          n[6],
                          n[7],
                          n[8],
                          out};
  with_dtype(n[0], [&]<class T>() { grouped_gemm<T>(c, limits_of(n + 12), nullptr); });
}

// n: dtype offsets_wide gather_wide slots a_rows groups cols depth dy_stride a_stride
API void emu_grouped_wgrad(const void* dy, const void* a, const void* offsets, const void* gather,
                           void* out, const int64_t* n) {
  const GroupedWgradCall c{
      {dy, n[8]}, {a, n[9]}, ints(offsets, n[1]), ints(gather, n[2]), n[3], n[4], n[5], n[6],
      n[7],       out};
  with_dtype(n[0], [&]<class T>() { grouped_wgrad<T>(c, nullptr); });
}

namespace {

// n: dtype index_wide tokens dim k experts ffn x_stride grad_stride, and of limits
struct Routed {
  const int64_t* n;
  const void *const x, *const index;
  const float* weight;

  void fill(RoutedTokens* to) const {
    to->x = {x, n[7]};
    to->index = ints(index, n[1]);
    to->weight = weight;
    to->tokens = n[2], to->dim = n[3], to->k = n[4], to->experts = n[5], to->ffn = n[6];
  }
  ExpertLimits limits() const { return limits_of(n + 9); }
};

ExpertBlock block(const Routed& r, const void* gate_up, const void* down, const int64_t* strides) {
  ExpertBlock b{};
  r.fill(&b);
  b.gate_up = matrices(gate_up, strides), b.down = matrices(down, strides + 2);
  return b;
}

// base, A, B of gate, up, down; strides: of base, then (group's, row's) of A and of B
LoraBlock lora_block(const Routed& r, const void* const* m, const int64_t* strides, int64_t rank,
                     double scale) {
  LoraBlock b{};
  r.fill(&b);
  b.rank = rank, b.scale = static_cast<float>(scale);
  for (int i = 0; i < 3; ++i) {
    b.base[i] = {m[i], strides[i]};
    b.a[i] = matrices(m[3 + i], strides + 3 + 2 * i);
    b.b[i] = matrices(m[6 + i], strides + 9 + 2 * i);
  }
  return b;
}

}  // namespace

API void emu_experts_forward(const void* x, const void* gate_up, const void* down,
                             const void* index, const float* weight, void* hidden, void* out,
                             const int64_t* n, const int64_t* strides) {
  Memory memory;
  const Routed r{n, x, index, weight};
  const ExpertBlock b = block(r, gate_up, down, strides);
  with_dtype(n[0], [&]<class T>() {
    experts_forward<T>(b, hidden, out, r.limits(), memory.room(), nullptr);
  });
}

// out: x gate_up down weight, or null
API void emu_experts_backward(const void* grad, const void* x, const void* gate_up,
                              const void* down, const void* index, const float* weight,
                              const void* hidden, void* const* out, const int64_t* n,
                              const int64_t* strides) {
  Memory memory;
  const Routed r{n, x, index, weight};
  const ExpertBlock b = block(r, gate_up, down, strides);
  with_dtype(n[0], [&]<class T>() {
    experts_backward<T>(b, {grad, n[8]}, hidden,
                        {out[0], out[1], out[2], static_cast<float*>(out[3])}, r.limits(),
                        memory.room(), nullptr);
  });
}

API void emu_lora_forward(const void* x, const void* const* m, const void* index,
                          const float* weight, void* hidden, void* low, void* out, const int64_t* n,
                          const int64_t* strides, int64_t rank, double scale) {
  Memory memory;
  const Routed r{n, x, index, weight};
  const LoraBlock b = lora_block(r, m, strides, rank, scale);
  with_dtype(n[0], [&]<class T>() {
    lora_forward<T>(b, hidden, low, out, r.limits(), memory.room(), nullptr);
  });
}

// out: x, base, A, B, weight, or null
API void emu_lora_backward(const void* grad, const void* x, const void* const* m, const void* index,
                           const float* weight, const void* hidden, const void* low,
                           void* const* out, const int64_t* n, const int64_t* strides, int64_t rank,
                           double scale) {
  Memory memory;
  const Routed r{n, x, index, weight};
  const LoraBlock b = lora_block(r, m, strides, rank, scale);
  LoraGradients g{};
  g.x = out[0], g.weight = static_cast<float*>(out[10]);
  for (int i = 0; i < 3; ++i) g.base[i] = out[1 + i], g.a[i] = out[4 + i], g.b[i] = out[7 + i];
  with_dtype(n[0], [&]<class T>() {
    lora_backward<T>(b, {grad, n[8]}, hidden, low, g, r.limits(), memory.room(), nullptr);
  });
}
