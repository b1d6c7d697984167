// SPDX-License-Identifier: Apache-2.0
#include "core/tensor.h"

#include <algorithm>
#include <utility>

#include "core/scratch.h"

namespace tenfold {
namespace {

int64_t element_size(ScalarType t) {
  switch (t) {
    case ScalarType::Long:
    case ScalarType::Double: return 8;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short: return 2;
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool: return 1;
    default: return 4;
  }
}

}  // namespace

Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_output(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                    dtype);
}

Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                  ScalarType dtype) {
  // The shim itself: torch::stable::new_empty looks its op up by name, which takes a microsecond.
  auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(),
                                                          static_cast<int64_t>(sizes.size()), &code,
                                                          nullptr, nullptr, 0, nullptr, &made));
  Tensor out(made);
  if (out.is_cpu()) advise_huge_pages(out.data_ptr(), out.numel() * element_size(dtype));
  return out;
}

Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.numel() == 0 || t.sizes()[last] == 1 || t.strides()[last] == 1) return t;
  return torch::stable::contiguous(t);
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size), innermost first
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.sizes()[i] > 1) axes.emplace_back(t.strides()[i], t.sizes()[i]);
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != extent) return false;
    extent *= size;
  }
  return true;
}

bool same_order(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.sizes()[i] > 1 && a.strides()[i] != b.strides()[i]) return false;
  return true;
}

template <class Int>
std::vector<Int> read_ints(const Tensor& t) {
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
  for (int64_t i = 0; i < t.dim(); ++i) {
    size[3 - t.dim() + i] = t.sizes()[i];
    stride[3 - t.dim() + i] = t.strides()[i];
  }
  std::vector<Int> out;
  out.reserve(t.numel());
  const bool wide = t.scalar_type() == ScalarType::Long;
  for (int64_t a = 0; a < size[0]; ++a)
    for (int64_t b = 0; b < size[1]; ++b)
      for (int64_t c = 0; c < size[2]; ++c) {
        const int64_t at = a * stride[0] + b * stride[1] + c * stride[2];
        out.push_back(static_cast<Int>(wide ? data_as<int64_t>(t)[at] : data_as<int32_t>(t)[at]));
      }
  return out;
}

template std::vector<int32_t> read_ints(const Tensor&);
template std::vector<int64_t> read_ints(const Tensor&);

}  // namespace tenfold
