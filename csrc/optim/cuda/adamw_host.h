// SPDX-License-Identifier: Apache-2.0
// What the CUDA registrations of both AdamW ops share: device scalars, and tensors by dtype.
#pragma once

#include <vector>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "optim/adamw_ops.h"
#include "optim/cuda/adamw_table.cuh"

namespace tenfold::cuda {

inline const float* data_or_null(const OptTensor& t) {
  return t ? data_as<const float>(*t) : nullptr;
}

inline AdamwInputs adamw_inputs(const AdamwArgs& a) {
  AdamwInputs in;
  in.grad_scale = data_or_null(a.grad_scale);
  in.found_inf = data_or_null(a.found_inf);
  in.clip_coef = data_or_null(a.clip_coef);
  if (a.lr.is_cpu()) return in;  // its value is in the options
  in.lr.data = a.lr.data_ptr();
  const auto s = a.lr.scalar_type();
  in.lr.kind = s == ScalarType::Double     ? 0
               : s == ScalarType::Float    ? 1
               : s == ScalarType::BFloat16 ? 2
                                           : 3;
  return in;
}

// Advances the steps on the device; the scalars of every tensor, there.
template <class T>
Tensor advance_on_device(const AdamwArgs& a, const std::vector<T>& tensors, const AdamwOptions& o,
                         cudaStream_t stream) {
  const auto count = static_cast<int64_t>(tensors.size());
  const Tensor scalars = new_output(
      a.params[0], {count * static_cast<int64_t>(sizeof(AdamwScalars))}, ScalarType::Byte);
  std::vector<float*> steps;
  steps.reserve(tensors.size());
  for (const T& t : tensors) steps.push_back(t.step);
  launch_adamw_advance(steps.data(), count, o, adamw_inputs(a), data_as<AdamwScalars>(scalars),
                       stream);
  return scalars;
}

// The tensors that `belongs` chooses, with their places in the call.
template <class T>
struct Chosen {
  std::vector<const T*> tensors;
  std::vector<int> at;

  template <class F>
  Chosen(const std::vector<T>& all, const F& belongs) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (!belongs(all[i])) continue;
      tensors.push_back(&all[i]);
      at.push_back(static_cast<int>(i));
    }
  }
  int64_t size() const { return static_cast<int64_t>(tensors.size()); }
};

}  // namespace tenfold::cuda
