// SPDX-License-Identifier: Apache-2.0
// CPU registration of pair_pack and shift_right: a row a task.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "core/parallel.h"
#include "corruption/cpu/first_bad.h"
#include "corruption/pairs_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerToken = 2e-4;
constexpr int64_t kRowTokens = 100;  // what a row costs beside its tokens

class Rows {
 public:
  explicit Rows(const Ragged& r) : values_(r.values), offsets_(r.offsets), n_(r.values.numel()) {}
  int64_t length(int64_t row) const { return offsets_[row + 1] - offsets_[row]; }
  int64_t token(int64_t row, int64_t i) const { return values_[offsets_[row] + i]; }
  TokenPart part(int64_t row, int64_t n) const {
    const int64_t from = offsets_[row];
    return {values_.at(from), n, n_ - from};
  }

 private:
  const RowInts values_, offsets_;
  const int64_t n_;
};

class Packer {
 public:
  explicit Packer(const PairCall& c)
      : c_(c), source_(c.source), target_(c.target), prefix_(c.prefix ? *c.prefix : c.source) {}

  PairSizes sizes(int64_t row) const {
    return pair_sizes(c_.prefix ? prefix_.length(row) : 0, source_.length(row), target_.length(row),
                      c_.max_inputs, c_.max_targets);
  }

  // Whether the row was good.
  bool run(int64_t row) const {
    const PairSizes s = sizes(row);
    if (!s.fits) return false;
    const bool wide = c_.inputs.scalar_type() == ScalarType::Long;
    const int64_t size = wide ? 8 : 4;
    const TokenPart in[] = {prefix_.part(row, s.prefix), source_.part(row, s.source)};
    const TokenPart out = target_.part(row, s.target);
    bool good =
        TENFOLD_ISA_CALL(pack_row, in, 2, wide, c_.ids.eos, c_.ids.pad, c_.max_inputs,
                         static_cast<char*>(c_.inputs.data_ptr()) + row * c_.max_inputs * size);
    good &=
        TENFOLD_ISA_CALL(pack_row, &out, 1, wide, c_.ids.eos, c_.ids.target_pad, c_.max_targets,
                         static_cast<char*>(c_.targets.data_ptr()) + row * c_.max_targets * size);
    data_as<int32_t>(c_.in_len)[row] = static_cast<int32_t>(s.inputs);
    data_as<int32_t>(c_.tgt_len)[row] = static_cast<int32_t>(s.targets);
    auto* const cut = data_as<int32_t>(c_.cut) + 2 * row;
    cut[0] = static_cast<int32_t>(source_.length(row) - s.source);
    cut[1] = static_cast<int32_t>(target_.length(row) - s.target);
    return good;
  }

  [[noreturn]] void refuse(int64_t row) const {
    constexpr auto kOp = "pair_pack";
    const PairSizes s = sizes(row);
    TENFOLD_CHECK_VALUE(s.fits, "tenfold::", kOp, ": row ", row, " has a prefix of ", s.prefix,
                        " tokens, which leaves no room for EOS in max_inputs ", c_.max_inputs);
    const auto tokens = [&](const char* name, const Rows& rows, int64_t n) {
      for (int64_t i = 0; i < n; ++i)
        TENFOLD_CHECK_INDEX(rows.token(row, i) >= 0, "tenfold::", kOp, ": token ", i, " of row ",
                            row, " of ", name, " is ", rows.token(row, i), ", below 0");
    };
    tokens("prefix", prefix_, s.prefix);
    tokens("source", source_, s.source);
    tokens("target", target_, s.target);
    raise(ErrorKind::runtime, "tenfold::", kOp, ": tokens changed while they were read");
  }

 private:
  const PairCall& c_;
  const Rows source_, target_, prefix_;
};

void run_pack(const PairCall& c) {
  const Packer packer(c);
  std::atomic<int64_t> bad{c.rows};
  const int64_t tokens = c.max_inputs + c.max_targets + kRowTokens;
  parallel_for(c.rows, kMicrosPerToken * static_cast<double>(tokens),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row)
                   if (!packer.run(row)) lower(bad, row);
               });
  if (bad < c.rows) packer.refuse(bad);
}

void run_shift(const ShiftCall& c) {
  const RowInts labels(c.labels);
  const int64_t stride = row_stride(c.labels), size = labels.wide() ? 8 : 4;
  parallel_for(c.rows, kMicrosPerToken * static_cast<double>(c.width + kRowTokens),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row)
                   TENFOLD_ISA_CALL(shift_row, labels.at(row * stride), labels.wide(), c.width,
                                    c.start, c.pad, c.ignore,
                                    static_cast<char*>(c.out.data_ptr()) + row * c.width * size);
               });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::PairOps<&tenfold::cpu::run_pack, &tenfold::cpu::run_shift>;
  m.impl("pair_pack", TORCH_BOX(&Ops::pack));
  m.impl("shift_right", TORCH_BOX(&Ops::shift));
}
