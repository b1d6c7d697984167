// SPDX-License-Identifier: Apache-2.0
// CUDA registration of load_balance_loss and router_seed_loss. How many tokens count is known to
// the host only where there is no mask; else a kernel counts them.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "moe/cuda/balance_kernel.cuh"
#include "moe/cuda/seed_kernel.cuh"
#include "moe/router_losses_ops.h"

namespace tenfold::cuda {
namespace {

const uint8_t* mask_of(const OptTensor& mask) {
  return mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
}

// The tokens that count, and where their number is kept.
struct TokenCount {
  OptTensor kept;
  Counted counted;

  TokenCount(const Tensor& like, const OptTensor& mask, int64_t tokens, cudaStream_t stream)
      : counted{nullptr, static_cast<double>(tokens)} {
    if (!mask) return;
    kept = new_output(like, {1}, ScalarType::Double);
    counted.on_device = data_as<double>(*kept);
    launch_count_tokens(mask_of(mask), tokens, data_as<double>(*kept), stream);
  }
};

BalanceArgs balance_args(const BalanceCall& c, const TokenCount& count) {
  BalanceArgs a{};
  a.logits = c.logits.data_ptr(), a.tokens = c.tokens, a.experts = c.experts;
  a.stride = c.logits.numel() > 0 ? c.logits.strides()[0] : 0;
  a.counts = {c.counts.data_ptr(), c.counts.scalar_type() == ScalarType::Long, 1};
  a.mask = mask_of(c.mask), a.counted = count.counted;
  a.numerator = static_cast<double>(c.experts) / (c.by_slots ? static_cast<double>(c.k) : 1.0);
  return a;
}

Tensor load_balance_loss_op(Tensor logits, Tensor counts, OptTensor token_mask, int64_t k,
                            std::string norm) {
  constexpr auto kOp = "load_balance_loss";
  const BalanceCall c = check_balance(kOp, logits, counts, token_mask, k, norm);
  const Launch launch(c.logits);
  const TokenCount count(c.logits, c.mask, c.tokens, launch.stream);
  const Tensor loss = new_output(logits, {}, ScalarType::Float);
  dispatch_dtype(logits.scalar_type(), kOp, [&]<class T>() {
    BalanceArgs a = with_shape<T>(balance_args(c, count));
    check_grid(kOp, balance_blocks(a));
    const Tensor parts = new_output(logits, {balance_blocks(a)}, ScalarType::Double);
    a.parts = data_as<double>(parts);
    launch_balance<T>(a, data_as<float>(loss), launch.stream);
  });
  launch.check();
  return loss;
}

Tensor load_balance_loss_backward_op(Tensor grad, Tensor logits, Tensor counts,
                                     OptTensor token_mask, int64_t k, std::string norm) {
  constexpr auto kOp = "load_balance_loss_backward";
  const BalanceCall c = check_balance(kOp, logits, counts, token_mask, k, norm);
  check_loss_grad(kOp, grad, "logits", logits);
  const Launch launch(c.logits);
  const Tensor out = new_output(c.logits, {c.tokens, c.experts}, logits.scalar_type());
  const TokenCount count(c.logits, c.mask, c.tokens, launch.stream);
  dispatch_dtype(logits.scalar_type(), kOp, [&]<class T>() {
    BalanceArgs a = balance_args(c, count);
    a.grad = data_as<float>(grad), a.out = out.data_ptr();
    a = with_shape<T>(a);
    check_grid(kOp, balance_blocks(a));
    launch_balance_grad<T>(a, launch.stream);
  });
  launch.check();
  return out;
}

// Calls f<dtype of h, dtype of r>().
template <class F>
void dispatch_seed(const SeedCall& c, const char* op, const F& f) {
  dispatch_dtype(c.h.scalar_type(), op, [&]<class T>() {
    if (c.r.scalar_type() == c.h.scalar_type()) return f.template operator()<T, T>();
    f.template operator()<T, float>();
  });
}

// grad_r: or null.
void run_seed(const char* op, const SeedCall& c, float* loss, float* slope, void* grad_r) {
  const Launch launch(c.h);
  const TokenCount count(c.h, c.mask, c.tokens, launch.stream);
  dispatch_seed(c, op, [&]<class T, class R>() {
    SeedArgs a{};
    a.h = c.h.data_ptr(), a.r = c.r.data_ptr();
    a.layers = c.layers, a.tokens = c.tokens, a.dim = c.dim;
    a.layer_stride = c.layer_stride, a.stride = c.stride;
    a.mask = mask_of(c.mask), a.target = c.target ? data_as<float>(*c.target) : nullptr;
    a.counted = count.counted, a.slope = slope;
    a = with_shape<T, R>(a);
    check_grid(op, seed_blocks(a));
    const Tensor losses = new_output(c.h, {seed_blocks(a)}, ScalarType::Double);
    const Tensor parts =
        new_output(c.h, {grad_r != nullptr ? seed_blocks(a) : 0, c.dim}, ScalarType::Float);
    a.losses = data_as<double>(losses);
    a.parts = grad_r != nullptr ? data_as<float>(parts) : nullptr;
    launch_seed<T, R>(a, loss, grad_r, launch.stream);
  });
  launch.check();
}

Tensor router_seed_loss_op(Tensor h, Tensor r, OptTensor token_mask, OptTensor target) {
  constexpr auto kOp = "router_seed_loss";
  const SeedCall c = check_seed(kOp, h, r, token_mask, target);
  const Tensor loss = new_output(h, {}, ScalarType::Float);
  run_seed(kOp, c, data_as<float>(loss), nullptr, nullptr);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> router_seed_loss_grads_op(Tensor h, Tensor r,
                                                             OptTensor token_mask, OptTensor target,
                                                             bool of_r) {
  constexpr auto kOp = "router_seed_loss_grads";
  const SeedCall c = check_seed(kOp, h, r, token_mask, target);
  const Tensor loss = new_output(h, {}, ScalarType::Float), slope = new_slope(c);
  const Tensor grad_r = new_seed_grad(c, of_r);
  run_seed(kOp, c, data_as<float>(loss), data_as<float>(slope), of_r ? grad_r.data_ptr() : nullptr);
  return {loss, slope, grad_r};
}

Tensor router_seed_loss_backward_op(Tensor grad, Tensor slope, Tensor h, Tensor r) {
  constexpr auto kOp = "router_seed_loss_backward";
  const SeedGradCall call = check_seed_grad(kOp, grad, slope, h, r);
  const SeedCall& c = call.seed;
  const Launch launch(c.h);
  dispatch_seed(c, kOp, [&]<class T, class R>() {
    SeedGradArgs a{};
    a.grad = data_as<float>(grad), a.slope = data_as<float>(call.slope);
    a.r = c.r.data_ptr(), a.layers = c.layers, a.tokens = c.tokens, a.dim = c.dim;
    a.out = call.out.data_ptr();
    a = with_shape<T, R>(a);
    check_grid(kOp, seed_grad_blocks(a));
    launch_seed_grad<T, R>(a, launch.stream);
  });
  launch.check();
  return call.out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("load_balance_loss", TORCH_BOX(&tenfold::cuda::load_balance_loss_op));
  m.impl("load_balance_loss_backward", TORCH_BOX(&tenfold::cuda::load_balance_loss_backward_op));
  m.impl("router_seed_loss", TORCH_BOX(&tenfold::cuda::router_seed_loss_op));
  m.impl("router_seed_loss_grads", TORCH_BOX(&tenfold::cuda::router_seed_loss_grads_op));
  m.impl("router_seed_loss_backward", TORCH_BOX(&tenfold::cuda::router_seed_loss_backward_op));
}
