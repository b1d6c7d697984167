// SPDX-License-Identifier: Apache-2.0
// The pattern to copy: schemas and shared argument checks of a family.
#include "_template/ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace tenfold {

void check_template_scale(const Tensor& x, double scale) {
  check_float_dtype("template_scale", "x", x);
  TENFOLD_CHECK_VALUE(std::isfinite(scale), "tenfold::template_scale: scale must be finite, got ",
                      scale);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("template_scale(Tensor x, float scale) -> Tensor");
}
