// SPDX-License-Identifier: Apache-2.0
// Argument checks. A failed check throws std::runtime_error with one plain sentence; beside it the
// kind of Python exception that tenfold.ops raises is kept in a thread-local (torch.ops can only
// raise RuntimeError), read by python/tenfold/_load.py through tenfold_last_error_kind().
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace tenfold {

enum class ErrorKind : int { runtime = 0, value = 1, index = 2, type = 3 };

void set_last_error_kind(ErrorKind kind);

template <class... Args>
[[noreturn]] void raise(ErrorKind kind, const Args&... args) {
  set_last_error_kind(kind);
  std::ostringstream text;
  ((text << args), ...);
  throw std::runtime_error(text.str());
}

#define TENFOLD_CHECK_KIND(kind, cond, ...)           \
  do {                                                \
    if (!(cond)) [[unlikely]] {                       \
      ::tenfold::raise(::tenfold::kind, __VA_ARGS__); \
    }                                                 \
  } while (0)

#define TENFOLD_CHECK_VALUE(cond, ...) TENFOLD_CHECK_KIND(ErrorKind::value, cond, __VA_ARGS__)
#define TENFOLD_CHECK_INDEX(cond, ...) TENFOLD_CHECK_KIND(ErrorKind::index, cond, __VA_ARGS__)
#define TENFOLD_CHECK_TYPE(cond, ...) TENFOLD_CHECK_KIND(ErrorKind::type, cond, __VA_ARGS__)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[2, 8, 4096, 128]"
std::string shape_str(const Tensor& t);

const char* dtype_name(ScalarType t);

std::string device_str(const Tensor& t);

// One of float32, bfloat16, float16; else TypeError.
void check_float_dtype(const char* op, const char* arg, const Tensor& t);

// One of int32, int64; else TypeError.
void check_int_dtype(const char* op, const char* arg, const Tensor& t);

// One of bool, int8, uint8, as masks are read; else TypeError.
void check_bytes(const char* op, const char* arg, const Tensor& t);

void check_dim(const char* op, const char* arg, const Tensor& t, int64_t dim, const char* layout);

void check_same_dtype(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                      const Tensor& b);

void check_same_device(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                       const Tensor& b);

// Sizes of `t` must equal `want`; `layout` names the axes in the message.
void check_sizes(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<int64_t> want, const char* layout);

// A writable tensor whose elements must not share memory.
void check_no_overlap(const char* op, const char* arg, const Tensor& t);

}  // namespace tenfold
