// C entry points of the emulated kernels of `loss`, for ctypes. The launch code is the kernels'
// own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "loss/cuda/selective_logprob_kernel.cuh"

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
