// SPDX-License-Identifier: Apache-2.0
// CPU registration of grouped_gemm and grouped_gemm_wgrad.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "core/parallel.h"
#include "moe/cpu/routing.h"

namespace tenfold::cpu {
namespace {

std::vector<int64_t> read_offsets(const char* op, const GroupedCall& c) {
  std::vector<int64_t> at = read_ints<int64_t>(c.offsets);
  for (size_t i = 0; i < at.size(); ++i)
    TENFOLD_CHECK_VALUE(i == 0 ? at[0] == 0 : at[i] >= at[i - 1] && at[i] <= c.slots,
                        "tenfold::", op,
                        ": offsets must begin with 0 and not decrease up to S = ", c.slots,
                        ", got offsets[", i, "] = ", at[i]);
  return at;
}

std::vector<int32_t> read_gather(const char* op, const GroupedCall& c) {
  if (!c.gather) return {};
  std::vector<int32_t> at(c.slots);
  for (int64_t i = 0; i < c.slots; ++i) {
    const int64_t row = integer_at(*c.gather, i);
    TENFOLD_CHECK_INDEX(row >= 0 && row < c.a_rows, "tenfold::", op, ": gather[", i, "] = ", row,
                        " is out of range for the ", c.a_rows, " rows of a");
    at[i] = static_cast<int32_t>(row);
  }
  return at;
}

MoeRows gathered(const GroupedCall& c, const std::vector<int32_t>& gather) {
  return {c.a.data_ptr(), c.a.strides()[0], c.gather ? gather.data() : nullptr};
}

Tensor grouped_gemm_op(Tensor a, Tensor w, Tensor offsets_in, bool trans_w, OptTensor gather_in) {
  constexpr auto kOp = "grouped_gemm";
  const GroupedCall c = check_grouped_gemm(a, w, offsets_in, trans_w, gather_in);
  const std::vector<int64_t> offsets = read_offsets(kOp, c);
  const std::vector<int32_t> gather = read_gather(kOp, c);
  const Tensor out = new_output(c.a, {c.slots, c.cols}, c.a.scalar_type());
  if (out.numel() == 0) return out;
  const Isa isa = active_isa();
  const Dtype dtype = to_dtype(c.a.scalar_type());
  const GroupedProduct p{
      dtype, c.depth, c.cols, 1, {gathered(c, gather), {}}, {matrices_of(c.w, trans_w), {}}};
  grouped_product(isa, p, {offsets.data(), c.groups},
                  store_as(isa, dtype, p, 1.0f, out.data_ptr(), c.cols));
  const int64_t row = c.cols * dtype_size(dtype), rest = offsets.back();
  std::memset(static_cast<char*>(out.data_ptr()) + rest * row, 0, (c.slots - rest) * row);
  return out;
}

Tensor grouped_gemm_wgrad_op(Tensor dy, Tensor a, Tensor offsets_in, OptTensor gather_in) {
  constexpr auto kOp = "grouped_gemm_wgrad";
  const GroupedCall c = check_grouped_gemm_wgrad(dy, a, offsets_in, gather_in);
  const std::vector<int64_t> offsets = read_offsets(kOp, c);
  const std::vector<int32_t> gather = read_gather(kOp, c);
  const Tensor out = new_output(c.a, {c.groups, c.cols, c.depth}, c.a.scalar_type());
  grouped_wgrad(active_isa(), to_dtype(c.a.scalar_type()), rows_of(c.w), c.cols,
                gathered(c, gather), c.depth, {offsets.data(), c.groups}, out.data_ptr());
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&tenfold::cpu::grouped_gemm_op));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&tenfold::cpu::grouped_gemm_wgrad_op));
}
