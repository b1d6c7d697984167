// SPDX-License-Identifier: Apache-2.0
// CPU registration of last_token_reward and pairwise_logsigmoid with their gradients.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "loss/reward_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerFloat = 1e-4;  // read or written, of a thread
constexpr int64_t kTokens = 64;           // of grad_hidden, per task

using Floats = std::vector<float>;

Floats as_floats(const Tensor& t) {
  Floats out(t.numel());
  TENFOLD_ISA_CALL(floats_of, t.data_ptr(), t.numel(), to_dtype(t.scalar_type()), out.data());
  return out;
}

const uint8_t* mask_row(const RewardCall& c, int64_t i) {
  return static_cast<const uint8_t*>(c.mask.data_ptr()) + i * c.mask_stride;
}

// Its last token, or all of them.
void tokens_of(const RewardCall& c, int64_t row, std::vector<int64_t>* tokens) {
  const uint8_t* const mask = mask_row(c, row);
  tokens->clear();
  if (c.pool == PoolTokens::last) {
    int64_t t = c.length - 1;
    while (t > 0 && mask[t] == 0) --t;
    tokens->push_back(t);
    return;
  }
  for (int64_t t = 0; t < c.length; ++t)
    if (mask[t] != 0) tokens->push_back(t);
}

// pooled: or null.
Tensor forward(const RewardForward& c, float* pooled) {
  const Tensor out = c.vector ? new_output(c.hidden, {c.rows}, ScalarType::Float)
                              : new_output(c.hidden, {c.rows, c.classes}, ScalarType::Float);
  const Dtype dtype = to_dtype(c.hidden.scalar_type());
  const int64_t size = dtype_size(dtype), blocks = ceil_div(c.dim, kRewardBlock);
  const Floats weight = as_floats(c.weight);
  Floats parts(c.rows * blocks * c.classes);
  const int64_t most = c.pool == PoolTokens::last ? 1 : c.length;
  const int64_t width = std::min(c.dim, kRewardBlock);
  parallel_for(c.rows * blocks, kMicrosPerFloat * static_cast<double>((most + c.classes) * width),
               [&](int64_t begin, int64_t end) {
                 std::vector<int64_t> tokens;
                 std::vector<const void*> from;
                 Floats sums(kRewardBlock);
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t i = task / blocks, col = task % blocks * kRewardBlock;
                   const int64_t n = std::min(kRewardBlock, c.dim - col);
                   tokens_of(c, i, &tokens);
                   from.clear();
                   for (const int64_t t : tokens)
                     from.push_back(static_cast<const char*>(c.hidden.data_ptr()) +
                                    (i * c.row_stride + t * c.token_stride + col) * size);
                   float* const to = pooled != nullptr ? pooled + i * c.dim + col : sums.data();
                   TENFOLD_ISA_CALL(mean_of_rows, from.data(), static_cast<int64_t>(from.size()), n,
                                    dtype, to);
                   for (int64_t k = 0; k < c.classes; ++k)
                     parts[task * c.classes + k] =
                         TENFOLD_ISA_CALL(dot_floats, to, weight.data() + k * c.dim + col, n);
                 }
               });
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t k = 0; k < c.classes; ++k) {
      float sum = 0.0f;
      for (int64_t b = 0; b < blocks; ++b) sum += parts[(i * blocks + b) * c.classes + k];
      data_as<float>(out)[i * c.classes + k] = sum;
    }
  return out;
}

Tensor last_token_reward_op(Tensor hidden, Tensor mask, Tensor w_v, std::string pool) {
  return forward(check_reward("last_token_reward", hidden, mask, w_v, pool), nullptr);
}

std::tuple<Tensor, Tensor> last_token_reward_forward_op(Tensor hidden, Tensor mask, Tensor w_v,
                                                        std::string pool) {
  const RewardForward c = check_reward("last_token_reward_forward", hidden, mask, w_v, pool);
  const Tensor pooled = new_output(hidden, {c.rows, c.dim}, ScalarType::Float);
  const Tensor reward = forward(c, data_as<float>(pooled));
  return {reward, pooled};
}

// Every token that counts has the same gradient in its row; the others have none.
Tensor hidden_gradient(const RewardBackward& c, const Tensor& like) {
  const ScalarType scalar = like.scalar_type();
  const Tensor out = new_output(like, {c.rows, c.length, c.dim}, scalar);
  const Dtype dtype = to_dtype(scalar);
  const int64_t bytes = c.dim * dtype_size(dtype), parts = ceil_div(c.length, kTokens);
  const Floats weight = as_floats(c.weight);
  parallel_for(
      c.rows * parts, kMicrosPerFloat * static_cast<double>(std::min(c.length, kTokens) * c.dim),
      [&](int64_t begin, int64_t end) {
        std::vector<int64_t> tokens;
        std::vector<char> row(bytes);
        Floats by(c.classes);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task / parts, first = task % parts * kTokens;
          const int64_t last = std::min(c.length, first + kTokens);
          tokens_of(c, i, &tokens);
          auto next = std::lower_bound(tokens.begin(), tokens.end(), first);
          if (next != tokens.end() && *next < last) {
            const auto count = static_cast<float>(tokens.size());
            for (int64_t k = 0; k < c.classes; ++k)
              by[k] = data_as<float>(c.grad)[i * c.classes + k] / count;
            TENFOLD_ISA_CALL(combine_rows, weight.data(), c.dim, by.data(), 1, c.classes, c.dim,
                             dtype, row.data());
          }
          for (int64_t t = first; t < last; ++t) {
            char* const to = static_cast<char*>(out.data_ptr()) + (i * c.length + t) * bytes;
            if (next != tokens.end() && *next == t) {
              std::memcpy(to, row.data(), bytes);
              ++next;
            } else {
              std::memset(to, 0, bytes);
            }
          }
        }
      });
  return out;
}

