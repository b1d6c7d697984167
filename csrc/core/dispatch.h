// SPDX-License-Identifier: Apache-2.0
// From runtime values to template arguments.
// Problem: a kernel wants its dtype (or head size) at compile time; the tensor has it at run time.
// Solution: call a templated lambda once for the case that matches, and name op and value if none
// does.
//   dispatch_dtype(q.scalar_type(), "proxy_scores", [&]<class T>() { run<T>(params); });
//   dispatch_int<64, 128>(d, "proxy_scores", "head_dim", [&]<int D>() { run<D>(params); });
#pragma once

#include <utility>

#include "core/check.h"
#include "core/types.h"

namespace tenfold {

inline Dtype to_dtype(ScalarType s) {
  return s == ScalarType::Float ? Dtype::f32 : s == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

template <class F>
auto dispatch_dtype(ScalarType s, const char* op, F&& f) {
  switch (s) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::BFloat16: return f.template operator()<bf16_t>();
    case ScalarType::Half: return f.template operator()<fp16_t>();
    default:
      raise(ErrorKind::type, "tenfold::", op, ": dtype ", dtype_name(s),
            " is not supported; supported: float32, bfloat16, float16");
  }
}

template <int... Values, class F>
void dispatch_int(int64_t value, const char* op, const char* name, F&& f) {
  const bool found = ((value == Values ? (f.template operator()<Values>(), true) : false) || ...);
  if (found) return;
  std::ostringstream allowed;
  ((allowed << ' ' << Values), ...);
  raise(ErrorKind::value, "tenfold::", op, ": ", name, " ", value,
        " is not supported; supported:", allowed.str());
}

}  // namespace tenfold
