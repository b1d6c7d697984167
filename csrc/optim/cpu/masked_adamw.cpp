// SPDX-License-Identifier: Apache-2.0
// CPU registration of masked_adamw_: checks, steps, one pass over the chunks of all tensors.
#include "optim/masked_adamw.h"

#include <torch/csrc/stable/library.h>

#include "optim/cpu/adamw_host.h"
#include "optim/cpu/mask_words.h"

namespace tenfold::cpu {
namespace {

constexpr auto kOp = "masked_adamw_";
constexpr double kMicrosPerGrain = 0.25;  // of kAdamwGrain elements in the cache

int64_t units_of(const AdamwTensor& t) {
  const Mask& mask = t.mask;
  if (mask.kind == MaskKind::element) return t.numel;
  if (mask.kind == MaskKind::col) return mask.inner;
  return mask.inner == 0 ? 0 : (t.numel + mask.inner - 1) / mask.inner;
}

int count_units(const Mask& mask, int64_t units, int64_t begin, int64_t end) {
  int count = 0;
  for (int64_t at = begin; at < end; at += 64)
    count += __builtin_popcountll(
        mask_bits(mask.bits, units, at, static_cast<int>(std::min<int64_t>(end - at, 64))));
  return count;
}

// Trained elements of a tensor with `trained` of `units` set.
int64_t trained_elements(const AdamwTensor& t, int64_t units, int64_t trained) {
  const Mask& mask = t.mask;
  if (mask.kind == MaskKind::element || units == 0) return trained;
  if (mask.kind == MaskKind::col) return t.numel / units * trained;
  const int64_t missing = units * mask.inner - t.numel;  // from the last block
  return trained * mask.inner - (mask_bit(mask.bits, units - 1) ? missing : 0);
}

// Compact states are written where the prefix says: it must be the mask's.
void check_prefix_values(AdamwTensor* t, size_t index) {
  const int64_t units = units_of(*t), blocks = (units + kPrefixBlock - 1) / kPrefixBlock;
  std::atomic<bool> right{true};
  parallel_for(blocks, 0.01, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kPrefixBlock, last = std::min(first + kPrefixBlock, units);
      const int64_t before = b == 0 ? 0 : t->prefix[b];
      const int64_t after = before + count_units(t->mask, units, first, last);
      if (t->prefix[b] != before || (b + 1 < blocks && t->prefix[b + 1] != after)) right = false;
    }
  });
  TENFOLD_CHECK_VALUE(right, "tenfold::", kOp, ": prefixes[", index,
                      "] is not the mask_prefix of masks[", index, "], block ", kPrefixBlock);
  int64_t trained = 0;
  if (blocks != 0)
    trained =
        t->prefix[blocks - 1] + count_units(t->mask, units, (blocks - 1) * kPrefixBlock, units);
  if (t->mask.kind == MaskKind::col) t->col_trained = trained;
  const int64_t want = t->numel == 0 ? 0 : trained_elements(*t, units, trained);
  TENFOLD_CHECK_VALUE(t->state_numel == want, "tenfold::", kOp, ": compact exp_avgs[", index,
                      "] must have one element per trained element of params[", index, "], ", want,
                      ", got ", t->state_numel);
}

// Lists by reference: boxing copies what is taken by value, tensor by tensor.
void masked_adamw_op(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                     const Tensors& exp_avg_sqs, const Tensors& steps, const OptTensors& masks,
                     const std::optional<Tensors>& max_exp_avg_sqs,
                     const std::optional<OptTensors>& prefixes, const std::string& mask_kind,
                     const Tensor& lr, double beta1, double beta2, double weight_decay, double eps,
                     bool maximize, bool amsgrad, const OptTensor& grad_scale,
                     const OptTensor& found_inf, const OptTensor& clip_coef, bool stochastic_round,
                     int64_t seed, const std::string& mask_scope, int64_t block_size,
                     const std::vector<int64_t>& tensor_ids) {
  const Tensors maxima = max_exp_avg_sqs.value_or(Tensors());
  const OptTensors starts = prefixes.value_or(OptTensors());
  AdamwCall call = check_masked_adamw({{params,
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
                                       maxima,
                                       starts,
                                       amsgrad,
                                       mask_scope});
  for (size_t i = 0; i < call.tensors.size(); ++i)
    if (call.tensors[i].prefix != nullptr) check_prefix_values(&call.tensors[i], i);
  if (!is_finite_step(found_inf)) return;
  const auto scalars = advance_steps(call, grad_scale, clip_coef);
  over_all_tensors(
      call.tensors, kAdamwGrain, kMicrosPerGrain, [&](size_t i, int64_t begin, int64_t end) {
        TENFOLD_ISA_CALL(masked_adamw_range, call.tensors[i], scalars[i], call.options, begin, end);
      });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&tenfold::cpu::masked_adamw_op));
}
