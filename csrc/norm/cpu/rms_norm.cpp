// SPDX-License-Identifier: Apache-2.0
// CPU registration of rms_norm: rows are shared out among threads. For its gradients they are
// shared out in blocks, each with its own sums for the weight.
#include <torch/csrc/stable/library.h>

#include "core/cpu/past_caches.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "norm/rms_norm_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerByte = 5e-5, kMicrosPerRow = 0.03;

double micros_per_row(int64_t bytes) {
  return kMicrosPerRow + kMicrosPerByte * static_cast<double>(bytes);
}

void run_forward(const RmsCall& c, float* rstd) {
  RmsRows r = c.rows;
  r.rstd = rstd;
  const int64_t size = dtype_size(r.x_dtype), tensors = c.residual ? 4 : 2;
  r.past_caches =
      past_caches(c.shape.rows * r.cols * dtype_size(r.y_dtype), c.fresh) && !c.in_place;
  const bool keeps = r.past_caches && c.residual;
  parallel_for(c.shape.rows, micros_per_row(tensors * r.cols * size),
               [&](int64_t begin, int64_t end) {
                 if (!keeps) {
                   TENFOLD_ISA_CALL(rms_norm_rows, r, begin, end, nullptr);
                   return;
                 }
                 const Scratch kept(kRmsRowsAtOnce * r.cols * size);
                 TENFOLD_ISA_CALL(rms_norm_rows, r, begin, end, kept.data());
               });
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& x,
                                           const OptTensor& residual, const Tensor& weight,
                                           double eps, RmsOrder order) {
  const RmsCall c = check_rms_norm(op, nullptr, std::nullopt, x, residual, weight, eps, order);
  const auto sizes = x.sizes();
  const Tensor rstd = new_output(x, sizes.slice(0, sizes.size() - 1), ScalarType::Float);
  const Tensor sum = c.sum ? c.sum->t : new_output(x, {0}, x.scalar_type());
  run_forward(c, data_as<float>(rstd));
  return {c.y.t, sum, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_op(Tensor x, OptTensor residual, Tensor weight,
                                               double eps, std::string order) {
  constexpr auto kOp = "rms_norm";
  return forward(kOp, x, residual, weight, eps, rms_order_of(kOp, order));
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward_op(Tensor x, OptTensor residual, Tensor weight,
                                                       double eps, int64_t order) {
  constexpr auto kOp = "rms_norm_forward";
  return forward(kOp, x, residual, weight, eps, rms_order_of(kOp, order));
}

void rms_norm_out_op(Tensor y, OptTensor sum, Tensor x, OptTensor residual, Tensor weight,
                     double eps, std::string order) {
  constexpr auto kOp = "rms_norm_";
  const RmsOrder way = rms_order_of(kOp, order);
  run_forward(check_rms_norm(kOp, &y, sum, x, residual, weight, eps, way), nullptr);
}

void rms_norm_forward_out_op(Tensor y, OptTensor sum, Tensor x, OptTensor residual, Tensor weight,
                             double eps, int64_t order) {
  constexpr auto kOp = "rms_norm_forward_";
  const RmsOrder way = rms_order_of(kOp, order);
  run_forward(check_rms_norm(kOp, &y, sum, x, residual, weight, eps, way), nullptr);
}

std::tuple<Tensor, Tensor> rms_norm_backward_op(Tensor grad_y, OptTensor grad_sum, Tensor x,
                                                Tensor weight, Tensor rstd, bool of_x,
                                                bool of_weight) {
  RmsGradCall c = check_rms_norm_backward(grad_y, grad_sum, x, weight, rstd, of_x, of_weight);
  if (!of_x && !of_weight) return {c.dx, c.dw};
  RmsGradRows& r = c.rows;
  const int64_t rows = c.shape.rows, cols = r.cols, block = rms_block_rows(rows);
  const int64_t blocks = ceil_div(rows, block), size = dtype_size(r.x_dtype);
  r.past_caches = past_caches(rows * cols * size, true);
  const Scratch sums(of_weight ? blocks * cols * 4 + 4 : 4);
  auto* const parts = static_cast<float*>(sums.data());
  const int64_t tensors = 2 + (of_x ? 1 : 0) + (r.dsum != nullptr ? 1 : 0);
  parallel_for(blocks, micros_per_row(tensors * cols * size) * static_cast<double>(block),
               [&](int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b)
                   TENFOLD_ISA_CALL(rms_norm_grad_rows, r, b * block,
                                    std::min(rows, (b + 1) * block),
                                    of_weight ? parts + b * cols : nullptr);
               });
  if (!of_weight) return {c.dx, c.dw};
  constexpr int64_t kStrip = 256;
  parallel_for(ceil_div(cols, kStrip), 4 * kMicrosPerByte * static_cast<double>(blocks * kStrip),
               [&](int64_t begin, int64_t end) {
                 TENFOLD_ISA_CALL(rms_norm_add_blocks, parts, blocks, cols, c.dw.data_ptr(),
                                  r.weight_dtype, begin * kStrip, std::min(cols, end * kStrip));
               });
  return {c.dx, c.dw};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&tenfold::cpu::rms_norm_forward_op));
  m.impl("rms_norm_forward_", TORCH_BOX(&tenfold::cpu::rms_norm_forward_out_op));
  m.impl("rms_norm", TORCH_BOX(&tenfold::cpu::rms_norm_op));
  m.impl("rms_norm_", TORCH_BOX(&tenfold::cpu::rms_norm_out_op));
  m.impl("rms_norm_backward", TORCH_BOX(&tenfold::cpu::rms_norm_backward_op));
}
