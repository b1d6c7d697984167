// What the CPU and CUDA registrations of the expert ops share: argument checks. Values of index,
// offsets and gather are checked on the CPU only.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "core/check.h"
#include "core/tensor.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// Matrices and rows have contiguous rows; index, weight, offsets, gather are contiguous.
struct GroupedCall {
  Tensor a, w, offsets;
  OptTensor gather;
  int64_t slots, a_rows, groups, cols, depth;
};
GroupedCall check_grouped_gemm(const Tensor& a, const Tensor& w, const Tensor& offsets,
                               bool trans_w, const OptTensor& gather);
// `w` is dy here, [slots, cols].
GroupedCall check_grouped_gemm_wgrad(const Tensor& dy, const Tensor& a, const Tensor& offsets,
                                     const OptTensor& gather);

struct RoutedCall {
  Tensor x, index, weight;  // [T, d], [T, k], float32 [T, k]
  int64_t tokens, dim, k, experts, ffn;
};
struct ExpertsCall : RoutedCall {
  Tensor gate_up, down;  // [n, 2 f, d], [n, d, f]
};
ExpertsCall check_experts(const char* op, const Tensor& x, const Tensor& gate_up,
                          const Tensor& down, const Tensor& index, const Tensor& weight);

enum LoraPart : int { kGate, kUp, kDown };
struct LoraCall : RoutedCall {
  std::array<Tensor, 3> base;  // [f, d], [f, d], [d, f]
  std::array<Tensor, 3> a, b;  // [n, r, in], [n, out, r]
  int64_t rank;
  float scale;
};
LoraCall check_lora_experts(const char* op, const Tensor& x, const std::array<Tensor, 3>& base,
                            const std::array<Tensor, 3>& a, const std::array<Tensor, 3>& b,
                            double scale, const Tensor& index, const Tensor& weight);

// Lists of gate, up and down.
void check_three(const char* name, const std::vector<Tensor>& tensors);

// An upstream gradient [T, d] or pre-activations [S, 2 f], like x: rows contiguous.
Tensor check_rows_like(const char* op, const char* arg, const Tensor& t, const RoutedCall& c,
                       int64_t rows, int64_t cols, const char* layout);

}  // namespace tenfold
