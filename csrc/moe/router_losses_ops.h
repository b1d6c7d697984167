// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of load_balance_loss and router_seed_loss share: checked
// calls.
#pragma once

#include <string>

#include "core/dispatch.h"
#include "moe/args.h"
#include "moe/router_losses.h"

namespace tenfold {

struct BalanceCall {
  Tensor logits, counts;  // [T, n] with contiguous rows; [n] int32 or int64, contiguous
  OptTensor mask;         // [T] of bytes, contiguous
  int64_t tokens, experts, k;
  bool by_slots;
};

BalanceCall check_balance(const char* op, const Tensor& logits, const Tensor& counts,
                          const OptTensor& token_mask, int64_t k, const std::string& norm);

struct SeedCall {
  Tensor h, r;             // [L, T, d] or [T, d] with contiguous rows; [L, d] or [d], contiguous
  OptTensor mask, target;  // [T] of bytes; [T] float32
  int64_t layers, tokens, dim, layer_stride, stride;
};

SeedCall check_seed(const char* op, const Tensor& h, const Tensor& r, const OptTensor& token_mask,
                    const OptTensor& target);

// float32 of the rows of h, and the gradient of r, empty unless it is wanted.
Tensor new_slope(const SeedCall& c);
Tensor new_seed_grad(const SeedCall& c, bool wanted);

// The backward's, with its output, of the shape of h.
struct SeedGradCall {
  SeedCall seed;
  Tensor slope, out;
};

SeedGradCall check_seed_grad(const char* op, const Tensor& grad, const Tensor& slope,
                             const Tensor& h, const Tensor& r);

// Upstream gradient of a loss, 0-d float32.
void check_loss_grad(const char* op, const Tensor& grad, const char* like_name, const Tensor& like);

}  // namespace tenfold
