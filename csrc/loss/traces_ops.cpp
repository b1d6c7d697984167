// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of trace_token_class, lm_weight and first_stop.
#include "loss/traces_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace tenfold {
namespace {

int64_t row_stride(const Tensor& t) {
  return t.numel() > 0 ? t.strides()[0] : 0;
}

// int32 or int64, one number per row of `of`; contiguous.
Tensor check_row_ints(const char* op, const char* arg, const Tensor& t, const char* of_name,
                      const Tensor& of) {
  check_int_dtype(op, arg, t);
  check_sizes(op, arg, t, {of.sizes()[0]}, "[N]");
  check_same_device(op, of_name, of, arg, t);
  return as_contiguous(t);
}

void check_special(const char* op, const TraceIds& s) {
  const int64_t ids[] = {s.tool, s.obs, s.work, s.eos};
  const char* const names[] = {"id_tool", "id_obs", "id_work", "id_eos"};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j)
      TENFOLD_CHECK_VALUE(ids[i] < 0 || ids[i] != ids[j], "tenfold::", op, ": ", names[j], " and ",
                          names[i], " must differ, got ", ids[i], " for both");
}

void check_factor(const char* op, const char* arg, double x) {
  TENFOLD_CHECK_VALUE(x >= 0.0 && std::isfinite(x), "tenfold::", op, ": ", arg,
                      " must be finite, and 0 or above, got ", x);
}

}  // namespace

TraceCall check_trace(const char* op, const Tensor& ids, const Tensor& mask,
                      const Tensor& asst_start, const Tensor& answer_start,
                      const TraceIds& special) {
  check_int_dtype(op, "ids", ids);
  check_dim(op, "ids", ids, 2, "[N, S]");
  check_bytes(op, "mask", mask);
  const int64_t rows = ids.sizes()[0], length = ids.sizes()[1];
  check_sizes(op, "mask", mask, {rows, length}, "[N, S]");
  check_same_device(op, "ids", ids, "mask", mask);
  check_special(op, special);
  TraceCall c{with_contiguous_rows(ids),
              with_contiguous_rows(mask),
              check_row_ints(op, "asst_start", asst_start, "ids", ids),
              check_row_ints(op, "answer_start", answer_start, "ids", ids),
              rows,
              length,
              0,
              0,
              special};
  c.ids_stride = row_stride(c.ids), c.mask_stride = row_stride(c.mask);
  if (!ids.is_cpu()) return c;
  const RowInts traces(c.trace_start), answers(c.answer_start);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t trace = traces[i], answer = answers[i];
    TENFOLD_CHECK_INDEX(trace >= 0 && trace <= length, "tenfold::", op, ": asst_start[", i,
                        "] = ", trace, " is not a column of ids, nor its width ", length);
    TENFOLD_CHECK_INDEX(answer >= 0 && answer <= trace, "tenfold::", op, ": answer_start[", i,
                        "] = ", answer, " must be in [0, asst_start[", i, "] = ", trace, "]");
  }
  return c;
}

WeightCall check_lm_weight(const char* op, const Tensor& cls, const Tensor& is_pos, double beta,
                           double omega, bool lm_on_positive) {
  TENFOLD_CHECK_TYPE(cls.scalar_type() == ScalarType::Char, "tenfold::", op,
                     ": cls must be int8, got ", dtype_name(cls.scalar_type()));
  check_dim(op, "cls", cls, 2, "[N, S]");
  check_bytes(op, "is_pos", is_pos);
  check_sizes(op, "is_pos", is_pos, {cls.sizes()[0]}, "[N]");
  check_same_device(op, "cls", cls, "is_pos", is_pos);
  check_factor(op, "beta", beta);
  check_factor(op, "omega", omega);
  const Tensor rows = with_contiguous_rows(cls);
  return {rows,
          as_contiguous(is_pos),
          cls.sizes()[0],
          cls.sizes()[1],
          row_stride(rows),
          static_cast<float>(beta),
          static_cast<float>(omega),
          lm_on_positive};
}

StopCall check_first_stop(const char* op, const Tensor& ids, const Tensor& lens,
                          const Tensor& stop_ids) {
  check_int_dtype(op, "ids", ids);
  check_dim(op, "ids", ids, 2, "[N, S]");
  check_int_dtype(op, "stop_ids", stop_ids);
  check_dim(op, "stop_ids", stop_ids, 1, "[K]");
  check_same_device(op, "ids", ids, "stop_ids", stop_ids);
  const Tensor rows = with_contiguous_rows(ids);
  StopCall c{rows,
             check_row_ints(op, "lens", lens, "ids", ids),
             as_contiguous(stop_ids),
             ids.sizes()[0],
             ids.sizes()[1],
             row_stride(rows),
             stop_ids.sizes()[0]};
  if (!ids.is_cpu()) return c;
  const RowInts lengths(c.lens);
  for (int64_t i = 0; i < c.rows; ++i) {
    const int64_t n = lengths[i];
    TENFOLD_CHECK_INDEX(n >= 0 && n <= c.length, "tenfold::", op, ": lens[", i, "] = ", n,
                        " must be in [0, ", c.length, "], the width of ids");
  }
  return c;
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "trace_token_class(Tensor ids, Tensor mask, Tensor asst_start, Tensor answer_start, "
      "int id_tool, int id_obs, int id_work, int id_eos) -> Tensor cls");
  m.def(
      "lm_weight(Tensor cls, Tensor is_pos, float beta, float omega, bool lm_on_positive) "
      "-> Tensor w");
  m.def("first_stop(Tensor ids, Tensor lens, Tensor stop_ids) -> (Tensor pos, Tensor which)");
}
