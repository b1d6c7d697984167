// SPDX-License-Identifier: Apache-2.0
// CPU registration of outer_dot: a task is some examples of one side with some of the other.
#include "influence/outer_dot.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "influence/outer_dot_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kFlopsPerMicro = 5e4;
constexpr int64_t kDirect = 48;  // products of tokens

Tensor outer_dot_op(Tensor j, Tensor x, Tensor j2, Tensor x2, bool paired) {
  const OuterDotCall c = check_outer_dot(j, x, j2, x2, paired);
  const Tensor out = new_scores(c);
  const int64_t products = c.paired ? c.t * c.s : c.n * c.t * c.m * c.s;
  const OuterDot p{to_dtype(c.j.scalar_type()),
                   token_rows(c.j),
                   token_rows(c.x),
                   token_rows(c.j2),
                   token_rows(c.x2),
                   c.n,
                   c.t,
                   c.m,
                   c.s,
                   c.v,
                   c.d,
                   c.paired,
                   products <= kDirect,
                   data_as<float>(out)};
  int64_t rows = 1, cols = 1;  // examples of a task
  if (!c.paired) {
    rows = std::clamp<int64_t>(kDotRows / std::max<int64_t>(c.t, 1), 1, std::max<int64_t>(c.n, 1));
    cols = std::clamp<int64_t>(kDotCols / std::max<int64_t>(c.s, 1), 1, std::max<int64_t>(c.m, 1));
  }
  const auto tasks = [&] { return ceil_div(c.n, rows) * (c.paired ? 1 : ceil_div(c.m, cols)); };
  const int64_t threads = torch::stable::get_num_threads();
  while (threads > 1 && tasks() < 2 * threads && (rows > 1 || cols > 1)) {
    int64_t& larger = rows * c.t > cols * c.s ? rows : cols;
    int64_t& other = &larger == &rows ? cols : rows;
    (larger > 1 ? larger : other) /= 2;
  }
  const int64_t across = c.paired ? 1 : ceil_div(c.m, cols);
  const double flops = 2.0 * static_cast<double>(c.n * c.t) *
                       static_cast<double>((c.paired ? 1 : c.m) * c.s) *
                       static_cast<double>(c.v + c.d);
  for_each_task(tasks(), flops / kFlopsPerMicro, [&] {
    const auto held = std::make_shared<Scratch>(p.direct ? 64 : kDotRoom * 4);
    return [&, held](int64_t task) {
      const int64_t i = task / std::max<int64_t>(across, 1) * rows;
      const int64_t k = c.paired ? i : task % std::max<int64_t>(across, 1) * cols;
      const DotTask some{i, std::min(rows, c.n - i), k, std::min(cols, c.m - k)};
      TENFOLD_ISA_CALL(outer_dot_task, p, some, static_cast<float*>(held->data()));
    };
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("outer_dot", TORCH_BOX(&tenfold::cpu::outer_dot_op));
}
