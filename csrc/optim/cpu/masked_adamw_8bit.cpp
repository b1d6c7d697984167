// SPDX-License-Identifier: Apache-2.0
// CPU registration of masked_adamw_8bit_.
#include "optim/masked_adamw_8bit.h"

#include <torch/csrc/stable/library.h>

#include "optim/code_book.h"
#include "optim/cpu/adamw_host.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerGrain = 1.0;  // of kAdamwGrain elements

const CodeBook& book_of(const Tensor& code, int which) {
  const CodeBook* book = cached_code_book(data_as<const float>(code), which);
  TENFOLD_CHECK_VALUE(book != nullptr, "tenfold::masked_adamw_8bit_: code", which + 1,
                      " must be sorted and finite");
  return *book;
}

// Lists by reference: boxing copies what is taken by value, tensor by tensor.
void masked_adamw_8bit_op(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                          const Tensors& exp_avg_sqs, const Tensors& steps, const OptTensors& masks,
                          const Tensors& absmax1, const Tensors& absmax2, const Tensor& code1,
                          const Tensor& code2, const std::string& mask_kind, const Tensor& lr,
                          double beta1, double beta2, double weight_decay, double eps,
                          bool maximize, const OptTensor& grad_scale, const OptTensor& found_inf,
                          const OptTensor& clip_coef, bool stochastic_round, int64_t seed,
                          int64_t block_size, const std::vector<int64_t>& tensor_ids) {
  const Adamw8bitCall call = check_masked_adamw_8bit({{params,
                                                       grads,
                                                       exp_avgs,
                                                       exp_avg_sqs,
                                                       steps,
                                                       masks,
                                                       mask_kind,
                                                       lr,
                                                       beta1,
                                                       beta2,
                                                       weight_decay,
                                                       eps,
                                                       maximize,
                                                       grad_scale,
                                                       found_inf,
                                                       clip_coef,
                                                       stochastic_round,
                                                       seed,
                                                       block_size,
                                                       tensor_ids},
                                                      absmax1,
                                                      absmax2,
                                                      code1,
                                                      code2});
  const CodeBook &book1 = book_of(code1, 0), &book2 = book_of(code2, 1);
  if (!is_finite_step(found_inf)) return;
  const auto scalars = advance_steps(call, grad_scale, clip_coef);
  over_all_tensors(call.tensors, kAdamwGrain, kMicrosPerGrain,
                   [&](size_t i, int64_t begin, int64_t end) {
                     TENFOLD_ISA_CALL(masked_adamw_8bit_range, call.tensors[i], scalars[i],
                                      call.options, book1, book2, begin, end);
                   });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("masked_adamw_8bit_", TORCH_BOX(&tenfold::cpu::masked_adamw_8bit_op));
}
