// SPDX-License-Identifier: Apache-2.0
// CPU registration of moe_sort, moe_permute and moe_combine: chunks of slots, and rows, over
// threads.
#include "moe/slots.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "moe/cpu/slot_sort.h"

namespace tenfold::cpu {
namespace {

constexpr double kBytesPerMicro = 8000.0;  // that one thread moves

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort_op(Tensor index, int64_t num_experts,
                                                       bool allow_sentinel) {
  const SortCall c = check_sort(index, num_experts, allow_sentinel);
  if (c.index.scalar_type() == ScalarType::Int) {
    SlotSort<int32_t>(c, kSortChunk).run();
  } else {
    SlotSort<int64_t>(c, kSortChunk).run();
  }
  return {c.order, c.inverse, c.counts, c.offsets};
}

double row_micros(int64_t rows, int64_t d, Dtype dtype) {
  return 0.02 + static_cast<double>(rows * d * dtype_size(dtype)) / kBytesPerMicro;
}

// Rows of a tensor [N, d].
struct RowsOf {
  char* data;
  int64_t bytes;  // between rows

  explicit RowsOf(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        bytes((t.numel() > 0 ? t.strides()[0] : 0) * dtype_size(to_dtype(t.scalar_type()))) {}
  char* operator[](int64_t i) const { return data + i * bytes; }
};

Tensor moe_permute_op(Tensor x, Tensor order, int64_t k) {
  constexpr auto kOp = "moe_permute";
  check_dim(kOp, "x", x, 2, "[T, d]");
  const PermuteCall c = check_permute(kOp, "x", x, order, k, x.sizes()[0]);
  const Dtype dtype = to_dtype(x.scalar_type());
  const Tensor y = new_output(c.x, {c.positions, c.dim}, x.scalar_type());
  const RowsOf from(c.x), to(y);
  const size_t bytes = c.dim * dtype_size(dtype);
  parallel_for(c.positions, row_micros(2, c.dim, dtype), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int32_t q = c.order.data[p];
      if (q >= 0) {
        std::memcpy(to[p], from[q / k], bytes);
      } else {
        std::memset(to[p], 0, bytes);
      }
    }
  });
  return y;
}

// out[t] = sum over the k slots of token t.
void sum_tokens(const Tensor& y, const float* weight, const int32_t* inverse, int64_t tokens,
                int64_t k, const Tensor& out) {
  const Dtype dtype = to_dtype(y.scalar_type());
  const int64_t d = y.sizes()[1];
  const RowsOf from(y), to(out);
  parallel_for(tokens, row_micros(k + 1, d, dtype), [&](int64_t begin, int64_t end) {
    std::vector<const void*> rows(k);
    std::vector<float> weights(k);
    for (int64_t t = begin; t < end; ++t) {
      int64_t count = 0;
      for (int64_t q = t * k; q < t * k + k; ++q) {
        if (inverse[q] < 0) continue;
        rows[count] = from[inverse[q]];
        weights[count++] = weight != nullptr ? weight[q] : 1.0f;
      }
      TENFOLD_ISA_CALL(sum_slots, rows.data(), weights.data(), count, dtype, d, to[t]);
    }
  });
}

// Where the values of `from` in [0, n) stand in it, -1 where they do not; none may stand twice.
std::vector<int32_t> inverted(const char* op, const char* arg, const int32_t* from, int64_t count,
                              int64_t n) {
  std::vector<int32_t> at(n, -1);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t x = from[i];
    if (x < 0) continue;
    TENFOLD_CHECK_VALUE(at[x] < 0, "tenfold::", op, ": ", arg, " must not repeat a value, got ", x,
                        " at positions ", at[x], " and ", i);
    at[x] = static_cast<int32_t>(i);
  }
  return at;
}

Tensor moe_permute_backward_op(Tensor grad, Tensor order, int64_t k, int64_t tokens) {
  constexpr auto kOp = "moe_permute_backward";
  const PermuteCall c = check_permute(kOp, "grad", grad, order, k, tokens);
  check_fits(kOp, "order", order, {grad.sizes()[0]}, "[S]", "grad", grad);
  const auto inverse = inverted(kOp, "order", c.order.data, c.positions, tokens * k);
  const Tensor out = new_output(c.x, {tokens, c.dim}, grad.scalar_type());
  sum_tokens(c.x, nullptr, inverse.data(), tokens, k, out);
  return out;
}

Tensor moe_combine_op(Tensor y, Tensor weight, Tensor inverse) {
  const CombineCall c = check_combine("moe_combine", y, weight, inverse);
  const Tensor out = new_output(c.y, {c.tokens, c.dim}, y.scalar_type());
  sum_tokens(c.y, data_as<float>(c.weight), c.inverse.data, c.tokens, c.k, out);
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward_op(Tensor grad_in, Tensor y, Tensor weight,
                                                   Tensor inverse, bool of_y, bool of_weight) {
  constexpr auto kOp = "moe_combine_backward";
  const CombineCall c = check_combine(kOp, y, weight, inverse);
  const Tensor grad = check_combine_grad(kOp, grad_in, c, y, weight);
  const int64_t positions = y.sizes()[0];
  const auto slot = inverted(kOp, "inverse", c.inverse.data, c.tokens * c.k, positions);
  const Tensor grad_y = of_y ? new_output(c.y, {positions, c.dim}, y.scalar_type())
                             : new_output(c.y, {0}, y.scalar_type());
  const Tensor grad_weight = of_weight ? new_output(c.y, {c.tokens, c.k}, ScalarType::Float)
                                       : new_output(c.y, {0}, ScalarType::Float);
  const Dtype dtype = to_dtype(y.scalar_type());
  const RowsOf from(c.y), up(grad), to(grad_y);
  const size_t bytes = c.dim * dtype_size(dtype);
  auto* const of_slot = of_weight ? data_as<float>(grad_weight) : nullptr;
  if (of_weight) std::fill_n(of_slot, c.tokens * c.k, 0.0f);
  // By position, so that rows of no slot become zeros here too.
  parallel_for(positions, row_micros(3, c.dim, dtype), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int32_t q = slot[p];
      if (q < 0) {
        if (of_y) std::memset(to[p], 0, bytes);
        continue;
      }
      const float dot =
          TENFOLD_ISA_CALL(slot_grad, up[q / c.k], of_weight ? from[p] : nullptr,
                           data_as<float>(c.weight)[q], dtype, c.dim, of_y ? to[p] : nullptr);
      if (of_weight) of_slot[q] = dot;
    }
  });
  return {grad_y, grad_weight};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("moe_sort", TORCH_BOX(&tenfold::cpu::moe_sort_op));
  m.impl("moe_permute", TORCH_BOX(&tenfold::cpu::moe_permute_op));
  m.impl("moe_permute_backward", TORCH_BOX(&tenfold::cpu::moe_permute_backward_op));
  m.impl("moe_combine", TORCH_BOX(&tenfold::cpu::moe_combine_op));
  m.impl("moe_combine_backward", TORCH_BOX(&tenfold::cpu::moe_combine_backward_op));
}
