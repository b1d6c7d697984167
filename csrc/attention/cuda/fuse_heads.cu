// SPDX-License-Identifier: Apache-2.0
// CUDA registration of fuse_heads, fuse_heads_backward and collapse_heads.
#include <torch/csrc/stable/library.h>

#include "attention/cuda/fuse_heads_kernel.cuh"
#include "attention/cuda/heads_impl.h"
#include "core/dispatch.h"

namespace tenfold::cuda {
namespace {

HeadRows head_rows(const Tensor& t, bool by_groups) {
  const int64_t dims = t.dim();
  return {t.data_ptr(), dims == 4 ? t.strides()[0] : 0, t.strides()[dims - 3],
          t.strides()[dims - 2], by_groups};
}

// What the arguments point to must live until the launch.
struct Inputs {
  Tensor w, omega, groups;
  Inputs(const Tensor& w_in, const Tensor& omega_in, const Tensor& groups_in)
      : w(with_contiguous_rows(w_in)),
        omega(torch::stable::contiguous(omega_in)),
        groups(torch::stable::contiguous(groups_in)) {}
  int64_t num_groups() const { return groups.sizes()[0]; }
  int64_t size() const { return groups.sizes()[1]; }
  int64_t dims() const { return w.sizes()[1]; }
  int64_t length() const { return w.sizes()[2]; }
  IntArray heads() const {
    return {groups.data_ptr(), groups.scalar_type() == ScalarType::Long, 1};
  }
};

// Outputs `out` = mixtures of the rows of `from`.
MixArgs mix_args(const Inputs& in, const HeadRows& from, const HeadRows& to) {
  MixArgs a{};
  a.from = from, a.to = to;
  a.groups = in.heads();
  a.num_groups = in.num_groups(), a.num_in = a.num_out = in.size();
  a.dims = in.dims(), a.length = in.length(), a.heads = in.w.sizes()[0];
  a.omega = data_as<float>(in.omega);
  const int64_t size = dtype_size(to_dtype(in.w.scalar_type()));
  a.vectors = aligned_rows(from, a.length, size) && aligned_rows(to, a.length, size);
  return a;
}

void launch_mix(const char* op, const Inputs& in, const MixArgs& a, cudaStream_t stream) {
  dispatch_dtype(in.w.scalar_type(), op, [&]<class T>() {
    check_blocks(op, mix_blocks<T>(a));
    launch_mix_heads<T>(a, stream);
  });
}

Tensor fuse_heads_op(Tensor w, Tensor omega, Tensor groups) {
  constexpr auto op = "fuse_heads";
  check_fuse_heads(op, w, omega, groups);
  const Launch launch(w);
  const Inputs in(w, omega, groups);
  const Tensor out =
      new_output(w, {in.num_groups(), in.size(), in.dims(), in.length()}, w.scalar_type());
  MixArgs a = mix_args(in, head_rows(in.w, true), head_rows(out, false));
  a.coef_in = in.dims(), a.coef_out = in.size() * in.dims();  // omega[n, h = out, j = in, i]
  launch_mix(op, in, a, launch.stream);
  launch.check();
  return out;
}

Tensor collapse_heads_op(Tensor w, Tensor omega, Tensor groups) {
  constexpr auto op = "collapse_heads";
  check_fuse_heads(op, w, omega, groups);
  const Launch launch(w);
  const Inputs in(w, omega, groups);
  const Tensor out = new_output(w, {in.num_groups(), in.dims(), in.length()}, w.scalar_type());
  HeadRows to = head_rows(out, false);
  to.group_stride = to.head_stride;
  MixArgs a = mix_args(in, head_rows(in.w, true), to);
  a.num_out = 1;
  a.coef_in = in.dims(), a.mean_heads = in.size();
  launch_mix(op, in, a, launch.stream);
  launch.check();
  return out;
}

std::tuple<Tensor, Tensor> fuse_heads_backward_op(Tensor dout_in, Tensor w, Tensor omega,
                                                  Tensor groups, bool need_dw, bool need_domega) {
  constexpr auto op = "fuse_heads_backward";
  check_fuse_heads_backward(op, dout_in, w, omega, groups);
  const Launch launch(w);
  const Inputs in(w, omega, groups);
  const Tensor dout = with_contiguous_rows(dout_in);
  const int64_t size = in.size(), item = dtype_size(to_dtype(w.scalar_type()));
  const Tensor dw = need_dw ? new_output(w, {w.sizes()[0], in.dims(), in.length()}, w.scalar_type())
                            : new_output(w, {0}, w.scalar_type());
  const Tensor domega =
      need_domega ? new_output(w, {in.num_groups(), size, size, in.dims()}, ScalarType::Float)
                  : new_output(w, {0}, ScalarType::Float);
  const HeadRows grads = head_rows(dout, false), none{};
  const HeadRows to = need_dw ? head_rows(dw, true) : none;
  const bool one_pass = need_dw && need_domega && size <= kWholeGroup;
  if (need_domega) {
    FuseBackwardArgs a{grads,
                       head_rows(in.w, true),
                       one_pass ? to : none,
                       in.heads(),
                       in.num_groups(),
                       size,
                       in.dims(),
                       in.length(),
                       w.sizes()[0],
                       data_as<float>(in.omega),
                       data_as<float>(domega),
                       false};
    a.vectors = aligned_rows(a.dout, a.length, item) && aligned_rows(a.w, a.length, item) &&
                aligned_rows(a.dw, a.length, item);
    check_blocks(op, backward_blocks(a));
    dispatch_dtype(w.scalar_type(), op,
                   [&]<class T>() { launch_fuse_backward<T>(a, launch.stream); });
  }
  if (need_dw && !one_pass) {
    MixArgs a = mix_args(in, grads, to);
    a.coef_in = size * in.dims(), a.coef_out = in.dims();  // omega[n, h = in, j = out, i]
    launch_mix(op, in, a, launch.stream);
  }
  launch.check();
  return {dw, domega};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("fuse_heads", TORCH_BOX(&tenfold::cuda::fuse_heads_op));
  m.impl("fuse_heads_backward", TORCH_BOX(&tenfold::cuda::fuse_heads_backward_op));
  m.impl("collapse_heads", TORCH_BOX(&tenfold::cuda::collapse_heads_op));
}
