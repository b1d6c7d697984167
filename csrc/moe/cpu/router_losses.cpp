// SPDX-License-Identifier: Apache-2.0
// CPU registration of load_balance_loss and router_seed_loss. Parts are summed in order.
#include "moe/router_losses.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "moe/gate.h"
#include "moe/gate_linear.h"
#include "moe/router_losses_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerLogit = 0.001;    // of a softmax
constexpr double kMicrosPerNumber = 0.0002;  // of h

const uint8_t* mask_of(const OptTensor& mask) {
  return mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
}

int64_t count_tokens(const OptTensor& mask, int64_t tokens) {
  const uint8_t* const m = mask_of(mask);
  return m == nullptr ? tokens : tokens - std::count(m, m + tokens, uint8_t{0});
}

class Balance {
 public:
  explicit Balance(const BalanceCall& c)
      : c_(c), counted_(count_tokens(c.mask, c.tokens)), share_(c.experts) {
    const double of = static_cast<double>(counted_) * (c.by_slots ? static_cast<double>(c.k) : 1.0);
    for (int64_t e = 0; e < c.experts && counted_ > 0; ++e) {
      const auto count = c.counts.scalar_type() == ScalarType::Long
                             ? static_cast<double>(data_as<int64_t>(c.counts)[e])
                             : static_cast<double>(data_as<int32_t>(c.counts)[e]);
      share_[e] = static_cast<float>(static_cast<double>(c.experts) * count / of);
    }
    p_ = {c.logits.data_ptr(),
          to_dtype(c.logits.scalar_type()),
          c.tokens > 0 ? c.logits.strides()[0] : 0,
          c.experts,
          share_.data(),
          mask_of(c.mask)};
  }

  double loss() const {
    if (counted_ == 0) return 0.0;
    std::vector<double> parts((c_.tokens + kBalanceChunk - 1) / kBalanceChunk);
    over_chunks([&](int64_t chunk, int64_t begin, int64_t end, float* scratch) {
      parts[chunk] = TENFOLD_ISA_CALL(balance_sum, p_, begin, end, scratch);
    });
    double sum = 0.0;
    for (const double part : parts) sum += part;
    return sum / static_cast<double>(counted_);
  }

  void grad(double up, void* out) const {
    const auto by = static_cast<float>(counted_ > 0 ? up / static_cast<double>(counted_) : 0.0);
    over_chunks([&](int64_t, int64_t begin, int64_t end, float* scratch) {
      TENFOLD_ISA_CALL(balance_grad, p_, by, begin, end, out, scratch);
    });
  }

 private:
  template <class F>
  void over_chunks(const F& f) const {
    const double micros = kMicrosPerLogit * static_cast<double>(kBalanceChunk * c_.experts);
    const int64_t chunks = (c_.tokens + kBalanceChunk - 1) / kBalanceChunk;
    parallel_for(chunks, micros, [&](int64_t begin, int64_t end) {
      const Scratch scratch(gate_scratch(c_.experts, 0) * 4);
      for (int64_t i = begin; i < end; ++i)
        f(i, i * kBalanceChunk, std::min((i + 1) * kBalanceChunk, c_.tokens),
          static_cast<float*>(scratch.data()));
    });
  }

  const BalanceCall& c_;
  int64_t counted_;
  std::vector<float> share_;
  BalanceParams p_;
};

Tensor load_balance_loss_op(Tensor logits, Tensor counts, OptTensor token_mask, int64_t k,
                            std::string norm) {
  const BalanceCall c = check_balance("load_balance_loss", logits, counts, token_mask, k, norm);
  const Tensor loss = new_output(logits, {}, ScalarType::Float);
  *data_as<float>(loss) = static_cast<float>(Balance(c).loss());
  return loss;
}

Tensor load_balance_loss_backward_op(Tensor grad, Tensor logits, Tensor counts,
                                     OptTensor token_mask, int64_t k, std::string norm) {
  constexpr auto kOp = "load_balance_loss_backward";
  const BalanceCall c = check_balance(kOp, logits, counts, token_mask, k, norm);
  check_loss_grad(kOp, grad, "logits", logits);
  const Tensor out = new_output(c.logits, {c.tokens, c.experts}, logits.scalar_type());
  Balance(c).grad(*data_as<float>(grad), out.data_ptr());
  return out;
}

std::vector<float> wide_rows(const Tensor& r) {
  std::vector<float> wide(r.numel());
  TENFOLD_ISA_CALL(seed_widen, r.data_ptr(), to_dtype(r.scalar_type()), r.numel(), wide.data());
  return wide;
}

// Loss, and where they are asked for slope and the gradient of r. A task takes kSeedChunk of the
// tokens that count, of one layer.
class Seed {
 public:
  explicit Seed(const SeedCall& c)
      : c_(c), dtype_(to_dtype(c.h.scalar_type())), r_(wide_rows(c.r)) {
    const uint8_t* const mask = mask_of(c.mask);
    for (int64_t t = 0; t < c.tokens; ++t)
      if (mask == nullptr || mask[t] != 0) tokens_.push_back(static_cast<int32_t>(t));
    chunks_ = (count() + kSeedChunk - 1) / kSeedChunk;
    scale_ = 1.0 / static_cast<double>(std::max<int64_t>(1, c.layers * count()));
  }

