// SPDX-License-Identifier: Apache-2.0
// CPU registration of sequence_nll and its backward, of the kernels of selective_logprob.
#include "loss/sequence_nll.h"

#include <torch/csrc/stable/library.h>

#include "loss/cpu/logprob_rows.h"
#include "loss/logprob_ops.h"

namespace tenfold::cpu {
namespace {

LogitRows rows_of(const SequenceCall& c) {
  const bool some = c.logits.numel() > 0;
  return {static_cast<const char*>(c.logits.data_ptr()),
          to_dtype(c.logits.scalar_type()),
          c.vocab,
          std::max<int64_t>(1, c.length),
          some ? c.logits.strides()[0] : 0,
          some ? c.logits.strides()[1] : 0};
}

// lse: where to write the normalisers; may be null.
void run_sequences(const SequenceCall& c, float* nll_sum, int64_t* count, float* lse) {
  const LogitRows x = rows_of(c);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < c.rows(); ++i)
    if (id_at(c.labels, i) != c.ignore_index) rows.push_back(i);
  const auto norms =
      norms_of(x, static_cast<int64_t>(rows.size()), 1.0f, [&](int64_t i) { return rows[i]; });
  if (lse != nullptr) std::fill_n(lse, c.rows(), 0.0f);
  size_t i = 0;
  for (int64_t b = 0; b < c.batch; ++b) {
    double sum = 0.0;
    const size_t first = i;
    for (; i < rows.size() && rows[i] < (b + 1) * c.length; ++i) {
      sum -= norms[i].logp(x.value(rows[i], id_at(c.labels, rows[i])));
      if (lse != nullptr) lse[rows[i]] = static_cast<float>(norms[i].max + norms[i].log_sum);
    }
    nll_sum[b] = static_cast<float>(sum);
    count[b] = static_cast<int64_t>(i - first);
  }
}

std::tuple<Tensor, Tensor> sequence_nll_op(Tensor logits, Tensor labels, int64_t ignore_index) {
  const SequenceCall c = check_sequence("sequence_nll", logits, labels, ignore_index);
  const Tensor sum = new_output(logits, {c.batch}, ScalarType::Float);
  const Tensor count = new_output(logits, {c.batch}, ScalarType::Long);
  run_sequences(c, data_as<float>(sum), data_as<int64_t>(count), nullptr);
  return {sum, count};
}

std::tuple<Tensor, Tensor, Tensor> sequence_nll_forward_op(Tensor logits, Tensor labels,
                                                           int64_t ignore_index) {
  const SequenceCall c = check_sequence("sequence_nll_forward", logits, labels, ignore_index);
  const Tensor sum = new_output(logits, {c.batch}, ScalarType::Float);
  const Tensor count = new_output(logits, {c.batch}, ScalarType::Long);
  const Tensor lse = new_output(logits, {c.batch, c.length}, ScalarType::Float);
  run_sequences(c, data_as<float>(sum), data_as<int64_t>(count), data_as<float>(lse));
  return {sum, count, lse};
}

Tensor sequence_nll_backward_op(Tensor grad_in, Tensor logits, Tensor labels, Tensor lse_in,
                                int64_t ignore_index) {
  constexpr auto kOp = "sequence_nll_backward";
  const SequenceCall c = check_sequence(kOp, logits, labels, ignore_index);
  const Tensor grad = check_sequence_floats(kOp, "grad", grad_in, {c.batch}, "[B]");
  const Tensor lse = check_sequence_floats(kOp, "lse", lse_in, {c.batch, c.length}, "[B, S]");
  const Tensor out = new_output(c.logits, {c.batch, c.length, c.vocab}, logits.scalar_type());
  grads_of(rows_of(c), c.rows(), 1.0f, out.data_ptr(), [&](int64_t r) {
    const int64_t label = id_at(c.labels, r);
    const float up = data_as<float>(grad)[r / c.length];
    const LogitGrad g{data_as<float>(lse)[r], 0.0f, up, 0.0f, -up, 1.0f};
    return RowGrad{label != c.ignore_index, g, label};
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("sequence_nll", TORCH_BOX(&tenfold::cpu::sequence_nll_op));
  m.impl("sequence_nll_forward", TORCH_BOX(&tenfold::cpu::sequence_nll_forward_op));
  m.impl("sequence_nll_backward", TORCH_BOX(&tenfold::cpu::sequence_nll_backward_op));
}
