// SPDX-License-Identifier: Apache-2.0
// CPU registration of linear_wgrad_rows: one task per tile of the output.
#include "optim/linear_wgrad_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "optim/wgrad_ops.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kPackedCols = int64_t{2} << 20;  // floats

void check_rows(const std::vector<int64_t>& rows, int64_t num_out) {
  for (size_t i = 0; i < rows.size(); ++i) {
    TENFOLD_CHECK_INDEX(rows[i] >= 0 && rows[i] < num_out, "tenfold::linear_wgrad_rows: rows[", i,
                        "] = ", rows[i], " is out of range for out = ", num_out);
    TENFOLD_CHECK_VALUE(i == 0 || rows[i] > rows[i - 1],
                        "tenfold::linear_wgrad_rows: rows must be strictly increasing, got rows[",
                        i - 1, "] = ", rows[i - 1], " and rows[", i, "] = ", rows[i]);
  }
}

// [0, n) in parts of whole units (the last one may be shorter), as equal as can be.
struct Parts {
  int64_t n, unit, count;
  Parts(int64_t n, int64_t unit, int64_t longest)
      : n(n), unit(unit), count((units() * unit + longest - 1) / longest) {}
  int64_t units() const { return (n + unit - 1) / unit; }
  int64_t begin(int64_t i) const { return std::min(n, i * units() / count * unit); }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t longest() const { return (units() + count - 1) / count * unit; }
};

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
  const int64_t threads = torch::stable::get_num_threads();
  const Parts down(a.num_rows, kWgradRowStep, kWgradRows);
  Parts across(a.num_in, kWgradColStep, kWgradCols);
  const auto tiles = [&] { return down.count * across.count; };
  while (tiles() % threads != 0 && tiles() < 4 * threads && across.count < across.units())
    ++across.count;
  const Isa isa = active_isa();  // one for all tasks: they must agree on the panels
  const int64_t tokens = TENFOLD_ISA_CALL_AS(isa, wgrad_strip_tokens, p.dtype);
  const int64_t strips = (a.tokens + tokens - 1) / tokens;
  const int64_t height = down.longest(), width = across.longest();
  const int64_t row_strip = wgrad_row_strip(height), col_strip = wgrad_col_strip(width);
  // Columns are packed and multiplied in rounds, as many in each as kPackedCols has room for, and
  // as give every thread as many tiles.
  const int64_t even = threads / std::gcd(threads, down.count);
  const int64_t room = kPackedCols / std::max<int64_t>(strips * col_strip, 1);
  const Parts rounds(across.count, even, std::max(room, even));
  const Scratch packed((down.count * row_strip + rounds.longest() * col_strip) * strips * 4);
  float* const row_panels = static_cast<float*>(packed.data());
  float* const col_panels = row_panels + down.count * row_strip * strips;
  const double strip_micros = static_cast<double>(tokens) * 1e-3;
  parallel_for(down.count * strips, strip_micros * static_cast<double>(height),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   TENFOLD_ISA_CALL_AS(isa, wgrad_pack_rows, p, down.begin(i / strips),
                                       down.length(i / strips), i % strips,
                                       row_panels + i * row_strip);
               });
  for (int64_t round = 0; round < rounds.count; ++round) {
    const int64_t first = rounds.begin(round), count = rounds.length(round);
    parallel_for(count * strips, strip_micros * static_cast<double>(width) / 8,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     TENFOLD_ISA_CALL_AS(isa, wgrad_pack_cols, p, across.begin(first + i / strips),
                                         across.length(first + i / strips), i % strips,
                                         col_panels + i * col_strip);
                 });
    const double micros =
        static_cast<double>(height * width) * static_cast<double>(a.tokens) * 1e-5;
    parallel_for(down.count * count, micros, [&](int64_t begin, int64_t end) {
      const Scratch sums(wgrad_sums(height, width) * 4);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / count, col = i % count;
        TENFOLD_ISA_CALL_AS(isa, wgrad_tile, p,
                            {down.begin(row), down.length(row), across.begin(first + col),
                             across.length(first + col), row_panels + row * strips * row_strip,
                             col_panels + col * strips * col_strip, row_strip, col_strip,
                             static_cast<float*>(sums.data())});
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("linear_wgrad_rows", TORCH_BOX(&tenfold::cpu::linear_wgrad_rows_op));
}
