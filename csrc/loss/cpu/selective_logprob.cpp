// CPU registration of selective_logprob and its backward: chunks of rows over threads.
#include "loss/selective_logprob.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "loss/logprob_ops.h"

namespace tenfold::cpu {
namespace {

using OptTensor = std::optional<Tensor>;

constexpr double kMicrosPerChunk = 2.0;

// A masked position has an id outside [0, V): its log-probability is 0 and has no gradient.
bool has_id(const LogprobCall& c, int64_t id) {
  return id >= 0 && id < c.vocab;
}

const char* row_at(const LogprobCall& c, Dtype dtype, int64_t row, int64_t column) {
  return static_cast<const char*>(c.logits.data_ptr()) +
         (row * c.row_stride + column) * dtype_size(dtype);
}

float logit_at(const LogprobCall& c, Dtype dtype, int64_t row, int64_t id) {
  const char* at = row_at(c, dtype, row, id);
  if (dtype == Dtype::f32) return *reinterpret_cast<const float*>(at);
  // One number by the vector code that reads all: its maximum.
  return static_cast<float>(TENFOLD_ISA_CALL(logit_sums, at, dtype, 1, 1.0f).max);
}

std::tuple<Tensor, Tensor, Tensor> selective_logprob_op(Tensor logits, Tensor ids,
                                                        double temperature) {
  constexpr auto kOp = "selective_logprob";
  const LogprobCall c = check_logprob(kOp, logits, ids, temperature);
  const Dtype dtype = to_dtype(logits.scalar_type());
  const auto scale = static_cast<float>(1.0 / temperature);
  const Tensor logp = new_output(c.logits, {c.rows}, ScalarType::Float);
  const Tensor lse = new_output(c.logits, {c.rows}, ScalarType::Float);
  const Tensor entropy = new_output(c.logits, {c.rows}, ScalarType::Float);
  const int64_t chunks = (c.vocab + kLogitChunk - 1) / kLogitChunk;
  std::vector<LogitSums> parts(c.rows * chunks);
  parallel_for(c.rows * chunks, kMicrosPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % chunks * kLogitChunk;
      parts[i] = TENFOLD_ISA_CALL(logit_sums, row_at(c, dtype, i / chunks, column), dtype,
                                  std::min(kLogitChunk, c.vocab - column), scale);
    }
  });
  for (int64_t r = 0; r < c.rows; ++r) {
    LogitSums all = parts[r * chunks];
    for (int64_t i = 1; i < chunks; ++i) all = join(all, parts[r * chunks + i]);
    const double log_sum = all.sum > 0.0 || all.sum != all.sum ? std::log(all.sum) : 0.0;
    data_as<float>(lse)[r] = static_cast<float>(all.max + log_sum);
    data_as<float>(entropy)[r] = static_cast<float>(log_sum - all.weighted / all.sum);
    const int64_t id = id_at(c.ids, r);
    // As the sums saw it.
    const float x = has_id(c, id) ? logit_at(c, dtype, r, id) * scale : 0.0f;
    data_as<float>(logp)[r] =
        has_id(c, id) ? static_cast<float>(static_cast<double>(x) - all.max - log_sum) : 0.0f;
  }
  return {logp, lse, entropy};
}

float grad_at(const OptTensor& grad, int64_t row) {
  return grad ? data_as<float>(*grad)[row] : 0.0f;
}

Tensor selective_logprob_backward_op(OptTensor grad_logp, OptTensor grad_lse,
                                     OptTensor grad_entropy, Tensor logits, Tensor ids, Tensor lse,
                                     Tensor entropy, double temperature) {
  constexpr auto kOp = "selective_logprob_backward";
  const LogprobCall c = check_logprob(kOp, logits, ids, temperature);
  OptTensor all[] = {grad_logp, grad_lse, grad_entropy, lse, entropy};
  const char* const names[] = {"grad_logp", "grad_lse", "grad_entropy", "lse", "entropy"};
  for (int i = 0; i < 5; ++i) {
    if (!all[i]) continue;
    TENFOLD_CHECK_TYPE(all[i]->scalar_type() == ScalarType::Float, "tenfold::", kOp, ": ", names[i],
                       " must be float32, got ", dtype_name(all[i]->scalar_type()));
    TENFOLD_CHECK_VALUE(all[i]->dim() == 1 && all[i]->sizes()[0] == c.rows, "tenfold::", kOp, ": ",
                        names[i], " must be [", c.rows, "], got ", shape_str(*all[i]));
    if (!all[i]->is_contiguous()) all[i] = torch::stable::contiguous(*all[i]);
  }
  const Dtype dtype = to_dtype(logits.scalar_type());
  const auto scale = static_cast<float>(1.0 / temperature);
  const Tensor out = new_output(c.logits, {c.rows, c.vocab}, logits.scalar_type());
  const int64_t chunks = (c.vocab + kLogitChunk - 1) / kLogitChunk, size = dtype_size(dtype);
  parallel_for(c.rows * chunks, kMicrosPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / chunks, column = i % chunks * kLogitChunk;
      const int64_t n = std::min(kLogitChunk, c.vocab - column), id = id_at(c.ids, r);
      const float top = has_id(c, id) ? grad_at(all[0], r) : 0.0f, of_entropy = grad_at(all[2], r);
      const float total = data_as<float>(*all[3])[r];
      const LogitGrad g{
          total, data_as<float>(*all[4])[r], grad_at(all[1], r) - top, of_entropy, top, scale};
      char* const to = static_cast<char*>(out.data_ptr()) + (r * c.vocab + column) * size;
      TENFOLD_ISA_CALL(logit_grad, row_at(c, dtype, r, column), dtype, n, scale, g, to);
      if (top == 0.0f || id < column || id >= column + n) continue;
      // At the id, rounded once.
      const float log_p = logit_at(c, dtype, r, id) * scale - total, p = std::exp(log_p);
      const float d = p > 0.0f ? -(g.entropy + log_p) : 0.0f;
      const float y = (p * (g.of_p + of_entropy * d) + top) * scale;
      char* const at = to + (id - column) * size;
      if (dtype == Dtype::f32) {
        *reinterpret_cast<float*>(at) = y;
      } else {
        TENFOLD_ISA_CALL(round_one, y, dtype, at);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("selective_logprob", TORCH_BOX(&tenfold::cpu::selective_logprob_op));
  m.impl("selective_logprob_backward", TORCH_BOX(&tenfold::cpu::selective_logprob_backward_op));
}
