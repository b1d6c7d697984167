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

void masked_adamw_8bit_op(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                          Tensors steps, OptTensors masks, Tensors absmax1, Tensors absmax2,
                          Tensor code1, Tensor code2, std::string mask_kind, Tensor lr,
                          double beta1, double beta2, double weight_decay, double eps,
                          bool maximize, OptTensor grad_scale, OptTensor found_inf,
                          OptTensor clip_coef, bool stochastic_round, int64_t seed,
                          int64_t block_size, std::vector<int64_t> tensor_ids) {
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
