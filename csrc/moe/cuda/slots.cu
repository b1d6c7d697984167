// SPDX-License-Identifier: Apache-2.0
// CUDA registration of moe_sort, moe_permute and moe_combine. Values of index, order and inverse
// are not read by the host: what is out of range is left out.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "moe/cuda/slots_kernel.cuh"
#include "moe/cuda/sort_kernel.cuh"
#include "moe/slots_ops.h"

namespace tenfold::cuda {
namespace {

IntArray ints_of(const Tensor& t) {  // contiguous
  return {t.data_ptr(), t.scalar_type() == ScalarType::Long, 1};
}

int64_t row_stride(const Tensor& t) {
  return t.numel() > 0 ? t.strides()[0] : 0;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort_op(Tensor index, int64_t num_experts,
                                                       bool allow_sentinel) {
  const SortCall c = check_sort(index, num_experts, allow_sentinel);
  const Launch launch(c.index);
  SortArgs a = sort_shape(c.slots, c.experts);
  a.index = ints_of(c.index);
  a.order = data_as<int32_t>(c.order), a.inverse = data_as<int32_t>(c.inverse);
  a.counts = data_as<int32_t>(c.counts), a.offsets = data_as<int32_t>(c.offsets);
  const Tensor first = new_output(c.index, {sort_ints(a)}, ScalarType::Int);
  a.first = data_as<int32_t>(first);
  launch_sort(a, launch.stream);
  launch.check();
  return {c.order, c.inverse, c.counts, c.offsets};
}

Tensor moe_permute_op(Tensor x, Tensor order, int64_t k) {
  constexpr auto kOp = "moe_permute";
  check_dim(kOp, "x", x, 2, "[T, d]");
  const PermuteCall c = check_permute(kOp, "x", x, order, k, x.sizes()[0]);
  const Launch launch(c.x);
  const Tensor y = new_output(c.x, {c.positions, c.dim}, x.scalar_type());
  check_grid(kOp, c.positions);
  dispatch_dtype(x.scalar_type(), kOp, [&]<class T>() {
    constexpr int64_t kSize = sizeof(T);
    launch_permute<T>({c.x.data_ptr(), row_stride(c.x) * kSize, c.dim * kSize,
                       ints_of(c.order.kept), c.positions, c.tokens * c.k, c.k, y.data_ptr()},
                      launch.stream);
  });
  launch.check();
  return y;
}

// Where each of n values stands in the list.
Tensor inverted(const char* op, const IndexList& from, int64_t n, const Launch& launch) {
  const int64_t count = from.kept.numel();
  check_grid(op, (count > n ? count : n) / kInvertThreads + 1);
  const Tensor at = new_output(from.kept, {n}, ScalarType::Int);
  launch_invert({ints_of(from.kept), count, n, data_as<int32_t>(at)}, launch.stream);
  return at;
}

void combine(const char* op, CombineArgs a, ScalarType dtype, const Launch& launch) {
  check_grid(op, a.tokens);
  dispatch_dtype(dtype, op, [&]<class T>() { launch_combine<T>(with_shape<T>(a), launch.stream); });
}

Tensor moe_permute_backward_op(Tensor grad, Tensor order, int64_t k, int64_t tokens) {
  constexpr auto kOp = "moe_permute_backward";
  const PermuteCall c = check_permute(kOp, "grad", grad, order, k, tokens);
  check_fits(kOp, "order", order, {grad.sizes()[0]}, "[S]", "grad", grad);
  const Launch launch(c.x);
  const Tensor out = new_output(c.x, {tokens, c.dim}, grad.scalar_type());
  const Tensor inverse = inverted(kOp, c.order, tokens * k, launch);
  CombineArgs a{};
  a.y = c.x.data_ptr(), a.stride = row_stride(c.x), a.rows = c.positions, a.dim = c.dim;
  a.inverse = ints_of(inverse), a.tokens = tokens, a.k = k, a.out = out.data_ptr();
  combine(kOp, a, grad.scalar_type(), launch);
  launch.check();
  return out;
}

Tensor moe_combine_op(Tensor y, Tensor weight, Tensor inverse) {
  constexpr auto kOp = "moe_combine";
  const CombineCall c = check_combine(kOp, y, weight, inverse);
  const Launch launch(c.y);
  const Tensor out = new_output(c.y, {c.tokens, c.dim}, y.scalar_type());
  CombineArgs a{};
  a.y = c.y.data_ptr(), a.stride = row_stride(c.y), a.rows = y.sizes()[0], a.dim = c.dim;
  a.weight = data_as<float>(c.weight), a.inverse = ints_of(c.inverse.kept);
  a.tokens = c.tokens, a.k = c.k, a.out = out.data_ptr();
  combine(kOp, a, y.scalar_type(), launch);
  launch.check();
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward_op(Tensor grad_in, Tensor y, Tensor weight,
                                                   Tensor inverse, bool of_y, bool of_weight) {
  constexpr auto kOp = "moe_combine_backward";
  const CombineCall c = check_combine(kOp, y, weight, inverse);
  const Tensor grad = check_combine_grad(kOp, grad_in, c, y, weight);
  const Launch launch(c.y);
  const int64_t positions = y.sizes()[0];
  const Tensor grad_y = of_y ? new_output(c.y, {positions, c.dim}, y.scalar_type())
                             : new_output(c.y, {0}, y.scalar_type());
  const Tensor grad_weight = of_weight ? new_output(c.y, {c.tokens, c.k}, ScalarType::Float)
                                       : new_output(c.y, {0}, ScalarType::Float);
  CombineGradArgs a{};
  a.grad = grad.data_ptr(), a.grad_stride = row_stride(grad);
  a.y = c.y.data_ptr(), a.stride = row_stride(c.y), a.rows = positions, a.dim = c.dim;
  a.weight = data_as<float>(c.weight), a.inverse = ints_of(c.inverse.kept);
  a.tokens = c.tokens, a.k = c.k;
  OptTensor slot;
  if (of_y && positions > 0) {
    slot = inverted(kOp, c.inverse, positions, launch);
    a.slot = data_as<int32_t>(*slot), a.grad_y = grad_y.data_ptr();
  }
  if (of_weight) a.grad_weight = data_as<float>(grad_weight);
  check_grid(kOp, c.tokens + positions);
  dispatch_dtype(y.scalar_type(), kOp,
                 [&]<class T>() { launch_combine_grad<T>(with_shape<T>(a), launch.stream); });
  launch.check();
  return {grad_y, grad_weight};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("moe_sort", TORCH_BOX(&tenfold::cuda::moe_sort_op));
  m.impl("moe_permute", TORCH_BOX(&tenfold::cuda::moe_permute_op));
  m.impl("moe_permute_backward", TORCH_BOX(&tenfold::cuda::moe_permute_backward_op));
  m.impl("moe_combine", TORCH_BOX(&tenfold::cuda::moe_combine_op));
  m.impl("moe_combine_backward", TORCH_BOX(&tenfold::cuda::moe_combine_backward_op));
}
