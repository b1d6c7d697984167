// SPDX-License-Identifier: Apache-2.0
// From calls of the linear losses to rows that count, and from sums of these to tensors.
#pragma once

#include <algorithm>
#include <vector>

#include "loss/cpu/linear_cross_entropy.h"

namespace tenfold::cpu {

inline int64_t integer_at(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Long ? data_as<int64_t>(t)[i] : data_as<int32_t>(t)[i];
}

// name: of the argument that holds the targets.
inline CountedRows counted_rows(const char* op, const LinearLossCall& c,
                                const char* name = "target") {
  CountedRows rows;
  const float* const weights = c.row_weight ? data_as<float>(*c.row_weight) : nullptr;
  for (int64_t i = 0; i < c.rows; ++i) {
    const int64_t target = integer_at(c.target, i);
    if (target == c.ignore_index || (weights != nullptr && weights[i] == 0.0f)) continue;
    TENFOLD_CHECK_INDEX(target >= 0 && target < c.vocab, "tenfold::", op, ": ", name, "[", i,
                        "] = ", target, " is out of range for V = ", c.vocab,
                        "; rows that do not count have ignore_index = ", c.ignore_index);
    rows.row.push_back(i);
    rows.target.push_back(target);
    rows.weight.push_back(weights != nullptr ? weights[i] : 1.0f);
  }
  return rows;
}

inline RowSums room_for_sums(const CountedRows& rows, bool entropy) {
  const size_t n = rows.row.size();
  return {std::vector<float>(n), std::vector<float>(n), std::vector<float>(entropy ? n : 0)};
}

// [N], 0 for rows that do not count.
inline Tensor spread(const LinearLossCall& c, const CountedRows& rows,
                     const std::vector<float>& values) {
  const Tensor out = new_output(c.hidden, {c.rows}, ScalarType::Float);
  std::fill_n(data_as<float>(out), c.rows, 0.0f);
  for (size_t i = 0; i < values.size(); ++i) data_as<float>(out)[rows.row[i]] = values[i];
  return out;
}

inline std::vector<float> gathered(const CountedRows& rows, const OptTensor& values) {
  std::vector<float> out(rows.row.size(), 0.0f);
  if (values)
    for (size_t i = 0; i < out.size(); ++i) out[i] = data_as<float>(*values)[rows.row[i]];
  return out;
}

struct Gradients {
  Tensor hidden, weight;
  GradientsOut out;
};

// Room for those that are wanted; the others are empty.
inline Gradients room_for_gradients(const LinearLossCall& c, bool of_hidden, bool of_weight) {
  const ScalarType dtype = c.hidden.scalar_type();
  Gradients g{
      of_hidden ? new_output(c.hidden, {c.rows, c.dim}, dtype) : new_output(c.hidden, {0}, dtype),
      of_weight ? new_output(c.hidden, {c.vocab, c.dim}, dtype) : new_output(c.hidden, {0}, dtype),
      {}};
  g.out = {of_hidden ? g.hidden.data_ptr() : nullptr, of_weight ? g.weight.data_ptr() : nullptr};
  return g;
}

}  // namespace tenfold::cpu
