// SPDX-License-Identifier: Apache-2.0
// CPU registration of head_cka: block pairs in order over the threads, runs of one b together.
#include "attention/head_cka.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention/heads_ops.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

// Mean of every row of w.
std::vector<float> row_means(const GramProblem& p, int64_t heads) {
  std::vector<float> means(heads * p.dims);
  const double micros = static_cast<double>(p.length) * 2e-4;
  parallel_for(heads * p.dims, micros, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i / p.dims * p.head_stride + i % p.dims * p.row_stride;
      means[i] = TENFOLD_ISA_CALL(
          row_mean, static_cast<const char*>(p.w) + at * dtype_size(p.dtype), p.dtype, p.length);
    }
  });
  return means;
}

// Pair number b * (b + 1) / 2 + a, with a <= b: the largest b of a pair number or before it.
int64_t column_of(int64_t pair) {
  auto b = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(pair) + 1.0) - 1.0) / 2.0);
  while (b * (b + 1) / 2 > pair) --b;
  while ((b + 1) * (b + 2) / 2 <= pair) ++b;
  return b;
}

// How block pairs are multiplied, with what must be done before.
class Gram {
 public:
  Gram(const GramProblem& p, [[maybe_unused]] int64_t blocks) : p_(p) {
#if defined(TENFOLD_X86)
    if (!by_tiles()) return;
    packed_ = std::make_unique<Scratch>(avx512_amx::gram_tiles_packed(p, blocks / p.blocks) * 4);
    auto* const to = static_cast<float*>(packed_->data());
    const double micros = static_cast<double>(rows_of(p, 0) * p.length) * 1e-4;
    parallel_for(blocks, micros, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) avx512_amx::gram_tiles_pack(p, block, to);
    });
#endif
  }
  bool by_tiles() const { return gram_by_tiles(isa_, p_); }
  int64_t scratch() const {
#if defined(TENFOLD_X86)
    if (by_tiles()) return avx512_amx::gram_tiles_scratch();
#endif
    return gram_scratch();
  }
  void run(const GramRun& r) const {
#if defined(TENFOLD_X86)
    if (by_tiles())
      return avx512_amx::gram_tiles_run(p_, static_cast<const float*>(packed_->data()), r);
#endif
    TENFOLD_ISA_CALL_AS(isa_, gram_run, p_, r);
  }

 private:
  const Isa isa_ = active_isa();
  const GramProblem& p_;
  std::unique_ptr<Scratch> packed_;
};

// Sums of squares of all block pairs. A pair's value does not depend on its company in a run.
std::vector<double> gram_squares(const GramProblem& p, int64_t blocks) {
  const int64_t pairs = blocks * (blocks + 1) / 2;
  std::vector<double> squares(pairs);
  const int64_t rows = std::min(p.dims, kGramRows);
  const Gram gram(p, blocks);
  const double micros = static_cast<double>(rows * rows) * static_cast<double>(p.length) *
                        (gram.by_tiles() ? 1e-6 : 2e-5);
  parallel_for(pairs, micros, [&](int64_t begin, int64_t end) {
    const Scratch scratch(gram.scratch() * 4);
    for (int64_t pair = begin; pair < end;) {
      const int64_t b = column_of(pair), a = pair - b * (b + 1) / 2;
      const int64_t num_a = std::min({kGramRun, b + 1 - a, end - pair});
      const GramRun run{a, num_a, b, squares.data() + pair, static_cast<float*>(scratch.data())};
      gram.run(run);
      pair += num_a;
    }
  });
  return squares;
}

Tensor head_cka_op(Tensor w_in, bool center) {
  check_head_cka("head_cka", w_in);
  const Tensor w = with_contiguous_rows(w_in);
  const int64_t heads = w.sizes()[0];
  const Tensor out = new_output(w, {heads, heads}, ScalarType::Float);
  GramProblem p{w.data_ptr(),
                w.strides()[0],
                w.strides()[1],
                w.sizes()[1],
                w.sizes()[2],
                (w.sizes()[1] + kGramRows - 1) / kGramRows,
                to_dtype(w.scalar_type()),
                nullptr};
  const auto means = center ? row_means(p, heads) : std::vector<float>();
  if (center) p.mean = means.data();
  const auto of_blocks = gram_squares(p, heads * p.blocks);
  std::vector<double> squares(heads * heads);  // of heads a <= b; blocks of one head count twice
  for (int64_t b = 0, at = 0; b < heads * p.blocks; ++b)
    for (int64_t a = 0; a <= b; ++a, ++at) {
      const bool twice = a / p.blocks == b / p.blocks && a != b;
      squares[a / p.blocks * heads + b / p.blocks] += (twice ? 2.0 : 1.0) * of_blocks[at];
    }
  float* to = data_as<float>(out);
  for (int64_t a = 0; a < heads; ++a)
    for (int64_t b = a; b < heads; ++b) {
      const double norms = std::sqrt(squares[a * heads + a] * squares[b * heads + b]);
      to[a * heads + b] = to[b * heads + a] = static_cast<float>(squares[a * heads + b] / norms);
    }
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("head_cka", TORCH_BOX(&tenfold::cpu::head_cka_op));
}