  double run(float* slope, bool of_r) {
    if (slope != nullptr) std::fill_n(slope, c_.layers * c_.tokens, 0.0f);
    if (of_r) parts_.assign(c_.layers * chunks_ * c_.dim, 0.0f);
    std::vector<double> losses(c_.layers * chunks_);
    const double micros = kMicrosPerNumber * static_cast<double>(kSeedChunk * c_.dim);
    parallel_for(c_.layers * chunks_, micros, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        losses[i] = chunk(i / chunks_, i % chunks_, slope, of_r ? &parts_[i * c_.dim] : nullptr);
    });
    double sum = 0.0;
    for (const double loss : losses) sum += loss;
    return sum * scale_;
  }

  // The parts of a layer, one after the other.
  void sum_parts(const Tensor& grad_r) {
    const Dtype dtype = to_dtype(grad_r.scalar_type());
    std::vector<double> sum(c_.dim);
    std::vector<float> rounded(c_.dim);
    for (int64_t l = 0; l < c_.layers; ++l) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t i = l * chunks_; i < (l + 1) * chunks_; ++i)
        for (int64_t d = 0; d < c_.dim; ++d) sum[d] += static_cast<double>(parts_[i * c_.dim + d]);
      for (int64_t d = 0; d < c_.dim; ++d) rounded[d] = static_cast<float>(sum[d]);
      TENFOLD_ISA_CALL(router_round, rounded.data(), c_.dim, dtype,
                       static_cast<char*>(grad_r.data_ptr()) + l * c_.dim * dtype_size(dtype));
    }
  }

 private:
  int64_t count() const { return static_cast<int64_t>(tokens_.size()); }

  double chunk(int64_t layer, int64_t chunk, float* slope, float* part) const {
    const char* const h =
        static_cast<const char*>(c_.h.data_ptr()) + layer * c_.layer_stride * dtype_size(dtype_);
    const float* const target = c_.target ? data_as<float>(*c_.target) : nullptr;
    const int64_t end = std::min((chunk + 1) * kSeedChunk, count());
    double loss = 0.0;
    for (int64_t i = chunk * kSeedChunk; i < end; i += kSeedGroup) {
      const int64_t n = std::min(kSeedGroup, end - i);
      const void* rows[kSeedGroup];
      float z[kSeedGroup], slopes[kSeedGroup];
      for (int64_t j = 0; j < n; ++j) rows[j] = h + tokens_[i + j] * c_.stride * dtype_size(dtype_);
      TENFOLD_ISA_CALL(seed_dots, rows, n, dtype_, c_.dim, &r_[layer * c_.dim], z);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t t = tokens_[i + j];
        const SeedTerm term =
            seed_term(z[j], target != nullptr ? static_cast<double>(target[t]) : 1.0);
        loss += term.loss;
        slopes[j] = static_cast<float>(term.slope * scale_);
        if (slope != nullptr) slope[layer * c_.tokens + t] = slopes[j];
      }
      if (part != nullptr) TENFOLD_ISA_CALL(seed_add, rows, n, dtype_, c_.dim, slopes, part);
    }
    return loss;
  }

  const SeedCall& c_;
  Dtype dtype_;
  std::vector<float> r_, parts_;
  std::vector<int32_t> tokens_;
  int64_t chunks_;
  double scale_;
};

Tensor router_seed_loss_op(Tensor h, Tensor r, OptTensor token_mask, OptTensor target) {
  const SeedCall c = check_seed("router_seed_loss", h, r, token_mask, target);
  const Tensor loss = new_output(h, {}, ScalarType::Float);
  *data_as<float>(loss) = static_cast<float>(Seed(c).run(nullptr, false));
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> router_seed_loss_grads_op(Tensor h, Tensor r,
                                                             OptTensor token_mask, OptTensor target,
                                                             bool of_r) {
  const SeedCall c = check_seed("router_seed_loss_grads", h, r, token_mask, target);
  const Tensor loss = new_output(h, {}, ScalarType::Float), slope = new_slope(c);
  const Tensor grad_r = new_seed_grad(c, of_r);
  Seed seed(c);
  *data_as<float>(loss) = static_cast<float>(seed.run(data_as<float>(slope), of_r));
  if (of_r) seed.sum_parts(grad_r);
  return {loss, slope, grad_r};
}

Tensor router_seed_loss_backward_op(Tensor grad, Tensor slope_in, Tensor h, Tensor r) {
  constexpr auto kOp = "router_seed_loss_backward";
  const SeedGradCall call = check_seed_grad(kOp, grad, slope_in, h, r);
  const SeedCall& c = call.seed;
  const Tensor &slope = call.slope, &out = call.out;
  const std::vector<float> wide = wide_rows(c.r);
  const Dtype dtype = to_dtype(h.scalar_type());
  const int64_t bytes = c.dim * dtype_size(dtype);
  const float up = *data_as<float>(grad);
  const auto micros = 0.02 + kMicrosPerNumber * static_cast<double>(c.dim);
  parallel_for(c.layers * c.tokens, micros, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* const row = static_cast<char*>(out.data_ptr()) + i * bytes;
      const float by = data_as<float>(slope)[i];
      if (by == 0.0f) {
        std::memset(row, 0, bytes);
      } else {
        TENFOLD_ISA_CALL(seed_scale, &wide[i / c.tokens * c.dim], up * by, c.dim, dtype, row);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("load_balance_loss", TORCH_BOX(&tenfold::cpu::load_balance_loss_op));
  m.impl("load_balance_loss_backward", TORCH_BOX(&tenfold::cpu::load_balance_loss_backward_op));
  m.impl("router_seed_loss", TORCH_BOX(&tenfold::cpu::router_seed_loss_op));
  m.impl("router_seed_loss_grads", TORCH_BOX(&tenfold::cpu::router_seed_loss_grads_op));
  m.impl("router_seed_loss_backward", TORCH_BOX(&tenfold::cpu::router_seed_loss_backward_op));
}
