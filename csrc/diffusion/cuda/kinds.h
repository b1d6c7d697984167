// SPDX-License-Identifier: Apache-2.0
// From the dtypes of a signal and of its velocity to template arguments.
#pragma once

#include "core/dispatch.h"

namespace tenfold::cuda {

// f(T, V): the same, or 16 bits beside float32.
template <class F>
void dispatch_velocity(ScalarType dtype, ScalarType v_dtype, const char* op, const F& f) {
  dispatch_dtype(dtype, op, [&]<class T>() {
    if constexpr (sizeof(T) == 4) {
      dispatch_dtype(v_dtype, op, [&]<class V>() { f.template operator()<T, V>(); });
    } else {
      f.template operator()<T, T>();
    }
  });
}

}  // namespace tenfold::cuda
