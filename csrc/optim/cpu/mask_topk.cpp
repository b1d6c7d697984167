// SPDX-License-Identifier: Apache-2.0
// CPU registration of mask_topk and mask_random; see mask_topk.h for the method.
#include "optim/mask_topk.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/dispatch.h"
#include "core/tensor.h"
#include "optim/cpu/largest.h"
#include "optim/masks_ops.h"

namespace tenfold::cpu {
namespace {

class SourceKeys final : public Keys {
 public:
  explicit SourceKeys(const KeySource& source) : source_(source) {}
  void block(int64_t begin, int64_t n, uint32_t* keys) const override {
    TENFOLD_ISA_CALL(topk_keys, source_, begin, n, keys);
  }
  void sample(const int64_t* at, int64_t n, uint32_t* keys) const override {
    TENFOLD_ISA_CALL(topk_sample, source_, at, n, keys);
  }
  bool uniform() const override { return source_.score == nullptr; }

 private:
  const KeySource source_;
};

Tensor masked_largest(const Tensor& like, const KeySource& source, int64_t n, int64_t k,
                      double micros) {
  const Tensor out = new_output(like, {(n + 7) / 8}, ScalarType::Byte);
  uint8_t* const bits = data_as<uint8_t>(out);
  if (k == 0 || k == n) {
    std::fill_n(bits, out.numel(), k == 0 ? uint8_t{0} : uint8_t{0xFF});
    if (k != 0 && n % 8 != 0) bits[n / 8] = static_cast<uint8_t>((1 << (n % 8)) - 1);
    return out;
  }
  find_largest(SourceKeys(source), n, k, micros, bits);
  return out;
}

Tensor mask_topk_op(Tensor score_in, double fraction) {
  const int64_t k = check_mask_topk(score_in, fraction);
  const Tensor score = as_contiguous(score_in);
  const Dtype dtype = to_dtype(score.scalar_type());
  const KeySource source{score.data_ptr(), dtype, 0, 0, 0, 0};
  return masked_largest(score, source, score.numel(), k, dtype == Dtype::f32 ? 9.0 : 7.0);
}

Tensor mask_random_op(Tensor like, int64_t n, double fraction, int64_t seed, int64_t stream) {
  const int64_t k = check_mask_random(n, fraction);
  return masked_largest(like, random_source(seed, stream), n, k, 40.0);
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("mask_topk", TORCH_BOX(&tenfold::cpu::mask_topk_op));
  m.impl("mask_random", TORCH_BOX(&tenfold::cpu::mask_random_op));
}
