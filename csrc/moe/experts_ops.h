// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the expert ops share: argument checks. Values of index,
// offsets and gather are checked on the CPU only.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/tensor.h"
#include "moe/experts_parts.h"

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

struct LoraCall : RoutedCall {
  std::array<Tensor, 3> base;  // [f, d], [f, d], [d, f]
  std::array<Tensor, 3> a, b;  // [n, r, in], [n, out, r]
  int64_t rank;
  float scale;
};
LoraCall check_lora_experts(const char* op, const Tensor& x, const std::array<Tensor, 3>& base,
                            const std::array<Tensor, 3>& a, const std::array<Tensor, 3>& b,
                            double scale, const Tensor& index, const Tensor& weight);

// Like t of these sizes, or empty.
Tensor wanted_like(const Tensor& t, bool wanted, std::initializer_list<int64_t> sizes);

// A gradients' call, and its results: of x, the shared block, three A, three B and weight. Those
// not wanted (bit i) are empty.
struct LoraBackward {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor>;
  Tensor grad, hidden, low;
  std::array<Tensor, 11> made;
  int64_t wanted;

  void* data(int i) const { return wanted >> i & 1 ? made[i].data_ptr() : nullptr; }
  Results results() const {
    return std::apply([](auto&... t) { return Results(t...); }, made);
  }
};
LoraBackward check_lora_backward(const char* op, const LoraCall& c, const Tensor& grad_out,
                                 const Tensor& hidden, const Tensor& low, int64_t wanted);

// Lists of gate, up and down.
void check_three(const char* name, const std::vector<Tensor>& tensors);

// An upstream gradient [T, d] or pre-activations [S, 2 f], like x: rows contiguous.
Tensor check_rows_like(const char* op, const char* arg, const Tensor& t, const RoutedCall& c,
                       int64_t rows, int64_t cols, const char* layout);

}  // namespace tenfold
