// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `loss`, for ctypes. The launch code is the kernels'
// own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "loss/cuda/lce_launch.cuh"
#include "loss/cuda/selective_logprob_kernel.cuh"
#include "loss/cuda/sequence_nll_kernel.cuh"

// n: dtype rows vocab stride ids_wide
API void emu_selective_logprob(const void* logits, const void* ids, float* const* out,
                               const int64_t* n, double scale) {
  LogprobArgs a{};
  a.logits = logits, a.ids = ints(ids, n[4]);
  a.rows = n[1], a.vocab = n[2], a.row_stride = n[3];
  a.scale = scale;
  a.logp = out[0], a.lse = out[1], a.entropy = out[2];
  with_dtype(n[0], [&]<class T>() {
    a = with_chunks<T>(a);
    std::vector<LogitSums> parts(a.chunks > 1 ? a.rows * a.chunks : 0);
    a.parts = parts.data();
    launch_selective_logprob<T>(a, nullptr);
  });
}

// grads: of logp, lse, entropy, or null; then lse, entropy
API void emu_selective_logprob_backward(const void* logits, const void* ids,
                                        const float* const* grads, void* out, const int64_t* n,
                                        double scale) {
  LogprobGradArgs a{};
  a.logits = logits, a.ids = ints(ids, n[4]);
  a.rows = n[1], a.vocab = n[2], a.row_stride = n[3];
  a.grad_logp = grads[0], a.grad_lse = grads[1], a.grad_entropy = grads[2];
  a.lse = grads[3], a.entropy = grads[4];
  a.scale = scale, a.out = out;
  with_dtype(n[0],
             [&]<class T>() { launch_selective_logprob_backward<T>(with_blocks<T>(a), nullptr); });
}

// n: dtype batch length vocab batch_stride stride wide ignore_index
static LogitRows sequence_rows(const void* logits, const void* labels, const int64_t* n) {
  LogitRows a{};
  a.logits = logits, a.ids = ints(labels, n[6]);
  a.rows = n[1] * n[2], a.inner = n[2], a.vocab = n[3];
  a.outer_stride = n[4], a.row_stride = n[5], a.ignored = n[7];
  return a;
}

// lse: or null
API void emu_sequence_nll(const void* logits, const void* labels, float* sum, int64_t* count,
                          float* lse, const int64_t* n) {
  LogprobArgs a{};
  static_cast<LogitRows&>(a) = sequence_rows(logits, labels, n);
  std::vector<float> logp(a.rows, NAN);
  a.scale = 1.0, a.logp = logp.data(), a.lse = lse;
  with_dtype(n[0], [&]<class T>() {
    if (a.rows > 0) a = with_chunks<T>(a);
    std::vector<LogitSums> parts(a.chunks > 1 ? a.rows * a.chunks : 0);
    a.parts = parts.data();
    launch_sequence_nll<T>(a, {logp.data(), a.ids, n[1], n[2], n[7], sum, count}, nullptr);
  });
}

API void emu_sequence_nll_backward(const void* logits, const void* labels, const float* grad,
                                   const float* lse, void* out, const int64_t* n) {
  LogprobGradArgs a{};
  static_cast<LogitRows&>(a) = sequence_rows(logits, labels, n);
  a.grad_nll = grad, a.lse = lse, a.scale = 1.0, a.out = out;
  with_dtype(n[0], [&]<class T>() {
    launch_selective_logprob_backward<T, true>(with_blocks<T>(a), nullptr);
  });
}

namespace {

// n: dtype N H V hidden_stride weight_stride target_wide ids ignore_index none mean
//    chunk_rows segment delta_bytes split_bytes blocks ranges
struct LinearCall {
  const int64_t* n;
  LceMatrices m;
  CountArgs count{};
  LceLimits limits;

  LinearCall(const void* hidden, const void* weight, const void* target, const float* row_weight,
             const int64_t* n, const double* x)
      : n(n) {
    const int64_t size = n[0] == 0 ? 4 : 2;
    const auto vectors = [&](const void* at, int64_t stride) {
      return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride * size % 16 == 0 &&
             n[2] * size % 16 == 0;
    };
    const auto temperature = static_cast<float>(x[2]);
    m = {hidden,
         weight,
         n[4],
         n[5],
         n[2],
         n[3],
         vectors(hidden, n[4]),
         vectors(weight, n[5]),
         static_cast<float>(x[0]),
         1.0f / temperature};
    count.rows = n[1], count.vocab = n[3];
    count.target = ints(target, n[6]);
    count.row_weight = row_weight;
    count.ids = n[7] != 0, count.ignore_index = n[8];
    limits = {n[11], n[12], n[13], n[14], n[15], n[16]};
  }
};

}  // namespace

// out: loss lse logp entropy nll w_sum, or null. x: softcap z_loss temperature
API void emu_linear_forward(const void* hidden, const void* weight, const void* target,
                            const float* row_weight, float* const* out, const int64_t* n,
                            const double* x) {
  LinearCall c(hidden, weight, target, row_weight, n, x);
  Memory memory;
  const bool none = n[9] != 0, reduced = !none && out[0] != nullptr;
  c.count.zeroed[0] = out[1];
  c.count.zeroed[1] = none ? out[0] : out[2];
  c.count.zeroed[2] = out[4] != nullptr ? out[4] : out[3];
  const PackedRows rows = pack_rows(c.count, false, memory.room(), nullptr);
  JoinArgs to{};
  to.scale = c.m.scale, to.z_loss = static_cast<float>(x[1]);
  to.lse = out[1], to.logp = out[2], to.entropy = out[3], to.nll = out[4];
  if (none) to.loss = out[0];
  if (reduced) to.packed_loss = static_cast<float*>(memory.room()(n[1] * 4));
  with_dtype(n[0], [&]<class T>() {
    lce_forward<T>(c.m, rows, n[1], to, c.limits, memory.room(), nullptr);
  });
  if (reduced) launch_total_loss(rows, to.packed_loss, n[10] != 0, out[0], nullptr, out[5]);
}

// rows: lse entropy grad_loss grad_logp grad_lse grad_entropy grad_nll, or null. one: grad_loss is
// 1
API void emu_linear_backward(const void* hidden, const void* weight, const void* target,
                             const float* row_weight, const float* const* of_rows, int64_t one,
                             void* grad_hidden, void* grad_weight, const int64_t* n,
                             const double* x) {
  LinearCall c(hidden, weight, target, row_weight, n, x);
  Memory memory;
  const PackedRows rows = pack_rows(c.count, true, memory.room(), nullptr);
  SlopesArgs a{};
  a.rows = rows;
  a.lse = of_rows[0], a.entropy = of_rows[1], a.grad_loss = of_rows[2];
  a.grad_logp = of_rows[3], a.grad_lse = of_rows[4], a.grad_entropy = of_rows[5];
  a.grad_nll = of_rows[6];
  a.loss_is_one = one != 0, a.each = n[9] != 0, a.mean = n[10] != 0;
  a.z_loss = static_cast<float>(x[1]), a.scale = c.m.scale, a.small = n[0] == 2;
  launch_slopes(a, nullptr);
  with_dtype(n[0], [&]<class T>() {
    lce_backward<T>(c.m, rows, n[1], grad_hidden, grad_weight, c.limits, memory.room(), nullptr);
  });
}