Tensor weight_gradient(const RewardBackward& c) {
  const ScalarType scalar = c.weight.scalar_type();
  const Tensor out = c.vector ? new_output(c.pooled, {c.dim}, scalar)
                              : new_output(c.pooled, {c.classes, c.dim}, scalar);
  const Dtype dtype = to_dtype(scalar);
  const int64_t size = dtype_size(dtype), blocks = ceil_div(c.dim, kRewardBlock);
  parallel_for(c.classes * blocks, kMicrosPerFloat * static_cast<double>(c.rows * kRewardBlock),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t k = task / blocks, col = task % blocks * kRewardBlock;
                   TENFOLD_ISA_CALL(combine_rows, data_as<float>(c.pooled) + col, c.dim,
                                    data_as<float>(c.grad) + k, c.classes, c.rows,
                                    std::min(kRewardBlock, c.dim - col), dtype,
                                    static_cast<char*>(out.data_ptr()) + (k * c.dim + col) * size);
                 }
               });
  return out;
}

std::tuple<Tensor, Tensor> last_token_reward_backward_op(Tensor grad, Tensor pooled, Tensor mask,
                                                         Tensor w_v, Tensor like, bool of_hidden,
                                                         bool of_weight, std::string pool) {
  const RewardBackward c =
      check_reward_backward("last_token_reward_backward", grad, pooled, mask, w_v, like, pool);
  return {of_hidden ? hidden_gradient(c, like) : new_output(like, {0}, like.scalar_type()),
          of_weight ? weight_gradient(c) : new_output(pooled, {0}, w_v.scalar_type())};
}

// The rewards as floats: themselves, or a copy.
class Rewards {
 public:
  explicit Rewards(const Tensor& t) {
    if (t.scalar_type() == ScalarType::Float) {
      data_ = data_as<float>(t);
    } else {
      copy_ = as_floats(t);
      data_ = copy_.data();
    }
  }
  const float* data() const { return data_; }

 private:
  Floats copy_;
  const float* data_;
};

// Gradients go to of_pos and of_neg, or null.
std::tuple<Tensor, Tensor> pair_loss(const PairCall& c, float* of_pos, float* of_neg) {
  const Tensor loss = new_output(c.pos, {}, ScalarType::Float);
  const Tensor delta = new_output(c.pos, {c.pairs}, ScalarType::Float);
  const Rewards pos(c.pos), neg(c.neg);
  const float* const margin = c.margin ? data_as<float>(*c.margin) : nullptr;
  const double sum = TENFOLD_ISA_CALL(pair_losses, pos.data(), neg.data(), margin, c.center,
                                      c.pairs, data_as<float>(delta), of_pos, of_neg);
  *data_as<float>(loss) = static_cast<float>(sum / static_cast<double>(c.pairs));
  return {loss, delta};
}

std::tuple<Tensor, Tensor> pairwise_logsigmoid_op(Tensor r_pos, Tensor r_neg, OptTensor margin,
                                                  double center) {
  return pair_loss(check_pairs("pairwise_logsigmoid", r_pos, r_neg, margin, center), nullptr,
                   nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_logsigmoid_grads_op(Tensor r_pos, Tensor r_neg,
                                                                        OptTensor margin,
                                                                        double center) {
  const PairCall c = check_pairs("pairwise_logsigmoid_grads", r_pos, r_neg, margin, center);
  const Tensor of_pos = new_output(r_pos, {c.pairs}, ScalarType::Float);
  const Tensor of_neg = new_output(r_pos, {c.pairs}, ScalarType::Float);
  const auto [loss, delta] = pair_loss(c, data_as<float>(of_pos), data_as<float>(of_neg));
  return {loss, delta, of_pos, of_neg};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("last_token_reward", TORCH_BOX(&tenfold::cpu::last_token_reward_op));
  m.impl("last_token_reward_forward", TORCH_BOX(&tenfold::cpu::last_token_reward_forward_op));
  m.impl("last_token_reward_backward", TORCH_BOX(&tenfold::cpu::last_token_reward_backward_op));
  m.impl("pairwise_logsigmoid", TORCH_BOX(&tenfold::cpu::pairwise_logsigmoid_op));
  m.impl("pairwise_logsigmoid_grads", TORCH_BOX(&tenfold::cpu::pairwise_logsigmoid_grads_op));
}
