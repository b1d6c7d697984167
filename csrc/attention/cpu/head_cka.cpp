// CPU registration of head_cka: one task per pair of heads a <= b.
#include "attention/head_cka.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "attention/heads_ops.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

Tensor head_cka_op(Tensor w_in, bool center) {
  check_head_cka("head_cka", w_in);
  const Tensor w = with_contiguous_rows(w_in);
  const int64_t heads = w.sizes()[0], dims = w.sizes()[1], length = w.sizes()[2];
  const Dtype dtype = to_dtype(w.scalar_type());
  const Tensor out = new_output(w, {heads, heads}, ScalarType::Float);
  const int64_t head_bytes = w.strides()[0] * dtype_size(dtype), row = w.strides()[1];
  const char* data = data_as<char>(w);
  std::vector<float> means(center ? heads * dims : 0);
  for (int64_t i = 0; i < static_cast<int64_t>(means.size()); ++i)
    means[i] = TENFOLD_ISA_CALL(
        row_mean, data + i / dims * head_bytes + i % dims * row * dtype_size(dtype), dtype, length);
  std::vector<double> squares(heads * heads);
  parallel_for(heads * heads, 100.0, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t a = at / heads, b = at % heads;
      if (a > b) continue;
      const GramBlock block{data + a * head_bytes,
                            data + b * head_bytes,
                            row,
                            row,
                            dims,
                            length,
                            dtype,
                            center ? means.data() + a * dims : nullptr,
                            center ? means.data() + b * dims : nullptr};
      squares[at] = TENFOLD_ISA_CALL(gram_square_sum, block);
    }
  });
  float* to = data_as<float>(out);
  for (int64_t a = 0; a < heads; ++a)
    for (int64_t b = a; b < heads; ++b) {
      const double norms = std::sqrt(squares[a * heads + a]) * std::sqrt(squares[b * heads + b]);
      to[a * heads + b] = to[b * heads + a] = static_cast<float>(squares[a * heads + b] / norms);
    }
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("head_cka", TORCH_BOX(&tenfold::cpu::head_cka_op));
}
