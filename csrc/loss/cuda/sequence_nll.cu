// SPDX-License-Identifier: Apache-2.0
// CUDA registration of sequence_nll and its backward. Values of labels are not checked: one that is
// neither ignored nor in the vocabulary has log-probability 0 and no gradient.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "loss/cuda/sequence_nll_kernel.cuh"
#include "loss/sequence_nll.h"

namespace tenfold::cuda {
namespace {

IntArray labels_of(const SequenceCall& c) {
  return {c.labels.data_ptr(), c.labels.scalar_type() == ScalarType::Long, 1};
}

LogitRows rows_of(const SequenceCall& c) {
  const bool some = c.logits.numel() > 0;
  LogitRows a{};
  a.logits = c.logits.data_ptr(), a.ids = labels_of(c);
  a.rows = c.rows(), a.vocab = c.vocab;
  a.row_stride = some ? c.logits.strides()[1] : 0;
  a.outer_stride = some ? c.logits.strides()[0] : 0;
  a.inner = c.length, a.ignored = c.ignore_index;
  return a;
}

// lse: where to write the normalisers; may be null.
void run_sequences(const char* op, const SequenceCall& c, float* nll_sum, int64_t* count,
                   float* lse) {
  check_grid(op, c.batch);
  const Launch launch(c.logits);
  const Tensor logp = new_output(c.logits, {c.rows()}, ScalarType::Float);
  const SequenceSums sums{data_as<float>(logp), labels_of(c), c.batch, c.length,
                          c.ignore_index,       nll_sum,      count};
  dispatch_dtype(c.logits.scalar_type(), op, [&]<class T>() {
    LogprobArgs a{};
    static_cast<LogitRows&>(a) = rows_of(c);
    a.scale = 1.0;
    a.logp = data_as<float>(logp), a.lse = lse;
    if (a.rows > 0) a = with_chunks<T>(a);
    check_grid(op, a.rows * a.chunks);
    const int64_t parts = a.chunks > 1 ? a.rows * a.chunks : 0;
    const Tensor room = new_output(c.logits, {3 * parts}, ScalarType::Double);
    a.parts = data_as<LogitSums>(room);
    launch_sequence_nll<T>(a, sums, launch.stream);
  });
  launch.check();
}

std::tuple<Tensor, Tensor> sequence_nll_op(Tensor logits, Tensor labels, int64_t ignore_index) {
  constexpr auto kOp = "sequence_nll";
  const SequenceCall c = check_sequence(kOp, logits, labels, ignore_index);
  const Tensor sum = new_output(logits, {c.batch}, ScalarType::Float);
  const Tensor count = new_output(logits, {c.batch}, ScalarType::Long);
  run_sequences(kOp, c, data_as<float>(sum), data_as<int64_t>(count), nullptr);
  return {sum, count};
}

std::tuple<Tensor, Tensor, Tensor> sequence_nll_forward_op(Tensor logits, Tensor labels,
                                                           int64_t ignore_index) {
  constexpr auto kOp = "sequence_nll_forward";
  const SequenceCall c = check_sequence(kOp, logits, labels, ignore_index);
  const Tensor sum = new_output(logits, {c.batch}, ScalarType::Float);
  const Tensor count = new_output(logits, {c.batch}, ScalarType::Long);
  const Tensor lse = new_output(logits, {c.batch, c.length}, ScalarType::Float);
  run_sequences(kOp, c, data_as<float>(sum), data_as<int64_t>(count), data_as<float>(lse));
  return {sum, count, lse};
}

Tensor sequence_nll_backward_op(Tensor grad_in, Tensor logits, Tensor labels, Tensor lse_in,
                                int64_t ignore_index) {
  constexpr auto kOp = "sequence_nll_backward";
  const SequenceCall c = check_sequence(kOp, logits, labels, ignore_index);
  const Tensor grad = check_sequence_floats(kOp, "grad", grad_in, {c.batch}, "[B]");
  const Tensor lse = check_sequence_floats(kOp, "lse", lse_in, {c.batch, c.length}, "[B, S]");
  check_same_device(kOp, "grad", grad, "logits", c.logits);
  check_same_device(kOp, "lse", lse, "logits", c.logits);
  const Launch launch(c.logits);
  const Tensor out = new_output(c.logits, {c.batch, c.length, c.vocab}, logits.scalar_type());
  if (c.rows() == 0) return out;
  dispatch_dtype(c.logits.scalar_type(), kOp, [&]<class T>() {
    LogprobGradArgs a{};
    static_cast<LogitRows&>(a) = rows_of(c);
    a.grad_nll = data_as<float>(grad), a.lse = data_as<float>(lse);
    a.scale = 1.0;
    a.out = out.data_ptr();
    a = with_blocks<T>(a);
    check_grid(kOp, a.rows * a.blocks);
    launch_selective_logprob_backward<T, true>(a, launch.stream);
  });
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("sequence_nll", TORCH_BOX(&tenfold::cuda::sequence_nll_op));
  m.impl("sequence_nll_forward", TORCH_BOX(&tenfold::cuda::sequence_nll_forward_op));
  m.impl("sequence_nll_backward", TORCH_BOX(&tenfold::cuda::sequence_nll_backward_op));
}
