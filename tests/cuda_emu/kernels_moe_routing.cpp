// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated routing kernels of `moe`, for ctypes. The launch code is the
// kernels' own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "moe/cuda/balance_kernel.cuh"
#include "moe/cuda/gate_linear_kernel.cuh"
#include "moe/cuda/router_outer_kernel.cuh"
#include "moe/cuda/seed_kernel.cuh"
#include "moe/cuda/slots_kernel.cuh"
#include "moe/cuda/sort_kernel.cuh"

namespace {

// f<dtype, the same or float>()
template <class F>
void with_dtypes(int64_t first, int64_t second, F f) {
  with_dtype(first, [&]<class T>() {
    if (first == second) return f.template operator()<T, T>();
    f.template operator()<T, float>();
  });
}

// How many tokens count, as the registration finds out.
struct CountOf {
  double known;
  Counted counted;

  CountOf(const uint8_t* mask, int64_t tokens) : known(static_cast<double>(tokens)) {
    counted = {nullptr, known};
    if (mask == nullptr) return;
    known = -1.0;
    launch_count_tokens(mask, tokens, &known, nullptr);
    counted.on_device = &known;
  }
  CountOf(const CountOf&) = delete;
};

}  // namespace

// n: dtype T stride experts k renormalize
API void emu_moe_gate(const void* logits, float* weight, int32_t* index, const int64_t* n) {
  with_dtype(n[0], [&]<class T>() {
    launch_gate<T>(gate_args<T>(logits, n[1], n[2], n[3], n[4], n[5] != 0, weight, index), nullptr);
  });
}

// t: grad logits weight index also out. n: as of emu_moe_gate, index_wide
API void emu_moe_gate_backward(void* const* t, const int64_t* n) {
  GateGradArgs a{};
  a.grad = static_cast<float*>(t[0]), a.logits = t[1], a.weight = static_cast<float*>(t[2]);
  a.index = ints(t[3], n[6]), a.also = static_cast<float*>(t[4]), a.out = t[5];
  a.tokens = n[1], a.stride = n[2], a.experts = n[3], a.k = n[4], a.renormalize = n[5] != 0;
  with_dtype(n[0], [&]<class T>() { launch_gate_grad<T>(with_shape<T>(a), nullptr); });
}

// t: x w logits weight index. n: x_dtype w_dtype T d experts k renormalize x_stride w_stride
API void emu_moe_gate_linear(void* const* t, const int64_t* n) {
  RouterArgs a{};
  a.x = t[0], a.w = t[1], a.logits = static_cast<float*>(t[2]);
  a.tokens = n[2], a.dim = n[3], a.experts = n[4], a.x_stride = n[7], a.w_stride = n[8];
  a.gate = gate_args<float>(t[2], n[2], n[4], n[4], n[5], n[6] != 0, static_cast<float*>(t[3]),
                            static_cast<int32_t*>(t[4]));
  with_dtypes(n[0], n[1],
              [&]<class T, class W>() { launch_router<T, W>(with_shape<T, W>(a), nullptr); });
}

// t: grad of the logits, x w grad_x grad_w, the last two or null. n: as of emu_moe_gate_linear
API void emu_moe_gate_linear_backward(void* const* t, const int64_t* n) {
  const int64_t tokens = n[2], dim = n[3], experts = n[4];
  OuterArgs a{};
  a.a = static_cast<float*>(t[0]), a.cols = dim;
  with_dtypes(n[0], n[1], [&]<class T, class W>() {
    if (t[3] != nullptr) {
      a.a_row = experts, a.a_step = 1, a.rows = tokens, a.depth = a.strip = experts;
      a.b = t[2], a.b_stride = n[8], a.out = t[3];
      launch_outer<W, T>(with_tiles<W, T>(a), nullptr);
    }
    if (t[4] == nullptr) return;
    a.a_row = 1, a.a_step = experts, a.rows = experts, a.depth = tokens, a.strip = kOuterStrip;
    a.b = t[1], a.b_stride = n[7];
    const int64_t strips = outer_strips(a);
    std::vector<float> parts(strips * experts * dim, NAN);
    a.out = parts.data();
    launch_outer<T, float>(with_tiles<T, float>(a), nullptr);
    launch_sum_parts<W>(part_args(parts.data(), 1, strips, experts * dim, t[4]), nullptr);
  });
}

// out: order inverse counts offsets. n: slots experts wide
API void emu_moe_sort(const void* index, int32_t* const* out, const int64_t* n) {
  SortArgs a = sort_shape(n[0], n[1]);
  a.index = ints(index, n[2]);
  a.order = out[0], a.inverse = out[1], a.counts = out[2], a.offsets = out[3];
  std::vector<int32_t> first(sort_ints(a), 0x5A5A5A5A);
  a.first = first.data();
  launch_sort(a, nullptr);
}

// n: dtype positions tokens k d stride wide
API void emu_moe_permute(const void* x, const void* order, void* y, const int64_t* n) {
  with_dtype(n[0], [&]<class T>() {
    constexpr int64_t kSize = sizeof(T);
    launch_permute<T>(
        {x, n[5] * kSize, n[4] * kSize, ints(order, n[6]), n[1], n[2] * n[3], n[3], y}, nullptr);
  });
}

