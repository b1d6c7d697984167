// SPDX-License-Identifier: Apache-2.0
// CUDA registration of kv_gather and kv_compact_.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "kv_eviction/cuda/impl.h"
#include "kv_eviction/cuda/kv_gather_kernel.cuh"

namespace tenfold::cuda {
namespace {

MoveSide move_side(const Tensor& from, const Tensor& to) {
  const int64_t size = dtype_size(to_dtype(from.scalar_type()));
  MoveSide s{};
  s.from = static_cast<const char*>(from.data_ptr());
  s.to = static_cast<char*>(to.data_ptr());
  s.heads = from.sizes()[1];
  s.dim = from.sizes()[3];
  int64_t misaligned = reinterpret_cast<uintptr_t>(s.from) | reinterpret_cast<uintptr_t>(s.to) |
                       static_cast<uintptr_t>(s.dim * size);
  for (int i = 0; i < 3; ++i) {
    s.from_stride[i] = from.strides()[i] * size;
    s.to_stride[i] = to.strides()[i] * size;
    misaligned |= s.from_stride[i] | s.to_stride[i];
  }
  s.vectors = misaligned % 16 == 0;
  return s;
}

// `keep` holds what the arguments point to.
struct Move {
  Tensor idx, inv_freq;
  OptTensor new_lens;
  MoveArgs args{};

  Move(const Tensor& k, const Tensor& v, const Tensor& k_to, const Tensor& v_to,
       const Tensor& idx_in, const OptTensor& new_lens_in, const OptTensor& freq,
       const OptTensor& kv_start)
      : idx(torch::stable::contiguous(idx_in)), new_lens(contiguous(new_lens_in)) {
    args.side[0] = move_side(k, k_to);
    args.side[1] = move_side(v, v_to);
    args.idx = {idx.data_ptr(), idx.scalar_type() == ScalarType::Long, 1};
    args.new_lens = int_array(new_lens);
    args.lens_per_head = new_lens && new_lens->dim() == 2;
    args.kv_start = int_array(kv_start);
    if (freq) {
      inv_freq = torch::stable::contiguous(*freq);
      args.inv_freq = data_as<float>(inv_freq);
    }
    args.batch = k.sizes()[0];
    args.length = k.sizes()[2];
    args.width = idx.sizes()[2];
    args.index_heads = idx.sizes()[1];
  }
};

}  // namespace

std::tuple<Tensor, Tensor> kv_gather(const char* op, const Tensor& k_in, const Tensor& v_in,
                                     const Tensor& idx, const OptTensor& new_lens,
                                     const OptTensor& inv_freq, const OptTensor& kv_start) {
  check_kv_gather(op, k_in, v_in, idx, new_lens, inv_freq, kv_start);
  const Launch launch(k_in);
  const Tensor k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const int64_t width = idx.sizes()[2];
  const Tensor k_out =
      new_output(k, {k.sizes()[0], k.sizes()[1], width, k.sizes()[3]}, k.scalar_type());
  const Tensor v_out =
      new_output(v, {v.sizes()[0], v.sizes()[1], width, v.sizes()[3]}, v.scalar_type());
  Move move(k, v, k_out, v_out, idx, new_lens, inv_freq, kv_start);
  dispatch_dtype(k.scalar_type(), op, [&]<class T>() {
    const int64_t blocks = plan_move<T>(move.args, false);
    check_grid(op, blocks);
    launch_kv_gather<T>(move.args, blocks, launch.stream);
  });
  launch.check();
  return {k_out, v_out};
}

namespace {

std::tuple<Tensor, Tensor> kv_gather_op(Tensor k, Tensor v, Tensor idx, OptTensor new_lens,
                                        OptTensor inv_freq, OptTensor kv_start) {
  return kv_gather("kv_gather", k, v, idx, new_lens, inv_freq, kv_start);
}

void kv_compact_op(Tensor k, Tensor v, Tensor idx, OptTensor new_lens, OptTensor inv_freq,
                   OptTensor kv_start) {
  constexpr auto op = "kv_compact_";
  check_kv_gather(op, k, v, idx, new_lens, inv_freq, kv_start);
  check_in_place(op, k, v, idx);
  const Launch launch(k);
  Move move(k, v, k, v, idx, new_lens, inv_freq, kv_start);
  dispatch_dtype(k.scalar_type(), op, [&]<class T>() {
    const int64_t blocks = plan_move<T>(move.args, true);
    check_grid(op, blocks);
    launch_kv_compact<T>(move.args, blocks, launch.stream);
  });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("kv_gather", TORCH_BOX(&tenfold::cuda::kv_gather_op));
  m.impl("kv_compact_", TORCH_BOX(&tenfold::cuda::kv_compact_op));
}
