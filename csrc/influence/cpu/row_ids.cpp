// SPDX-License-Identifier: Apache-2.0
#include "influence/cpu/row_ids.h"

namespace tenfold::cpu {
namespace {

// "order[2, 0, 7]"
std::string place(const char* arg, const Tensor& t, int64_t i) {
  std::string text = "]";
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    text = (d > 0 ? ", " : "") + std::to_string(i % t.sizes()[d]) + text;
    i /= t.sizes()[d];
  }
  return arg + ("[" + text);
}

template <class Int>
void check_range(const char* op, const char* arg, const Tensor& t, int64_t least, int64_t rows) {
  const Int* const ids = data_as<Int>(t);
  const int64_t n = t.numel();
  bool wrong = false;
  for (int64_t i = 0; i < n; ++i) wrong |= ids[i] < least || ids[i] >= rows;
  for (int64_t i = 0; wrong && i < n; ++i)
    TENFOLD_CHECK_INDEX(ids[i] >= least && ids[i] < rows, "tenfold::", op, ": ", place(arg, t, i),
                        " = ", static_cast<int64_t>(ids[i]), " must be in [", least, ", ", rows,
                        ")");
}

}  // namespace

RowIds::RowIds(const char* op, const char* arg, const Tensor& ids, int64_t least, int64_t rows) {
  if (ids.scalar_type() == ScalarType::Int) {
    check_range<int32_t>(op, arg, ids, least, rows);
    data_ = data_as<int32_t>(ids);
    return;
  }
  check_range<int64_t>(op, arg, ids, least, rows);
  const int64_t* const from = data_as<int64_t>(ids);
  copy_.assign(from, from + ids.numel());
  data_ = copy_.data();
}

std::vector<int64_t> check_lengths(const char* op, const OptTensor& lengths, int64_t steps) {
  if (!lengths) return {};
  std::vector<int64_t> all = read_ints<int64_t>(*lengths);
  for (size_t r = 0; r < all.size(); ++r)
    TENFOLD_CHECK_INDEX(all[r] >= 0 && all[r] <= steps, "tenfold::", op, ": lengths[", r,
                        "] = ", all[r], " must be in [0, ", steps, "], the steps of order");
  return all;
}

}  // namespace tenfold::cpu