// n: dtype positions tokens k d stride wide
API void emu_moe_permute_backward(const void* grad, const void* order, void* out,
                                  const int64_t* n) {
  const int64_t slots = n[2] * n[3];
  std::vector<int32_t> inverse(slots, 0x5A5A5A5A);
  launch_invert({ints(order, n[6]), n[1], slots, inverse.data()}, nullptr);
  CombineArgs a{};
  a.y = grad, a.stride = n[5], a.rows = n[1], a.dim = n[4];
  a.inverse = ints(inverse.data(), 0), a.tokens = n[2], a.k = n[3], a.out = out;
  with_dtype(n[0], [&]<class T>() { launch_combine<T>(with_shape<T>(a), nullptr); });
}

// t: y weight inverse out. n: dtype rows tokens k d stride wide
API void emu_moe_combine(void* const* t, const int64_t* n) {
  CombineArgs a{};
  a.y = t[0], a.weight = static_cast<float*>(t[1]), a.inverse = ints(t[2], n[6]), a.out = t[3];
  a.rows = n[1], a.tokens = n[2], a.k = n[3], a.dim = n[4], a.stride = n[5];
  with_dtype(n[0], [&]<class T>() { launch_combine<T>(with_shape<T>(a), nullptr); });
}

// t: grad y weight inverse grad_y grad_weight, the last two or null. n: as above, grad_stride
API void emu_moe_combine_backward(void* const* t, const int64_t* n) {
  CombineGradArgs a{};
  a.grad = t[0], a.grad_stride = n[7], a.y = t[1], a.stride = n[5];
  a.weight = static_cast<float*>(t[2]), a.inverse = ints(t[3], n[6]);
  a.rows = n[1], a.tokens = n[2], a.k = n[3], a.dim = n[4];
  a.grad_y = n[1] > 0 ? t[4] : nullptr, a.grad_weight = static_cast<float*>(t[5]);
  std::vector<int32_t> slot(a.grad_y != nullptr ? a.rows : 0, 0x5A5A5A5A);
  if (a.grad_y != nullptr) launch_invert({a.inverse, a.tokens * a.k, a.rows, slot.data()}, nullptr);
  a.slot = slot.data();
  with_dtype(n[0], [&]<class T>() { launch_combine_grad<T>(with_shape<T>(a), nullptr); });
}

// t: logits counts mask grad out; without grad out is the loss. n: dtype T experts stride k
// by_slots wide
API void emu_load_balance(void* const* t, const int64_t* n) {
  const auto* const mask = static_cast<uint8_t*>(t[2]);
  const CountOf count(mask, n[1]);
  BalanceArgs a{};
  a.logits = t[0], a.counts = ints(t[1], n[6]), a.mask = mask, a.counted = count.counted;
  a.tokens = n[1], a.experts = n[2], a.stride = n[3];
  a.numerator = static_cast<double>(n[2]) / static_cast<double>(n[5] != 0 ? n[4] : 1);
  a.grad = static_cast<float*>(t[3]);
  with_dtype(n[0], [&]<class T>() {
    if (a.grad != nullptr) {
      a.out = t[4];
      return launch_balance_grad<T>(with_shape<T>(a), nullptr);
    }
    a = with_shape<T>(a);
    std::vector<double> parts(balance_blocks(a), NAN);
    a.parts = parts.data();
    launch_balance<T>(a, static_cast<float*>(t[4]), nullptr);
  });
}

// t: h r mask target loss slope grad_r, the last two or null.
// n: h_dtype r_dtype layers tokens d layer_stride stride
API void emu_router_seed(void* const* t, const int64_t* n) {
  const auto* const mask = static_cast<uint8_t*>(t[2]);
  const CountOf count(mask, n[3]);
  SeedArgs a{};
  a.h = t[0], a.r = t[1], a.mask = mask, a.target = static_cast<float*>(t[3]);
  a.layers = n[2], a.tokens = n[3], a.dim = n[4], a.layer_stride = n[5], a.stride = n[6];
  a.counted = count.counted, a.slope = static_cast<float*>(t[5]);
  with_dtypes(n[0], n[1], [&]<class T, class R>() {
    a = with_shape<T, R>(a);
    std::vector<double> losses(seed_blocks(a), NAN);
    std::vector<float> parts(t[6] != nullptr ? seed_blocks(a) * a.dim : 0, NAN);
    a.losses = losses.data();
    a.parts = t[6] != nullptr ? parts.data() : nullptr;
    launch_seed<T, R>(a, static_cast<float*>(t[4]), t[6], nullptr);
  });
}

// t: grad slope r out. n: h_dtype r_dtype layers tokens d
API void emu_router_seed_backward(void* const* t, const int64_t* n) {
  SeedGradArgs a{};
  a.grad = static_cast<float*>(t[0]), a.slope = static_cast<float*>(t[1]), a.r = t[2];
  a.layers = n[2], a.tokens = n[3], a.dim = n[4], a.out = t[3];
  with_dtypes(n[0], n[1],
              [&]<class T, class R>() { launch_seed_grad<T, R>(with_shape<T, R>(a), nullptr); });
}
