// CPU registration of linear_wgrad_rows: one task per tile of the output.
#include "optim/linear_wgrad_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "optim/wgrad_ops.h"

namespace tenfold::cpu {
namespace {

void check_rows(const std::vector<int64_t>& rows, int64_t num_out) {
  for (size_t i = 0; i < rows.size(); ++i) {
    TENFOLD_CHECK_INDEX(rows[i] >= 0 && rows[i] < num_out, "tenfold::linear_wgrad_rows: rows[", i,
                        "] = ", rows[i], " is out of range for out = ", num_out);
    TENFOLD_CHECK_VALUE(i == 0 || rows[i] > rows[i - 1],
                        "tenfold::linear_wgrad_rows: rows must be strictly increasing, got rows[",
                        i - 1, "] = ", rows[i - 1], " and rows[", i, "] = ", rows[i]);
  }
}

// Length of `n` cut into as few equal parts as `most` allows, a multiple of `step`.
int64_t part_of(int64_t n, int64_t most, int64_t step) {
  const int64_t parts = (n + most - 1) / most, part = (n + parts - 1) / parts;
  return (part + step - 1) / step * step;
}

Tensor linear_wgrad_rows_op(Tensor grad_out, Tensor input, Tensor rows_in) {
  const WgradCall a = check_linear_wgrad_rows(grad_out, input, rows_in);
  const std::vector<int64_t> rows = read_ints<int64_t>(rows_in);
  check_rows(rows, a.num_out);
  const Tensor out = new_output(a.input, {a.num_rows, a.num_in}, a.input.scalar_type());
  if (out.numel() == 0) return out;
  const WgradProblem p{a.grad_out.data_ptr(),
                       a.input.data_ptr(),
                       a.grad_out.strides()[0],
                       a.input.strides()[0],
                       a.tokens,
                       rows.data(),
                       a.num_rows,
                       a.num_in,
                       to_dtype(a.input.scalar_type()),
                       out.data_ptr()};
  // Enough tiles for all threads; a multiple of every panel's width wastes no lanes in between.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t height = part_of(a.num_rows, kWgradRows, kWgradRowStep),
          width = part_of(a.num_in, kWgradCols, kWgradColStep);
  const auto tiles = [&] {
    return ((a.num_rows + height - 1) / height) * ((a.num_in + width - 1) / width);
  };
  while (tiles() % threads != 0 && tiles() < 4 * threads && width > kWgradColStep)
    width = (width / 2 + kWgradColStep - 1) / kWgradColStep * kWgradColStep;
  const int64_t across = (a.num_in + width - 1) / width;
  const double micros = static_cast<double>(height * width) * static_cast<double>(a.tokens) * 1e-5;
  parallel_for(tiles(), micros, [&](int64_t begin, int64_t end) {
    const Scratch scratch(wgrad_scratch() * 4);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * height, col = i % across * width;
      const WgradTile tile{row, std::min(height, a.num_rows - row), col,
                           std::min(width, a.num_in - col), static_cast<float*>(scratch.data())};
      TENFOLD_ISA_CALL(wgrad_tile, p, tile);
    }
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("linear_wgrad_rows", TORCH_BOX(&tenfold::cpu::linear_wgrad_rows_op));
}
