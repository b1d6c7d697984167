// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of moe_gate and moe_gate_linear share: checked calls.
#pragma once

#include "core/dispatch.h"
#include "moe/args.h"
#include "moe/gate.h"
#include "moe/gate_linear.h"

namespace tenfold {

// With its outputs.
struct GateCall {
  Tensor logits;  // [T, n] with contiguous rows
  int64_t tokens, experts, k;
  bool renormalize;
  Tensor weight, index;

  GateParams params() const {
    return {logits.data_ptr(),
            to_dtype(logits.scalar_type()),
            tokens > 0 ? logits.strides()[0] : 0,
            experts,
            k,
            renormalize,
            data_as<float>(weight),
            data_as<int32_t>(index)};
  }
};

GateCall check_gate(const char* op, const Tensor& logits, int64_t k, bool renormalize);

struct GateGradCall {
  Tensor logits, weight, grad;
  IndexList index;
  OptTensor also;  // float32 [T, n]
  bool renormalize;
  Tensor out;

  GateGradParams params() const {
    const int64_t tokens = logits.sizes()[0];
    return {logits.data_ptr(),
            to_dtype(logits.scalar_type()),
            tokens > 0 ? logits.strides()[0] : 0,
            logits.sizes()[1],
            weight.sizes()[1],
            renormalize,
            data_as<float>(grad),
            data_as<float>(weight),
            index.data != nullptr ? index.data : static_cast<const int32_t*>(index.kept.data_ptr()),
            also ? data_as<float>(*also) : nullptr,
            out.data_ptr()};
  }
};

GateGradCall check_gate_grad(const char* op, const Tensor& grad, const Tensor& logits,
                             const Tensor& weight, const Tensor& index, bool renormalize,
                             const OptTensor& also);

// The router's layer.
struct RouterCall {
  Tensor x, w;  // [T, d], [n, d] with contiguous rows
  int64_t tokens, dim, experts;

  RouterParams params(float* logits) const {
    return {x.data_ptr(),
            w.data_ptr(),
            to_dtype(x.scalar_type()),
            to_dtype(w.scalar_type()),
            tokens > 0 ? x.strides()[0] : 0,
            w.strides()[0],
            dim,
            experts,
            logits};
  }
};

RouterCall check_router(const char* op, const Tensor& x, const Tensor& w_router);

// The gradient of the logits, float32 [T, n]: what the gate gives (`gate`, which is still to be
// run), or the caller's.
struct RouterGradCall {
  std::optional<GateGradCall> gate;
  Tensor grad;
};

RouterGradCall check_router_grad(const char* op, const RouterCall& r, const OptTensor& grad_logits,
                                 const OptTensor& grad_weight, const Tensor& logits,
                                 const Tensor& weight, const Tensor& index, bool renormalize);

}  // namespace tenfold
