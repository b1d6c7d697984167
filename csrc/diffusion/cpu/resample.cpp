// SPDX-License-Identifier: Apache-2.0
// CPU registration of fir_down2, fir_up2_cat and their gradients: strips of rows are shared out.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/cpu/past_caches.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "diffusion/resample_ops.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kStrip = 8192;  // outputs of a task
constexpr double kMicrosPerOutput = 4e-4;

void wide_row(const FirSpan& s) {
  const auto* const x = static_cast<const double*>(s.x);
  for (int64_t i = s.begin; i < s.end; ++i)
    static_cast<double*>(s.y)[i] =
        fir_at<double>(s.kind, i, s.length, [&](int64_t j) { return x[j]; });
}

void run_fir(const FirCall& c) {
  const auto size = static_cast<int64_t>(c.y.element_size());
  const bool wide = c.y.scalar_type() == ScalarType::Double;
  const int64_t rows = c.channels + c.skipped(), strips = ceil_div(c.outputs, kStrip);
  const bool past = past_caches(c.batch * rows * c.outputs * size, c.fresh);
  const FirRows in = c.in(), out = c.out();
  const FirRows skip =
      c.skip ? FirRows{c.skip->data_ptr(), c.skip->strides()[0], c.skip->strides()[1]} : FirRows{};
  const auto row = [&](const FirRows& r, int64_t b, int64_t channel) {
    return static_cast<char*>(r.data) + (b * r.batch_step + channel * r.row_step) * size;
  };
  const double micros = kMicrosPerOutput * static_cast<double>(std::min(kStrip, c.outputs)) + 0.05;
  parallel_for(c.batch * rows * strips, micros, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / strips / rows, channel = i / strips % rows;
      const int64_t begin = i % strips * kStrip, end = std::min(c.outputs, begin + kStrip);
      char* const to = row(out, b, channel);
      if (channel >= c.channels) {
        const char* const from = row(skip, b, channel - c.channels);
        TENFOLD_ISA_CALL(copy_row, from + begin * size, to + begin * size, (end - begin) * size,
                         past);
        continue;
      }
      const FirSpan span{
          to_dtype(c.y.scalar_type()), c.kind, past, row(in, b, channel), to, c.length, begin, end};
      if (wide) {
        wide_row(span);
      } else {
        TENFOLD_ISA_CALL(fir_row, span);
      }
    }
  });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::FirOps<&tenfold::cpu::run_fir>;
  m.impl("fir_down2", TORCH_BOX(&Ops::down));
  m.impl("fir_down2_", TORCH_BOX(&Ops::down_out));
  m.impl("fir_down2_backward", TORCH_BOX(&Ops::down_backward));
  m.impl("fir_up2_cat", TORCH_BOX(&Ops::up));
  m.impl("fir_up2_cat_", TORCH_BOX(&Ops::up_out));
  m.impl("fir_up2_backward", TORCH_BOX(&Ops::up_backward));
}
