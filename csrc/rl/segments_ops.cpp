// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of the segmentation ops.
#include "rl/segments_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

// Padded rows may be apart: [B, R] with contiguous rows.
Tensor check_mask(const char* op, const char* arg, const Tensor& t) {
  check_bytes(op, arg, t);
  return with_contiguous_rows(t);
}

int64_t row_stride(const Tensor& t) {
  return t.dim() == 2 ? t.strides()[0] : 0;
}

void check_like_mask(const char* op, const char* arg, const Tensor& t, const Tensor& mask) {
  TENFOLD_CHECK_VALUE(same_sizes(t, mask), "tenfold::", op, ": ", arg,
                      " must have the shape of mask ", shape_str(mask), ", got ", shape_str(t));
  check_same_device(op, arg, t, "mask", mask);
}

}  // namespace

SegmentBy to_ppl_mode(const std::string& mode) {
  if (mode == "macro_prefix") return SegmentBy::macro_prefix;
  if (mode == "response_prefix") return SegmentBy::response_prefix;
  if (mode == "token_rise") return SegmentBy::token_rise;
  TENFOLD_CHECK_VALUE(mode == "token_rise_ref",
                      "tenfold::macro_segment_ppl: mode must be one of macro_prefix, "
                      "response_prefix, token_rise, token_rise_ref, got '",
                      mode, "'");
  return SegmentBy::token_rise_ref;
}

SegmentCall check_segments(const Tensor& mask_in, const SegmentArgs& a) {
  const Tensor mask = check_mask(a.op, "mask", mask_in);
  TENFOLD_CHECK_VALUE(a.holes == "bridge" || a.holes == "split", "tenfold::", a.op,
                      ": holes must be bridge or split, got '", a.holes, "'");
  TENFOLD_CHECK_VALUE(a.tail == "one_segment" || a.tail == "recycle", "tenfold::", a.op,
                      ": tail must be one_segment or recycle, got '", a.tail, "'");
  TENFOLD_CHECK_VALUE(a.n >= 1, "tenfold::", a.op, ": n must be at least 1, got ", a.n);
  const Layout layout = check_layout(a.op, "mask", mask, a.cu_seqlens);
  const int64_t rows = layout.rows.count;
  SegmentCall call{{},
                   layout,
                   mask,
                   new_tokens(mask, layout, ScalarType::Int),
                   new_output(mask, {rows}, ScalarType::Int),
                   a.lengths,
                   a.nll,
                   a.starts};
  SegmentParams& p = call.p;
  p.rows = layout.rows, p.mask_stride = row_stride(mask);
  p.by = a.by, p.isolate_last = a.isolate_last, p.n = a.n;
  p.split = a.holes == "split", p.recycle = a.tail == "recycle";
  p.mask = static_cast<const uint8_t*>(mask.data_ptr());
  p.seg = data_as<int32_t>(call.seg), p.nseg = data_as<int32_t>(call.nseg);
  if (call.lengths) {
    Tensor& t = *call.lengths;
    TENFOLD_CHECK_TYPE(t.scalar_type() == ScalarType::Int, "tenfold::", a.op,
                       ": lengths must be int32, got ", dtype_name(t.scalar_type()));
    check_dim(a.op, "lengths", t, 2, "[B, K]");
    TENFOLD_CHECK_VALUE(t.sizes()[0] == rows, "tenfold::", a.op, ": lengths must be [", rows,
                        ", K], one row per row of mask, got ", shape_str(t));
    check_same_device(a.op, "lengths", t, "mask", mask);
    t = as_contiguous(t);
    p.lengths = data_as<const int32_t>(t), p.num_lengths = t.sizes()[1];
  }
  if (call.nll) {
    Tensor& t = *call.nll;
    TENFOLD_CHECK_TYPE(t.scalar_type() == ScalarType::Float, "tenfold::", a.op,
                       ": nll must be float32, got ", dtype_name(t.scalar_type()));
    check_like_mask(a.op, "nll", t, mask);
    t = as_contiguous(t);
    p.nll = data_as<const float>(t);
  }
  if (call.starts) {
    check_like_mask(a.op, "starts", *call.starts, mask);
    call.starts = check_mask(a.op, "starts", *call.starts);
    p.starts = static_cast<const uint8_t*>(call.starts->data_ptr());
    p.starts_stride = row_stride(*call.starts);
  }
  return call;
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "macro_segment_fixed(Tensor mask, int n, bool isolate_last=False, *, str holes=\"bridge\", "
      "Tensor? cu_seqlens=None) -> (Tensor seg, Tensor nseg)");
  m.def(
      "macro_segment_lengths(Tensor mask, Tensor lengths, str tail=\"one_segment\", *, "
      "bool isolate_last=False, str holes=\"bridge\", Tensor? cu_seqlens=None) "
      "-> (Tensor seg, Tensor nseg)");
  m.def(
      "macro_segment_ppl(Tensor nll, Tensor mask, str mode=\"macro_prefix\", *, "
      "str holes=\"bridge\", Tensor? cu_seqlens=None) -> (Tensor seg, Tensor nseg)");
  m.def(
      "macro_segment_starts(Tensor starts, Tensor mask, *, str holes=\"bridge\", "
      "Tensor? cu_seqlens=None) -> (Tensor seg, Tensor nseg)");
}
