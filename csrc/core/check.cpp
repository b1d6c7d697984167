// SPDX-License-Identifier: Apache-2.0
#include "core/check.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace tenfold {
namespace {

thread_local ErrorKind last_error_kind = ErrorKind::runtime;

std::string list_str(const int64_t* values, int64_t n) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < n; ++i) text << (i == 0 ? "" : ", ") << values[i];
  text << ']';
  return text.str();
}

}  // namespace

void set_last_error_kind(ErrorKind kind) {
  last_error_kind = kind;
}

std::string shape_str(const Tensor& t) {
  return list_str(t.sizes().data(), t.dim());
}

const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

std::string device_str(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::ostringstream text;
  text << (t.is_cuda() ? "cuda" : "device") << ':' << t.get_device_index();
  return text.str();
}

void check_float_dtype(const char* op, const char* arg, const Tensor& t) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half,
                     "tenfold::", op, ": ", arg, " must be float32, bfloat16 or float16, got ",
                     dtype_name(s));
}

void check_int_dtype(const char* op, const char* arg, const Tensor& t) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Int || s == ScalarType::Long, "tenfold::", op, ": ", arg,
                     " must be int32 or int64, got ", dtype_name(s));
}

void check_bytes(const char* op, const char* arg, const Tensor& t) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Bool || s == ScalarType::Byte || s == ScalarType::Char,
                     "tenfold::", op, ": ", arg, " must be bool, int8 or uint8, got ",
                     dtype_name(s));
}

void check_dim(const char* op, const char* arg, const Tensor& t, int64_t dim, const char* layout) {
  TENFOLD_CHECK_VALUE(t.dim() == dim, "tenfold::", op, ": ", arg, " must be ", dim, "-dimensional ",
                      layout, ", got shape ", shape_str(t));
}

void check_same_dtype(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                      const Tensor& b) {
  TENFOLD_CHECK_VALUE(a.scalar_type() == b.scalar_type(), "tenfold::", op, ": ", b_name,
                      " must have the dtype of ", a_name, " (", dtype_name(a.scalar_type()),
                      "), got ", dtype_name(b.scalar_type()));
}

void check_same_device(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                       const Tensor& b) {
  TENFOLD_CHECK_VALUE(device_str(a) == device_str(b), "tenfold::", op, ": ", b_name,
                      " must be on the device of ", a_name, " (", device_str(a), "), got ",
                      device_str(b));
}

void check_sizes(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<int64_t> want, const char* layout) {
  const auto sizes = t.sizes();
  const bool ok = t.dim() == static_cast<int64_t>(want.size()) &&
                  std::equal(want.begin(), want.end(), sizes.begin());
  TENFOLD_CHECK_VALUE(ok, "tenfold::", op, ": ", arg, " must have shape ", layout, " = ",
                      list_str(want.begin(), static_cast<int64_t>(want.size())), ", got ",
                      shape_str(t));
}

void check_no_overlap(const char* op, const char* arg, const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size), innermost first
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.sizes()[i] == 0) return;
    if (t.sizes()[i] > 1) axes.emplace_back(t.strides()[i], t.sizes()[i]);
  }
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;  // elements spanned so far
  for (const auto& [stride, size] : axes) {
    TENFOLD_CHECK_VALUE(stride >= extent, "tenfold::", op, ": ", arg,
                        " is written in place but its elements overlap in memory (an expanded "
                        "view?); pass a .contiguous() tensor");
    extent += (size - 1) * stride;
  }
}

}  // namespace tenfold

extern "C" __attribute__((visibility("default"))) int tenfold_last_error_kind() {
  const auto kind = tenfold::last_error_kind;
  tenfold::set_last_error_kind(tenfold::ErrorKind::runtime);
  return static_cast<int>(kind);
}
