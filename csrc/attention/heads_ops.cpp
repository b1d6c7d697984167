// SPDX-License-Identifier: Apache-2.0
// Schemas of the head operations (the only ones) and the argument checks shared by both backends.
#include "attention/heads_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

constexpr int64_t kMaxHeads = 1 << 15;  // of a layer: tables are H * H

void check_float32(const char* op, const char* arg, const Tensor& t) {
  TENFOLD_CHECK_TYPE(t.scalar_type() == ScalarType::Float, "tenfold::", op, ": ", arg,
                     " must be float32, got ", dtype_name(t.scalar_type()));
}

void check_table(const char* op, const char* arg, const Tensor& t) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || s == ScalarType::Double, "tenfold::", op, ": ", arg,
                     " must be float32 or float64, got ", dtype_name(s));
}

}  // namespace

void check_fuse_heads(const char* op, const Tensor& w, const Tensor& omega, const Tensor& groups) {
  check_float_dtype(op, "w", w);
  check_float32(op, "omega", omega);
  check_int_dtype(op, "groups", groups);
  check_same_device(op, "w", w, "omega", omega);
  check_same_device(op, "w", w, "groups", groups);
  check_dim(op, "w", w, 3, "[H, d, m]");
  check_dim(op, "groups", groups, 2, "[N, g]");
  const int64_t n = groups.sizes()[0], g = groups.sizes()[1], h = w.sizes()[0];
  TENFOLD_CHECK_VALUE(g > 0 && n * g == h, "tenfold::", op,
                      ": groups [N, g] must hold each of the H heads of w once, N * g = H and "
                      "g >= 1, got groups ",
                      shape_str(groups), " and w ", shape_str(w));
  check_sizes(op, "omega", omega, {n, g, g, w.sizes()[1]}, "[N, g, g, d]");
}

void check_fuse_heads_backward(const char* op, const Tensor& dout, const Tensor& w,
                               const Tensor& omega, const Tensor& groups) {
  check_fuse_heads(op, w, omega, groups);
  check_same_dtype(op, "w", w, "dout", dout);
  check_same_device(op, "w", w, "dout", dout);
  check_sizes(op, "dout", dout, {groups.sizes()[0], groups.sizes()[1], w.sizes()[1], w.sizes()[2]},
              "[N, g, d, m]");
}

void check_fusion_omega(const char* op, const Tensor& omega) {
  check_float32(op, "omega", omega);
  check_dim(op, "omega", omega, 4, "[N, g, g, d]");
  const auto sizes = omega.sizes();
  TENFOLD_CHECK_VALUE(sizes[1] == sizes[2] && sizes[1] > 0, "tenfold::", op,
                      ": omega must be [N, g, g, d] with g >= 1, got shape ", shape_str(omega));
}

void check_fusion_mse_backward(const char* op, const Tensor& dout, const Tensor& omega) {
  check_fusion_omega(op, omega);
  check_float32(op, "dout", dout);
  check_same_device(op, "omega", omega, "dout", dout);
  check_sizes(op, "dout", dout, {omega.sizes()[0]}, "[N]");
}

void check_head_cka(const char* op, const Tensor& w) {
  check_float_dtype(op, "w", w);
  check_dim(op, "w", w, 3, "[H, d, m]");
}

GroupSolver check_group_heads(const char* op, const Tensor& dist, int64_t n_groups,
                              std::string_view solver, int64_t restarts) {
  check_table(op, "dist", dist);
  check_dim(op, "dist", dist, 2, "[H, H]");
  const int64_t h = dist.sizes()[0];
  TENFOLD_CHECK_VALUE(dist.sizes()[1] == h && h >= 1 && h <= kMaxHeads, "tenfold::", op,
                      ": dist must be a square [H, H] with 1 <= H <= ", kMaxHeads, ", got shape ",
                      shape_str(dist));
  TENFOLD_CHECK_VALUE(n_groups >= 1 && n_groups <= h && h % n_groups == 0, "tenfold::", op,
                      ": n_groups must divide H = ", h, ", got ", n_groups);
  TENFOLD_CHECK_VALUE(restarts >= 1 && restarts <= 1000000, "tenfold::", op,
                      ": restarts must be in [1, 1000000], got ", restarts);
  if (solver == "swap") return GroupSolver::swap;
  if (solver == "paper_sa") return GroupSolver::paper_sa;
  TENFOLD_CHECK_VALUE(solver == "contiguous", "tenfold::", op,
                      ": solver must be 'swap', 'paper_sa' or 'contiguous', got '", solver, "'");
  return GroupSolver::contiguous;
}

void check_allocate_heads(const char* op, const Tensor& cost, const Tensor& sizes, int64_t budget) {
  check_table(op, "cost", cost);
  check_int_dtype(op, "sizes", sizes);
  check_same_device(op, "cost", cost, "sizes", sizes);
  check_dim(op, "cost", cost, 2, "[C, K]");
  const int64_t c = cost.sizes()[0], k = cost.sizes()[1];
  TENFOLD_CHECK_VALUE(c == 0 || (k >= 1 && k <= kMaxHeads), "tenfold::", op,
                      ": cost [C, K] must have 1 to ", kMaxHeads, " sizes K, got shape ",
                      shape_str(cost));
  if (sizes.dim() == 2) {
    check_sizes(op, "sizes", sizes, {c, k}, "[C, K]");
  } else {
    check_sizes(op, "sizes", sizes, {k}, "[K] or [C, K]");
  }
  TENFOLD_CHECK_VALUE(budget >= 0, "tenfold::", op, ": budget must be a number of heads >= 0, got ",
                      budget);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("fuse_heads(Tensor w, Tensor omega, Tensor groups) -> Tensor");
  m.def(
      "fuse_heads_backward(Tensor dout, Tensor w, Tensor omega, Tensor groups, *, "
      "bool need_dw=True, bool need_domega=True) -> (Tensor dw, Tensor domega)");
  m.def("collapse_heads(Tensor w, Tensor omega, Tensor groups) -> Tensor");
  m.def("fusion_mse(Tensor omega) -> Tensor");
  m.def("fusion_mse_backward(Tensor dout, Tensor omega) -> Tensor");
  m.def("head_cka(Tensor w, *, bool center=False) -> Tensor");
  m.def(
      "group_heads(Tensor dist, int n_groups, str solver=\"swap\", int restarts=20, int seed=0) "
      "-> Tensor");
  m.def("allocate_heads(Tensor cost, Tensor sizes, int budget) -> Tensor");
}
