// SPDX-License-Identifier: Apache-2.0
// What only the registrations of dha_attention and t5_attention share.
#pragma once

#include "attention/cuda/prefill_launch.h"
#include "attention/prefill_ops.h"

namespace tenfold::cuda {

// Row layouts and outputs of the backward.
inline void set_gradients(BackwardArgs& p, const Tensor& dout, const Tensor& out, const Tensor& dq,
                          const Tensor& dk, const Tensor& dv) {
  const int64_t size = dtype_size(p.dtype);
  p.out = out.data_ptr(), p.dout = dout.data_ptr();
  p.dq = dq.data_ptr(), p.dk = dk.data_ptr(), p.dv = dv.data_ptr();
  p.out_at = row_layout(out), p.dout_at = row_layout(dout);
  p.dq_at = row_layout(dq), p.dk_at = row_layout(dk), p.dv_at = row_layout(dv);
  p.dout_vectors = row_vectors(p.dout, p.dout_at, p.value_dim, size);
  p.dq_vectors = row_vectors(p.dq, p.dq_at, p.head_dim, size);
  p.dk_vectors = row_vectors(p.dk, p.dk_at, p.head_dim, size);
  p.dv_vectors = row_vectors(p.dv, p.dv_at, p.value_dim, size);
}

}  // namespace tenfold::cuda
