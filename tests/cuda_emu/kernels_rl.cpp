// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `rl`, for ctypes. The launch code is the kernels' own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "rl/cuda/losses_kernel.cuh"
#include "rl/cuda/pool_kernel.cuh"
#include "rl/cuda/prepare_kernel.cuh"
#include "rl/cuda/segments_kernel.cuh"

namespace {

// layout: rows width total packed wide
Rows rows_of(const void* offsets, const int64_t* layout) {
  return {layout[0], layout[1], layout[2],
          layout[3] != 0 ? Ints{offsets, layout[4] != 0} : Ints{nullptr, false}};
}

template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}

}  // namespace

// t: offsets mask lengths nll starts seg nseg. n: layout[5] by isolate split recycle n K
API void emu_segments(void* const* t, const int64_t* n) {
  SegmentParams p{};
  p.rows = rows_of(t[0], n);
  p.mask = as<uint8_t>(t[1]), p.mask_stride = p.starts_stride = n[1];
  p.lengths = as<int32_t>(t[2]), p.nll = as<float>(t[3]), p.starts = as<uint8_t>(t[4]);
  p.seg = as<int32_t>(t[5]), p.nseg = as<int32_t>(t[6]);
  p.by = static_cast<SegmentBy>(n[5]);
  p.isolate_last = n[6] != 0, p.split = n[7] != 0, p.recycle = n[8] != 0;
  p.n = n[9], p.num_lengths = n[10];
  std::vector<int64_t> spare(segment_spare(p));
  launch_segments(p, spare.data(), nullptr);
}

// t: offsets seg x out. n: layout[5] seg_wide T by backward
API void emu_pool(void* const* t, const int64_t* n) {
  const Rows rows = rows_of(t[0], n);
  const PoolParams<float> p{{rows, {t[1], n[5] != 0}, n[6]},
                            n[6],
                            static_cast<PoolBy>(n[7]),
                            as<float>(t[2]),
                            as<float>(t[3])};
  std::vector<int32_t> spare(pool_spare(rows));
  launch_pool(p, n[8] != 0, spare.data(), nullptr);
}

// t: offsets nseg mask value reward bootstrap length adv ret. n: layout[5] masked nseg_wide
API void emu_gae(void* const* t, const int64_t* n, const double* x) {
  launch_gae({rows_of(t[0], n),
              n[5] != 0,
              {t[1], n[6] != 0},
              as<uint8_t>(t[2]),
              as<float>(t[3]),
              as<float>(t[4]),
              as<float>(t[5]),
              as<int32_t>(t[6]),
              {x[0], x[1], t[6] != nullptr},
              as<float>(t[7]),
              as<float>(t[8])},
             nullptr);
}

// t: offsets seg nseg old ref value score bootstrap adv ret adv_m ret_m kl_row.
// n: layout[5] seg_wide nseg_wide sigma reduce_sigma kl per_token. x: beta score_clip gamma lam
API void emu_prepare(void* const* t, const int64_t* n, const double* x) {
  const Rows rows = rows_of(t[0], n);
  const PrepareRule rule{x[0],
                         x[1],
                         static_cast<PoolBy>(n[7]),
                         n[8] != 0,
                         static_cast<KlBy>(n[9]),
                         {x[2], x[3], n[10] != 0}};
  std::vector<int32_t> spare(spare_ints(rows, shared_tokens(rows)));
  launch_prepare({{rows, {t[1], n[5] != 0}},
                  {t[2], n[6] != 0},
                  as<float>(t[3]),
                  as<float>(t[4]),
                  as<float>(t[5]),
                  as<float>(t[6]),
                  as<float>(t[7]),
                  rule,
                  as<float>(t[8]),
                  as<float>(t[9]),
                  as<float>(t[10]),
                  as<float>(t[11]),
                  as<float>(t[12])},
                 spare.data(), nullptr);
}

// t: offsets seg nseg wrong. n: layout[5] seg_wide nseg_wide limit
API void emu_check(void* const* t, const int64_t* n) {
  launch_segment_check(
      {rows_of(t[0], n), {t[1], n[5] != 0}, {t[2], n[6] != 0}, n[7], as<uint8_t>(t[3])}, nullptr);
}

// t: offsets seg now old adv slope loss stats scale. n: layout[5] seg_wide ratio by_length by_rows
// x: eps_lo eps_hi denom
API void emu_policy(void* const* t, const int64_t* n, const double* x) {
  const Rows rows = rows_of(t[0], n);
  const PolicyParams<float> p{{rows, {t[1], n[5] != 0}},
                              as<float>(t[2]),
                              as<float>(t[3]),
                              as<float>(t[4]),
                              {x[0], x[1], static_cast<RatioBy>(n[6]), n[7] != 0},
                              as<float>(t[5])};
  const int64_t spare = p.rule.ratio == RatioBy::token ? 0 : spare_ints(rows, shared_tokens(rows));
  std::vector<RowSums> sums(rows.count * policy_parts(p));
  std::vector<int32_t> first(spare);
  std::vector<float> slope(spare);
  launch_policy(p,
                {{static_cast<AggregateBy>(n[8]), x[2]},
                 true,
                 as<float>(t[6]),
                 as<float>(t[7]),
                 as<double>(t[8])},
                {sums.data(), first.data(), slope.data()}, nullptr);
}

// t: offsets mask now old ret slope loss stats scale. n: layout[5] by_rows. x: clip denom
API void emu_value(void* const* t, const int64_t* n, const double* x) {
  const Rows rows = rows_of(t[0], n);
  std::vector<RowSums> sums(rows.count * row_parts(rows));
  launch_value({rows, as<uint8_t>(t[1]), as<float>(t[2]), as<float>(t[3]), as<float>(t[4]), x[0],
                as<float>(t[5])},
               {{static_cast<AggregateBy>(n[5]), x[1]},
                false,
                as<float>(t[6]),
                as<float>(t[7]),
                as<double>(t[8])},
               sums.data(), nullptr);
}

// t: offsets slope grad scale out. n: layout[5]
API void emu_slope(void* const* t, const int64_t* n) {
  launch_slope(
      {rows_of(t[0], n), as<float>(t[1]), as<float>(t[2]), as<double>(t[3]), as<float>(t[4])},
      nullptr);
}
